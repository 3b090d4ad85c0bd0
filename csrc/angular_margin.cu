// angular_margin on CUDA: energies as in energy.cuh, then a block per sample for everything that happens on the small
// maps, then the sum of the samples' losses. The backward pass is energy.cu's.
#include "angular_maps.cuh"

namespace kd {
namespace cuda {
namespace {

template <typename T>
__global__ void sample_kernel(const __grid_constant__ Table table, const Scratch scratch, const Constants constants,
                              T* kappa) {
  __shared__ double shared[32];
  const int i = layer_of(table, blockIdx.x);
  const MapLayer& layer = table.layers[i];
  const int64_t pixels = layer.height * layer.width, sample = blockIdx.x - table.first_block[i];
  const int64_t offset = layer.offset + sample * pixels;
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

template <typename T>
void forward(const AngularMarginForward& x, cudaStream_t stream) {
  const Scratch scratch{static_cast<char*>(x.workspace), pixels_of(x), kMaps};
  const Constants constants{x.margin, x.sharpness, x.local_weight};
  launch_energies(x, scratch.map<T>(0), scratch.map<T>(1), stream);
  each_sample(x, [&](const Table& table, int64_t blocks) {
    sample_kernel<T><<<blocks, kThreads, 0, stream>>>(table, scratch, constants, static_cast<T*>(x.kappa));
    check_launch("angular_margin");
  });
  launch_sums<T>(x, scratch.losses<T>(), stream);
}

}  // namespace

int64_t workspace(const AngularMarginForward& x) { return scratch_bytes(x, kMaps); }

void compute(const AngularMarginForward& x, const Launch& launch) {
  x.fp64 ? forward<double>(x, launch.stream()) : forward<float>(x, launch.stream());
}

}  // namespace cuda
}  // namespace kd
