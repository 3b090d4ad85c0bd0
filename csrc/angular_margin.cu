// angular_margin on CUDA: all layers in one launch per step.
//   energy   one read of each activation: r [pixels] of student and teacher
//   sample   a block per sample: everything that happens on the small maps
//   sum      the samples' losses, in a fixed order
//   backward one read and one write of each student activation
#include "cuda.h"
#include "device.cuh"

namespace kd {
namespace cuda {
namespace {

constexpr int kLayers = 16;  // layers of a launch; their table is passed by value
constexpr int kTile = 32, kSlices = 8, kThreads = 256, kPerThread = 4;
constexpr int kMaps = 9;  // numbers per pixel in the workspace: r and three maps of both networks, h

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

struct Scratch {
  char* data;
  int64_t pixels;  // of all layers: [kMaps, pixels] T, behind them [layers, batch] double
  template <typename T>
  __host__ __device__ T* map(int i) const {
    return reinterpret_cast<T*>(data) + i * pixels;
  }
  template <typename T>
  __host__ __device__ double* losses() const {
    return reinterpret_cast<double*>(data + ceil_div(kMaps * pixels * int64_t(sizeof(T)), 8) * 8);
  }
};

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
        const T v = load<T>(a.type, a.data, first + c);
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
      const T v = load<T>(a.type, a.data, (sample * a.channels + c) * pixels + n);
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
__device__ inline T clamped(T q) {
  const T low = T(-1 + 1e-7), high = T(1 - 1e-7);
  return q < low ? low : q > high ? high : q;
}

template <typename T>
__device__ inline T softplus(T x) {
  return x > 20 ? x : (x > 0 ? x : T(0)) + log1p(exp(x < 0 ? x : -x));
}

template <typename T>
__device__ inline T sigmoid(T x) {
  const T y = exp(x < 0 ? x : -x);
  return (x < 0 ? y : T(1)) / (1 + y);
}

struct Constants {
  double margin, sharpness, local_weight;
};

// Region 0 is the whole map; 1 to 4 are its quadrants.
__device__ inline bool inside(const AngularLayer& layer, int region, int64_t n) {
  if (region == 0) return true;
  const bool below = n / layer.width >= layer.height / 2, right = n % layer.width >= layer.width / 2;
  return region - 1 == 2 * below + right;
}

template <typename T>
__global__ void sample_kernel(const __grid_constant__ Table table, const Scratch scratch, const Constants constants,
                              T* kappa_out) {
  __shared__ double shared[32];
  const int i = layer_of(table, blockIdx.x);
  const AngularLayer& layer = table.layers[i];
  const int64_t pixels = layer.height * layer.width, sample = blockIdx.x - table.first_block[i];
  const int64_t offset = layer.kappa_offset + sample * pixels;
  if (pixels == 0) {
    if (threadIdx.x == 0) scratch.losses<T>()[(table.index + i) * layer.batch + sample] = 0;
    return;
  }
  const T s = static_cast<T>(constants.sharpness), m = static_cast<T>(constants.margin);
  T* h = scratch.map<T>(kMaps - 1) + offset;
  // every pixel belongs to one thread throughout, so that nothing but the sums needs a barrier
  double norm_student = 0;
  for (int network = 1; network >= 0; --network) {
    const T* r = scratch.map<T>(network) + offset;
    T* g = scratch.map<T>(2 + 3 * network) + offset;
    T* u = scratch.map<T>(3 + 3 * network) + offset;
    T* w = scratch.map<T>(4 + 3 * network) + offset;
    double top = 0, squares = 0;
    for (int64_t n = threadIdx.x; n < pixels; n += blockDim.x) top = Max()(top, double(r[n]));
    top = reduce_block(top, shared, 0.0, Max());
    if (top == 0) top = 1;  // a dead map; NaN does not count and shows in the sum
    for (int64_t n = threadIdx.x; n < pixels; n += blockDim.x) squares += (r[n] / top) * (r[n] / top);
    const double part = sqrt(reduce_block(squares, shared, 0.0, Add()));
    const double norm = part > 0 && part < 1 ? top : part * top;  // never less than the largest energy
    norm_student = norm;
    const T length = static_cast<T>(norm) + T(1e-6);
    for (int64_t n = threadIdx.x; n < pixels; n += blockDim.x) {
      const T q = r[n] / length;
      w[n] = static_cast<T>((norm - r[n] + 1e-6) / (norm + 1e-6));  // 1 - q without its rounding: never 0
      u[n] = cos(m * acos(clamped(q)));
      g[n] = -softplus(s * (w[n] - u[n]));
      h[n] = 0;
    }
  }
  double loss = 0;
  for (int region = 0; region < (constants.local_weight != 0 ? 5 : 1); ++region) {
    const int64_t half_h = layer.height / 2, half_w = layer.width / 2;
    const int64_t rows = region == 0 ? layer.height : region < 3 ? half_h : layer.height - half_h;
    const int64_t columns = region == 0 ? layer.width : region % 2 ? half_w : layer.width - half_w;
    const double weight = region == 0 ? 1 - constants.local_weight : constants.local_weight / 4;
    const double c = layer.factor * weight / (3.0 * double(rows * columns));
    for (int branch = 0; branch < 3; ++branch) {
      const T *vs = scratch.map<T>(2 + branch) + offset, *vt = scratch.map<T>(5 + branch) + offset;
      double sum_s = 0, sum_t = 0, e = 0;
      for (int64_t n = threadIdx.x; n < pixels; n += blockDim.x) {
        if (!inside(layer, region, n)) continue;
        sum_s += double(vs[n]) * double(vs[n]);
        sum_t += double(vt[n]) * double(vt[n]);
      }
      sum_s = sqrt(reduce_block(sum_s, shared, 0.0, Add()));
      sum_t = sqrt(reduce_block(sum_t, shared, 0.0, Add()));
      const T length_s = static_cast<T>(sum_s < kUnitEps ? kUnitEps : sum_s);
      const T length_t = static_cast<T>(sum_t < kUnitEps ? kUnitEps : sum_t);
      for (int64_t n = threadIdx.x; n < pixels; n += blockDim.x) {
        if (!inside(layer, region, n)) continue;
        const T d = vs[n] / length_s - vt[n] / length_t;
        e += double(d) * double(d);
      }
      e = reduce_block(e, shared, 0.0, Add());
      loss += c * e;
      if (!kappa_out) continue;
      const T along = static_cast<T>(along_unit(e, sum_s, sum_t)), factor = static_cast<T>(2 * c / length_s);
      for (int64_t n = threadIdx.x; n < pixels; n += blockDim.x) {
        if (!inside(layer, region, n)) continue;
        T slope = -1;  // of w
        if (branch < 2) {
          const T w = scratch.map<T>(4)[offset + n], u = scratch.map<T>(3)[offset + n];
          const T exact = scratch.map<T>(0)[offset + n] / (static_cast<T>(norm_student) + T(1e-6));
          const T theta = acos(clamped(exact));
          slope = exact > T(1 - 1e-7) ? T(0) : m * sin(m * theta) / sin(theta);
          if (branch == 0) slope = s * sigmoid(s * (w - u)) * (slope + 1);
        }
        const T x = vs[n] / length_s, d = x - vt[n] / length_t;
        h[n] += (d - along * x) * factor * slope;
      }
    }
  }
  if (threadIdx.x == 0) scratch.losses<T>()[(table.index + i) * layer.batch + sample] = loss;
  if (!kappa_out) return;
  const T* r = scratch.map<T>(0) + offset;
  const T length = static_cast<T>(norm_student) + T(1e-6);
  double inner = 0;
  for (int64_t n = threadIdx.x; n < pixels; n += blockDim.x) inner += double(h[n]) * double(r[n] / length);
  inner = reduce_block(inner, shared, 0.0, Add());
  // r / R is 1 where one pixel has all the energy, and nothing may be left of it there; 0 on a dead map
  const double along = norm_student > 0 ? inner : 0, by = norm_student > 0 ? norm_student : 1;
  for (int64_t n = threadIdx.x; n < pixels; n += blockDim.x)
    kappa_out[offset + n] = static_cast<T>(2 * (h[n] - along * (r[n] / by)) / length);
}

// A block per number of the loss: the sum of its samples' losses, out of [layers, batch].
template <typename T>
__global__ void sum_kernel(const double* losses, int64_t layers, int64_t batch, bool per_layer, bool per_sample, T* out) {
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
__global__ void backward_kernel(const __grid_constant__ Table table, const T* kappa, const T* grad, int64_t layer_stride,
                                int64_t sample_stride) {
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
    store<T>(a.type, layer.out, at, factor * load<T>(a.type, a.data, at));
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
        backward_kernel<T><<<blocks, kThreads, 0, stream>>>(table, static_cast<const T*>(x.kappa),
                                                            static_cast<const T*>(x.grad), x.layer_stride,
                                                            x.sample_stride);
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
