// energy and attention on CUDA: all layers in one launch per step.
//   energy     one read of each activation: r [pixels] of student and teacher
//   attention  a block per sample: everything that happens on the small maps
//   sum        the samples' losses, in a fixed order
//   backward   one read and one write of each student activation
#include "energy.cuh"

namespace kd {
namespace cuda {
namespace {

constexpr int kMaps = 2;  // numbers per pixel in the workspace: the energies of both networks, then unit maps

// A block per sample: every pixel belongs to one thread throughout, so that nothing but the sums needs a barrier.
template <typename T>
__global__ void attention_kernel(const __grid_constant__ Table table, const Scratch scratch, bool absolute, T* kappa) {
  __shared__ double shared[32];
  const int i = layer_of(table, blockIdx.x);
  const MapLayer& layer = table.layers[i];
  const int64_t pixels = layer.height * layer.width, sample = blockIdx.x - table.first_block[i];
  const int64_t offset = layer.offset + sample * pixels;
  T *unit = scratch.map<T>(0) + offset, *difference = scratch.map<T>(1) + offset;
  const double channels_s = max<int64_t>(layer.student.channels, 1),
               channels_t = max<int64_t>(layer.teacher.channels, 1);
  const double norm_s = energy_norm(unit, pixels, shared), norm_t = energy_norm(difference, pixels, shared);
  // the eps is for the energies' mean over the channels
  const T length_s = static_cast<T>(max(norm_s, kUnitEps * channels_s)),
          length_t = static_cast<T>(max(norm_t, kUnitEps * channels_t));
  double e = 0, inner = 0;
  for (int64_t n = threadIdx.x; n < pixels; n += blockDim.x) {
    const T u = unit[n] / length_s, d = u - difference[n] / length_t;
    unit[n] = u;
    difference[n] = d;
    e += absolute ? fabs(double(d)) : double(d) * double(d);
    inner += double(sign(d)) * double(u);
  }
  e = reduce_block(e, shared, 0.0, Add());
  inner = reduce_block(inner, shared, 0.0, Add());
  const double c = pixels ? layer.factor / double(pixels) : 0.0;
  if (threadIdx.x == 0) scratch.losses<T>()[(table.index + i) * layer.batch + sample] = c * e;
  if (!kappa) return;
  double along = 2 * along_unit(e, norm_s / channels_s, norm_t / channels_t);
  if (absolute) along = norm_s < kUnitEps * channels_s ? 0 : inner;
  const T by = static_cast<T>(along), scale = static_cast<T>(2 * c / length_s);
  for (int64_t n = threadIdx.x; n < pixels; n += blockDim.x) {
    const T d = difference[n];
    kappa[offset + n] = ((absolute ? sign(d) : 2 * d) - by * unit[n]) * scale;
  }
}

template <typename T>
__global__ void backward_kernel(const __grid_constant__ Table table, const T* kappa, const T* grad,
                                int64_t layer_stride, int64_t sample_stride) {
  const int i = layer_of(table, blockIdx.x);
  const MapLayer& layer = table.layers[i];
  const Activation& a = layer.student;
  const int64_t pixels = layer.height * layer.width, size = layer.batch * a.channels * pixels;
  const T* g = grad + (table.index + i) * layer_stride;
  const int64_t first = (blockIdx.x - table.first_block[i]) * (kThreads * kPerThread) + threadIdx.x;
  for (int k = 0; k < kPerThread; ++k) {
    const int64_t at = first + k * kThreads;
    if (at >= size) return;
    const int64_t sample = at / (a.channels * pixels);
    const int64_t pixel = a.channels_last ? at / a.channels : sample * pixels + at % pixels;
    const T factor = g[sample * sample_stride] * kappa[layer.offset + pixel];
    store<T>(a.type, layer.out, at, factor * element<T>(a.type, a.data, at));
  }
}

template <typename T>
void forward(const AttentionForward& x, cudaStream_t stream) {
  const Scratch scratch{static_cast<char*>(x.workspace), pixels_of(x), kMaps};
  launch_energies(x, scratch.map<T>(0), scratch.map<T>(1), stream);
  each_sample(x, [&](const Table& table, int64_t blocks) {
    attention_kernel<T><<<blocks, kThreads, 0, stream>>>(table, scratch, x.absolute, static_cast<T*>(x.kappa));
    check_launch("attention");
  });
  launch_sums<T>(x, scratch.losses<T>(), stream);
}

template <typename T>
void backward(const MapBackward& x, cudaStream_t stream) {
  each_table(
      x,
      [](const MapLayer& l) {
        return ceil_div(l.batch * l.student.channels * l.height * l.width, kThreads * kPerThread);
      },
      [&](const Table& table, int64_t blocks) {
        backward_kernel<T><<<blocks, kThreads, 0, stream>>>(
            table, static_cast<const T*>(x.kappa), static_cast<const T*>(x.grad), x.layer_stride, x.sample_stride);
        check_launch("energy backward");
      });
}

}  // namespace

int64_t workspace(const AttentionForward& x) { return scratch_bytes(x, kMaps); }

void compute(const Energies& x, const Launch& launch) {
  x.fp64 ? launch_energies<double>(x, static_cast<double*>(x.r), nullptr, launch.stream())
         : launch_energies<float>(x, static_cast<float*>(x.r), nullptr, launch.stream());
}

void compute(const AttentionForward& x, const Launch& launch) {
  x.fp64 ? forward<double>(x, launch.stream()) : forward<float>(x, launch.stream());
}

void compute(const MapBackward& x, const Launch& launch) {
  x.fp64 ? backward<double>(x, launch.stream()) : backward<float>(x, launch.stream());
}

}  // namespace cuda
}  // namespace kd
