// What the losses of maps share on CUDA once the energies are there: a block per sample, which adds up the energies'
// parts and knows their norm, and at the end the sum of all samples' losses by the block that arrives last.
#pragma once

#include "energy_views.cuh"

namespace kd {
namespace cuda {

// Energies in parts, for both networks or for those that the plan has; `arrived` is set to 0, unless null. In
// energy.cu.
void start_energies(const Plan& plan, float* sums, unsigned* arrived, cudaStream_t stream);
void start_energies(const Plan& plan, double* sums, unsigned* arrived, cudaStream_t stream);

namespace {

constexpr int kMostThreads = 512;      // of a sample
constexpr int kMostShared = 96 << 10;  // bytes of maps that a block keeps on chip: 64 x 64 pixels of six fp32 maps

// The scratch memory of a forward pass.
template <typename T>
struct Scratch {
  double* losses;     // [layers, batch]
  unsigned* arrived;  // blocks
  T* sums;            // parts of energies
  T* maps;            // [all pixels] of each map, unless they stay on chip
  Scratch(const MapLoss& x, const Plan& plan)
      : losses(static_cast<double*>(x.workspace)),
        arrived(reinterpret_cast<unsigned*>(losses + x.count * x.batch)),
        sums(reinterpret_cast<T*>(arrived + 2)),
        maps(sums + plan.sums()) {}
  static int64_t bytes(const MapLoss& x, const Plan& plan, int maps) {
    const bool on_chip = maps * plan.largest() * int64_t(sizeof(T)) <= kMostShared;
    return 8 * x.count * x.batch + 8 + (plan.sums() + (on_chip ? 0 : maps * plan.pixels())) * int64_t(sizeof(T));
  }
};

inline int64_t scratch_bytes(const MapLoss& x, int maps) {
  const Plan plan(x, Networks::both);
  return x.fp64 ? Scratch<double>::bytes(x, plan, maps) : Scratch<float>::bytes(x, plan, maps);
}

// What a kernel with a block per sample is told.
template <typename T>
struct Samples {
  Scratch<T> scratch;
  T *kappa, *loss;
  int layers, batch;
  bool per_layer, per_sample;
  Samples(const MapLoss& x, const Scratch<T>& scratch)
      : scratch(scratch),
        kappa(static_cast<T*>(x.kappa)),
        loss(static_cast<T*>(x.loss)),
        layers(static_cast<int>(x.count)),
        batch(static_cast<int>(x.batch)),
        per_layer(x.per_layer),
        per_sample(x.per_sample) {}
};

// A block's sample: its layer, and where its pixels begin.
struct Sample {
  const Layer& layer;
  int index, sample, pixels;
  int64_t offset;
  __device__ Sample(const Table& table, int i)
      : layer(table.layers[i]),
        index(table.index + i),
        sample(static_cast<int>(blockIdx.x - table.first_block[i])),
        pixels(layer.pixels()),
        offset(layer.offset + int64_t(sample) * pixels) {}
};

// K sums over the block, of which every thread gets all. `shared` holds 32 K numbers. The order is fixed.
template <int K>
__device__ inline void add_block(double (&x)[K], double* shared) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  __syncthreads();  // whoever used `shared` before is done
#pragma unroll
  for (int k = 0; k < K; ++k) {
    const double sum = reduce_lanes(x[k], 32, Add());
    if (lane == 0) shared[32 * k + warp] = sum;
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < K; ++k) x[k] = reduce_lanes(lane < warps ? shared[32 * k + lane] : 0.0, 32, Add());
}

// A pixel's energy out of its parts
template <typename T>
__device__ inline T energy_at(const T* sums, const Sample& at, int network, int pixel) {
  const int parts = at.layer.views[network].parts();
  const T* part = sums + at.layer.sums[network] + int64_t(at.sample) * parts * at.pixels + pixel;
  T r = 0;
#pragma unroll 4
  for (int k = 0; k < parts; ++k) r += part[int64_t(k) * at.pixels];
  return r;
}

// R = ||r|| as T, and what T leaves of it, so that R - r has all its digits where one pixel has all the energy.
// Doubles: squares of large fp32 energies overflow.
template <typename T>
struct Norm {
  double exact;
  T value, rest;
  __device__ explicit Norm(double squares)
      : exact(sqrt(squares)), value(static_cast<T>(exact)), rest(static_cast<T>(exact - value)) {
    if (!(value < infinity<T>())) rest = 0;  // inf - inf
  }
};

// The end of a block: its loss goes to the others', and the block that comes last adds all of them up, in one order.
template <typename T>
__device__ inline void finish(const Samples<T>& x, const Sample& at, double loss, double* shared) {
  __shared__ bool last;
  const double* losses = x.scratch.losses;
  if (threadIdx.x == 0) {
    x.scratch.losses[int64_t(at.index) * x.batch + at.sample] = loss;
    __threadfence();
    const unsigned highest = static_cast<unsigned>(x.layers) * x.batch - 1;
    last = atomicInc(x.scratch.arrived, highest) == highest;
  }
  __syncthreads();
  if (!last) return;
  __threadfence();
  const int groups = x.per_layer ? x.layers : 1, of_group = x.per_layer ? 1 : x.layers;
  for (int group = 0; group < groups; ++group, losses += int64_t(of_group) * x.batch) {
    double total[1] = {};
    for (int sample = threadIdx.x; sample < x.batch; sample += blockDim.x) {
      double sum = 0;
      for (int k = 0; k < of_group; ++k) sum += __ldcg(losses + int64_t(k) * x.batch + sample);
      if (x.per_sample) x.loss[int64_t(group) * x.batch + sample] = static_cast<T>(sum);
      total[0] += sum;
    }
    if (x.per_sample) continue;
    add_block(total, shared);
    if (threadIdx.x == 0) x.loss[group] = static_cast<T>(total[0]);
  }
}

// ---- on the host ----

inline bool all_empty(const MapLoss& x, const Plan& plan, cudaStream_t stream) {
  if (plan.pixels()) return false;
  const int64_t losses = (x.per_layer ? x.count : 1) * (x.per_sample ? x.batch : 1);
  check(cudaMemsetAsync(x.loss, 0, losses * (x.fp64 ? 8 : 4), stream), "a loss without pixels");
  return true;
}

// The forward pass of a loss of maps: energies, then start(table, samples, blocks, threads, bytes) with a block per
// sample and `bytes` of shared memory for that many maps, or 0 where they are in the scratch memory.
template <typename T, typename Start>
void forward_pass(const MapLoss& x, int maps, cudaStream_t stream, const Start& start) {
  const Plan plan(x, Networks::both);
  if (all_empty(x, plan, stream)) return;
  const Scratch<T> scratch(x, plan);
  start_energies(plan, scratch.sums, scratch.arrived, stream);
  const int64_t bytes = maps * plan.largest() * int64_t(sizeof(T));
  const int threads = plan.largest() <= 256 ? 128 : kMostThreads;
  plan.launch_samples([&](const Table& table, int64_t blocks) {
    start(table, Samples<T>(x, scratch), blocks, threads, bytes <= kMostShared ? bytes : 0);
  });
}

// More shared memory than every kernel may have must be asked for.
template <typename Kernel>
void ask_for_shared(Kernel* kernel, int64_t bytes) {
  if (bytes > (48 << 10))
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)),
          "shared memory for maps");
}

}  // namespace
}  // namespace cuda
}  // namespace kd
