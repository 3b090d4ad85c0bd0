// What the losses of maps share on CUDA: a table of layers, channel energies, their norm, and the sum of samples'
// losses. All layers go in one launch per step.
#pragma once

#include "arithmetic.h"
#include "cuda.h"

namespace kd {
namespace cuda {
namespace {

constexpr int64_t kLayers = 16;  // layers of a launch; their table is passed by value
constexpr int kTile = 32, kSlices = 8, kThreads = 256, kPerThread = 4;

struct Table {
  MapLayer layers[kLayers];
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

// The scratch memory of a forward pass: maps of T, behind them the samples' losses.
struct Scratch {
  char* data;
  int64_t pixels;  // of all layers: [maps, pixels] T, behind them [layers, batch] double
  int maps;
  template <typename T>
  __host__ __device__ T* map(int i) const {
    return reinterpret_cast<T*>(data) + i * pixels;
  }
  template <typename T>
  __host__ __device__ double* losses() const {
    return reinterpret_cast<double*>(data + ceil_div(maps * pixels * int64_t(sizeof(T)), 8) * 8);
  }
};

// teachers may be null, if the grid has no blocks for them
template <typename T>
__global__ void energy_kernel(const __grid_constant__ Table table, T* students, T* teachers) {
  __shared__ T partial[kSlices][kTile];
  const int i = layer_of(table, blockIdx.x);
  const MapLayer& layer = table.layers[i];
  const int64_t pixels = layer.height * layer.width, tiles = ceil_div(pixels, kTile);
  const int64_t block = blockIdx.x - table.first_block[i], tile = block % tiles, sample = block / tiles % layer.batch;
  const int network = static_cast<int>(block / tiles / layer.batch);
  const Activation& a = network ? layer.teacher : layer.student;
  const int lane = threadIdx.x % kTile, slice = threadIdx.x / kTile;
  T* r = (network ? teachers : students) + layer.offset + sample * pixels;
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

// R = ||r||, by way of r / max r: squares of large energies overflow
template <typename T>
__device__ double energy_norm(const T* r, int64_t pixels, double* shared) {
  double top = 0, squares = 0;
  for (int64_t n = threadIdx.x; n < pixels; n += blockDim.x) top = Max()(top, double(r[n]));
  top = reduce_block(top, shared, 0.0, Max());
  if (top == 0) top = 1;  // a dead map; NaN does not count and shows in the sum
  for (int64_t n = threadIdx.x; n < pixels; n += blockDim.x) squares += (r[n] / top) * (r[n] / top);
  const double part = sqrt(reduce_block(squares, shared, 0.0, Add()));
  return part > 0 && part < 1 ? top : part * top;  // never less than the largest energy
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

// Calls launch(table, blocks) for up to kLayers layers at a time, blocks(layer) being a layer's share of the grid.
template <typename Blocks, typename Start>
void each_table(const MapLayers& x, const Blocks& blocks, const Start& launch) {
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

inline int64_t pixels_of(const MapLayers& x) {
  int64_t pixels = 0;
  for (int64_t i = 0; i < x.count; ++i) pixels += x.layers[i].batch * x.layers[i].height * x.layers[i].width;
  return pixels;
}

inline int64_t scratch_bytes(const MapLoss& x, int maps) {
  return maps * pixels_of(x) * (x.fp64 ? 8 : 4) + 8 + 8 * x.count * x.batch;
}

// The energies of students, and of teachers unless `teachers` is null
template <typename T>
void launch_energies(const MapLayers& x, T* students, T* teachers, cudaStream_t stream) {
  const int64_t networks = teachers ? 2 : 1;
  each_table(
      x, [&](const MapLayer& l) { return networks * l.batch * ceil_div(l.height * l.width, kTile); },
      [&](const Table& table, int64_t blocks) {
        energy_kernel<T><<<blocks, kTile * kSlices, 0, stream>>>(table, students, teachers);
        check_launch("energy");
      });
}

// launch(table, blocks) has a block per sample
template <typename F>
void each_sample(const MapLayers& x, const F& launch) {
  each_table(x, [](const MapLayer& l) { return l.batch; }, launch);
}

template <typename T>
void launch_sums(const MapLoss& x, const double* losses, cudaStream_t stream) {
  const int64_t sums = (x.per_layer ? x.count : 1) * (x.per_sample ? x.batch : 1);
  if (sums == 0) return;
  sum_kernel<T>
      <<<sums, kThreads, 0, stream>>>(losses, x.count, x.batch, x.per_layer, x.per_sample, static_cast<T*>(x.loss));
  check_launch("sums of losses of maps");
}

}  // namespace
}  // namespace cuda
}  // namespace kd
