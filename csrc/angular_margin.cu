// angular_margin on CUDA: all layers in one launch per step.
//   energy   one read of each activation: r [pixels] of student and teacher
//   sample   a block per sample: everything that happens on the small maps
//   sum      the samples' losses, in a fixed order
//   backward one read and one write of each student activation
#include "angular_maps.cuh"
#include "cuda.h"

namespace kd {
namespace cuda {
namespace {

constexpr int64_t kLayers = 16;  // layers of a launch; their table is passed by value
constexpr int kTile = 32, kSlices = 8, kThreads = 256, kPerThread = 4;

struct Table {
  AngularLayer layers[kLayers];
  int64_t first_block[kLayers + 1];
  int64_t index;  // of the first layer among all
  int count;
};

// The layer that a block works for.
__device__ inline int layer_of(const Table& table, int64_t block) {
  int i = 0;
  while (i + 1 < table.count && block >= table.first_block[i + 1]) ++i;
  return i;
}

template <typename T>
__global__ void energy_kernel(const __grid_constant__ Table table, const Scratch scratch) {
  __shared__ T partial[kSlices][kTile];
  const int i = layer_of(table, blockIdx.x);
  const AngularLayer& layer = table.layers[i];
  const int64_t pixels = layer.height * layer.width, tiles = ceil_div(pixels, kTile);
  const int64_t block = blockIdx.x - table.first_block[i], tile = block % tiles, sample = block / tiles % layer.batch;
  const int network = static_cast<int>(block / tiles / layer.batch);
  const Activation& a = network ? layer.teacher : layer.student;
  const int lane = threadIdx.x % kTile, slice = threadIdx.x / kTile;
  T* r = scratch.map<T>(network) + layer.kappa_offset + sample * pixels;
  if (a.channels_last) {  // a warp per pixel, its lanes along the channels
    for (int k = slice; k < kTile; k += kSlices) {
      const int64_t n = tile * kTile + k, first = (sample * pixels + n) * a.channels;
      if (n >= pixels) break;
      T sum = 0;
      for (int64_t c = lane; c < a.channels; c += 32) {
        const T v = element<T>(a.type, a.data, first + c);
        sum += v * v;
      }
      sum = reduce_lanes(sum, 32, Add());
      if (lane == 0) r[n] = sum;
    }
    return;
  }
  const int64_t n = tile * kTile + lane;  // neighbouring lanes read neighbouring pixels; each warp every eighth channel
  T sum = 0;
  if (n < pixels)
    for (int64_t c = slice; c < a.channels; c += kSlices) {
      const T v = element<T>(a.type, a.data, (sample * a.channels + c) * pixels + n);
      sum += v * v;
    }
  partial[slice][lane] = sum;
  __syncthreads();
  if (slice == 0 && n < pixels) {
    for (int k = 1; k < kSlices; ++k) sum += partial[k][lane];
    r[n] = sum;
  }
}

template <typename T>
__global__ void sample_kernel(const __grid_constant__ Table table, const Scratch scratch, const Constants constants,
                              T* kappa) {
  __shared__ double shared[32];
  const int i = layer_of(table, blockIdx.x);
  const AngularLayer& layer = table.layers[i];
  const int64_t pixels = layer.height * layer.width, sample = blockIdx.x - table.first_block[i];
  const int64_t offset = layer.kappa_offset + sample * pixels;
  const Maps<T> maps(scratch, offset, pixels);
  double norms[2], loss = 0;
#pragma unroll
  for (int network = 0; network < 2; ++network) {
    norms[network] = energy_norm(maps.r[network], pixels, shared);
    make_maps(constants, maps, network, norms[network]);
  }
  for (int64_t n = threadIdx.x; n < pixels; n += blockDim.x) maps.h[n] = 0;
  for (int k = 0; pixels > 0 && k < regions(constants.local_weight); ++k) {
    const Region a = region(k, layer.height, layer.width, constants.local_weight);
    const double factor = region_factor(layer.factor, a);
    for (int branch = 0; branch < 3; ++branch)
      loss += compare(constants, layer, maps, a, branch, factor, norms[0], kappa != nullptr, shared);
  }
  if (threadIdx.x == 0) scratch.losses<T>()[(table.index + i) * layer.batch + sample] = loss;
  if (kappa) make_kappa(maps, norms[0], shared, kappa + offset);
}

// A block per number of the loss: the sum of its samples' losses, out of [layers, batch].
template <typename T>
__global__ void sum_kernel(const double* losses, int64_t layers, int64_t batch, bool per_layer, bool per_sample,
                           T* out) {
  __shared__ double shared[32];
  const int64_t samples = per_sample ? batch : 1, layer = blockIdx.x / samples, sample = blockIdx.x % samples;
  const int64_t first = per_layer ? layer : 0, end = per_layer ? layer + 1 : layers;
  double total = 0;
  for (int64_t i = first; i < end; ++i) {
    double sum = 0;
    if (per_sample) sum = losses[i * batch + sample];
    else
      for (int64_t k = threadIdx.x; k < batch; k += blockDim.x) sum += losses[i * batch + k];
    total += per_sample ? sum : reduce_block(sum, shared, 0.0, Add());
  }
  if (threadIdx.x == 0) out[blockIdx.x] = static_cast<T>(total);
}

template <typename T>
__global__ void backward_kernel(const __grid_constant__ Table table, const T* kappa, const T* grad,
                                int64_t layer_stride, int64_t sample_stride) {
  const int i = layer_of(table, blockIdx.x);
  const AngularLayer& layer = table.layers[i];
  const Activation& a = layer.student;
  const int64_t pixels = layer.height * layer.width, size = layer.batch * a.channels * pixels;
  const T* g = grad + (table.index + i) * layer_stride;
  const int64_t first = (blockIdx.x - table.first_block[i]) * (kThreads * kPerThread) + threadIdx.x;
  for (int k = 0; k < kPerThread; ++k) {
    const int64_t at = first + k * kThreads;
    if (at >= size) return;
    const int64_t sample = at / (a.channels * pixels);
    const int64_t pixel = a.channels_last ? at / a.channels : sample * pixels + at % pixels;
    const T factor = g[sample * sample_stride] * kappa[layer.kappa_offset + pixel];
    store<T>(a.type, layer.out, at, factor * element<T>(a.type, a.data, at));
  }
}

// Calls launch(table, blocks) for up to kLayers layers at a time, blocks(layer) being a layer's share of the grid.
template <typename Blocks, typename Start>
void each_table(const AngularMargin& x, const Blocks& blocks, const Start& launch) {
  for (int64_t begin = 0; begin < x.count; begin += kLayers) {
    Table table{};
    table.index = begin;
    table.count = static_cast<int>(min(kLayers, x.count - begin));
    for (int i = 0; i < table.count; ++i) {
      table.layers[i] = x.layers[begin + i];
      table.first_block[i + 1] = table.first_block[i] + blocks(x.layers[begin + i]);
    }
    if (table.first_block[table.count]) launch(table, table.first_block[table.count]);
  }
}

inline int64_t pixels_of(const AngularMargin& x) {
  int64_t pixels = 0;
  for (int64_t i = 0; i < x.count; ++i) pixels += x.layers[i].batch * x.layers[i].height * x.layers[i].width;
  return pixels;
}

template <typename T>
void forward(const AngularMarginForward& x, cudaStream_t stream) {
  const Scratch scratch{static_cast<char*>(x.workspace), pixels_of(x)};
  const Constants constants{x.margin, x.sharpness, x.local_weight};
  each_table(
      x, [](const AngularLayer& l) { return 2 * l.batch * ceil_div(l.height * l.width, kTile); },
      [&](const Table& table, int64_t blocks) {
        energy_kernel<T><<<blocks, kTile * kSlices, 0, stream>>>(table, scratch);
        check_launch("angular_margin energy");
      });
  each_table(
      x, [](const AngularLayer& l) { return l.batch; },
      [&](const Table& table, int64_t blocks) {
        sample_kernel<T><<<blocks, kThreads, 0, stream>>>(table, scratch, constants, static_cast<T*>(x.kappa));
        check_launch("angular_margin sample");
      });
  const int64_t sums = (x.per_layer ? x.count : 1) * (x.per_sample ? x.batch : 1);
  if (sums == 0) return;
  sum_kernel<T><<<sums, kThreads, 0, stream>>>(scratch.losses<T>(), x.count, x.batch, x.per_layer, x.per_sample,
                                               static_cast<T*>(x.loss));
  check_launch("angular_margin sum");
}

template <typename T>
void backward(const AngularMarginBackward& x, cudaStream_t stream) {
  each_table(
      x,
      [](const AngularLayer& l) {
        return ceil_div(l.batch * l.student.channels * l.height * l.width, kThreads * kPerThread);
      },
      [&](const Table& table, int64_t blocks) {
        backward_kernel<T><<<blocks, kThreads, 0, stream>>>(
            table, static_cast<const T*>(x.kappa), static_cast<const T*>(x.grad), x.layer_stride, x.sample_stride);
        check_launch("angular_margin backward");
      });
}

}  // namespace

int64_t workspace(const AngularMarginForward& x) {
  return kMaps * pixels_of(x) * (x.fp64 ? 8 : 4) + 8 + 8 * x.count * x.batch;
}

void compute(const AngularMarginForward& x, const Launch& launch) {
  x.fp64 ? forward<double>(x, launch.stream()) : forward<float>(x, launch.stream());
}

void compute(const AngularMarginBackward& x, const Launch& launch) {
  x.fp64 ? backward<double>(x, launch.stream()) : backward<float>(x, launch.stream());
}

}  // namespace cuda
}  // namespace kd
