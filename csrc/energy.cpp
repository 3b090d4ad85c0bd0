// energy and attention on the CPU. A task is one layer of one sample: it reads each activation once, the rest is in its
// cache.
#include "energy.h"

#include "energy_maps.h"

namespace kd {
namespace KD_ISA {
namespace {

template <typename T>
void energies(const Energies& x, const Pool& pool) {
  int64_t size = 0;
  for (int64_t i = 0; i < x.count; ++i) size = max(size, energy_buffer(x.layers[i]));
  parallel(pool, tasks(x), 1, [&](int64_t begin, int64_t end) {
    Buffer<T> buffer(size);
    each_task(x, begin, end, [&](const MapLayer& layer, int64_t, int64_t sample) {
      const int64_t n = layer.height * layer.width;
      energy<T>(layer.student, sample, n, static_cast<T*>(x.r) + layer.offset + sample * n, buffer);
    });
  });
}

// The length that a map of energies is divided by: the eps is for their mean over the channels.
template <typename T>
T divisor(T norm, int64_t channels) {
  return static_cast<T>(max(double(norm), kUnitEps * double(channels)));
}

template <typename T>
double sum_of_magnitudes(const T* a, int64_t n) {
  double sum = 0;
  for (int64_t begin = 0; begin < n; begin += kChunk) {
    T part = 0;
#pragma omp simd reduction(+ : part)
    for (int64_t k = begin; k < min(n, begin + kChunk); ++k) part += std::fabs(a[k]);
    sum += part;
  }
  return sum;
}

// One layer of one sample: u_s - u_t, the loss, and kappa unless that is null. `maps` has room for three maps, behind
// them energy()'s buffer.
template <typename T>
double sample_forward(const AttentionForward& x, const MapLayer& layer, int64_t sample, T* maps) {
  const int64_t n = layer.height * layer.width;
  const int64_t channels_s = max<int64_t>(layer.student.channels, 1),
                channels_t = max<int64_t>(layer.teacher.channels, 1);
  const bool absolute = x.absolute;
  T *unit = maps, *d = maps + n, *pull = maps + 2 * n, *buffer = maps + 3 * n;
  energy(layer.student, sample, n, unit, buffer);
  energy(layer.teacher, sample, n, d, buffer);
  const T norm_s = energy_norm(unit, n), norm_t = energy_norm(d, n);
  const T length_s = divisor(norm_s, channels_s), length_t = divisor(norm_t, channels_t);
#pragma omp simd
  for (int64_t k = 0; k < n; ++k) {
    unit[k] /= length_s;
    d[k] = unit[k] - d[k] / length_t;
    pull[k] = absolute ? sign(d[k]) : 2 * d[k];
  }
  const double e = absolute ? sum_of_magnitudes(d, n) : sum_of_products(d, d, n), c = layer.factor / double(n);
  if (!x.kappa) return c * e;
  const double mean_s = double(norm_s) / channels_s, mean_t = double(norm_t) / channels_t;
  double along = 2 * along_unit(e, mean_s, mean_t);
  if (absolute) along = mean_s < kUnitEps ? 0 : sum_of_products(pull, unit, n);
  const T inner = static_cast<T>(along), scale = static_cast<T>(2 * c / length_s);
  T* kappa = static_cast<T*>(x.kappa) + layer.offset + sample * n;
#pragma omp simd
  for (int64_t k = 0; k < n; ++k) kappa[k] = (pull[k] - inner * unit[k]) * scale;
  return c * e;
}

template <typename T>
void forward(const AttentionForward& x, const Pool& pool) {
  int64_t size = 0;
  for (int64_t i = 0; i < x.count; ++i)
    size = max(size, 3 * x.layers[i].height * x.layers[i].width + energy_buffer(x.layers[i]));
  map_loss<T>(x, pool, size, [&](const MapLayer& layer, int64_t sample, T* scratch) {
    return sample_forward<T>(x, layer, sample, scratch);
  });
}

// `written`: bytes that the call writes in all
template <typename T>
void sample_backward(const MapBackward& x, const MapLayer& layer, int64_t index, int64_t sample, int64_t written,
                     T* scratch) {
  const int64_t n = layer.height * layer.width, channels = layer.student.channels;
  const T grad = static_cast<const T*>(x.grad)[index * x.layer_stride + sample * x.sample_stride];
  const T* kappa = static_cast<const T*>(x.kappa) + layer.offset + sample * n;
  T* factor = scratch;
  for (int64_t k = 0; k < n; ++k) factor[k] = kappa[k] * grad;
  const bool last = layer.student.channels_last;
  const int64_t rows = last ? n : channels, width = last ? channels : n, bytes = width * int64_t(sizeof(T));
  const bool streamed = layer.student.type == IsDType<T>::value && streams(layer.out, bytes, written);
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t at = (sample * rows + i) * width;
    const T* a = load<T>(layer.student.type, layer.student.data, at, width, scratch + n);
    T* const buffer = scratch + n + width;
    T* out = streamed ? buffer : destination<T>(layer.student.type, layer.out, at, buffer);
    const auto multiply = [&](int64_t begin, int64_t end) {
      const T f = last ? factor[i] : T(0);
      if (last) {
#pragma omp simd
        for (int64_t k = begin; k < end; ++k) out[k] = f * a[k];
      } else {
#pragma omp simd
        for (int64_t k = begin; k < end; ++k) out[k] = factor[k] * a[k];
      }
    };
    in_blocks(width, multiply, a);
    if (streamed) stream(static_cast<T*>(layer.out) + at, out, bytes);
    else store<T>(layer.student.type, layer.out, at, width, out);
  }
}

template <typename T>
void backward(const MapBackward& x, const Pool& pool) {
  int64_t size = 0, written = 0;
  for (int64_t i = 0; i < x.count; ++i) {
    const Activation& a = x.layers[i].student;
    const int64_t n = x.layers[i].height * x.layers[i].width;
    size = max(size, n + 2 * max(n, a.channels));
    written += x.batch * a.channels * n * item_size(a.type);
  }
  parallel(pool, tasks(x), 1, [&](int64_t begin, int64_t end) {
    Buffer<T> scratch(size);
    each_task(x, begin, end, [&](const MapLayer& layer, int64_t index, int64_t sample) {
      sample_backward<T>(x, layer, index, sample, written, scratch);
    });
    finish_streams();
  });
}

}  // namespace
}  // namespace KD_ISA

template <>
void compute<Isa::KD_ISA>(const Energies& x, const Pool& pool) {
  x.fp64 ? KD_ISA::energies<double>(x, pool) : KD_ISA::energies<float>(x, pool);
}

template <>
void compute<Isa::KD_ISA>(const AttentionForward& x, const Pool& pool) {
  x.fp64 ? KD_ISA::forward<double>(x, pool) : KD_ISA::forward<float>(x, pool);
}

template <>
void compute<Isa::KD_ISA>(const MapBackward& x, const Pool& pool) {
  x.fp64 ? KD_ISA::backward<double>(x, pool) : KD_ISA::backward<float>(x, pool);
}

}  // namespace kd
