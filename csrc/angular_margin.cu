// angular_margin on CUDA: energies as in energy.cu, then a block per sample for everything that happens on the small
// maps, in four sweeps: r and its norm; G, u, w and their lengths; distances; gradient. Each ends in sums over the
// block of all networks, branches and regions at once. The backward pass is energy.cu's.
#include "angular_maps.cuh"

namespace kd {
namespace cuda {
namespace {

template <typename T, bool kOnChip>
__global__ void __launch_bounds__(kMostThreads, 1)
    angular_kernel(const __grid_constant__ Table table, const Samples<T> x,
                   const __grid_constant__ Constants<T> constants) {
  extern __shared__ double on_chip[];
  __shared__ Board<T> board;
  const Sample at(table, layer_of(table, blockIdx.x));
  T* maps = kOnChip ? reinterpret_cast<T*>(on_chip) : x.scratch.maps + at.offset * kMaps;
  AngularSample<T> sample(at, constants, maps, board);
  sample.energies(x.scratch.sums);
  sample.maps();
  const double loss = sample.loss();
  if (x.kappa) sample.gradient(x.kappa + at.offset);
  finish(x, at, loss, board.block_sums);
}

template <typename T>
void forward(const AngularMarginForward& x, cudaStream_t stream) {
  const Constants<T> constants(x);
  const auto start = [&](const Table& table, const Samples<T>& of, int64_t blocks, int threads, int64_t bytes) {
    ask_for_shared(angular_kernel<T, true>, bytes);
    if (bytes) angular_kernel<T, true><<<blocks, threads, bytes, stream>>>(table, of, constants);
    else angular_kernel<T, false><<<blocks, threads, 0, stream>>>(table, of, constants);
    check_launch("angular_margin");
  };
  forward_pass<T>(x, kMaps, stream, start);
}

}  // namespace

int64_t workspace(const AngularMarginForward& x) { return scratch_bytes(x, kMaps); }

void compute(const AngularMarginForward& x, const Launch& launch) {
  x.fp64 ? forward<double>(x, launch.stream()) : forward<float>(x, launch.stream());
}

}  // namespace cuda
}  // namespace kd
