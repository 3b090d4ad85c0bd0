// What the losses of maps on the CPU share: channel energies, their norm, and a task per layer of a sample.
#pragma once

#include "cpu.h"

namespace kd {
namespace KD_ISA {
namespace {

constexpr int64_t kPixels = 2048;  // whose energies stay in the first cache while the channels go by

template <typename T>
void energy_of_pixels(const Activation& a, int64_t first, int64_t pixels, T* r, T* buffer) {
  for (int64_t n = 0; n < pixels; ++n) {
    const T* x = load<T>(a.type, a.data, first + n * a.channels, a.channels, buffer);
    look_ahead(x, a.channels * int64_t(sizeof(T)));
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t c = 0; c < a.channels; ++c) sum += x[c] * x[c];
    r[n] = sum;
  }
}

template <typename T>
void energy_of_channels(const Activation& a, int64_t first, int64_t pixels, T* r, T* buffer) {
  for (int64_t begin = 0; begin < pixels; begin += kPixels) {
    const int64_t n = min(kPixels, pixels - begin);
    T* out = r + begin;
    for (int64_t k = 0; k < n; ++k) out[k] = 0;
    int64_t c = 0;
    for (; c + 2 <= a.channels; c += 2) {
      const T* x = load<T>(a.type, a.data, first + c * pixels + begin, n, buffer);
      const T* y = load<T>(a.type, a.data, first + (c + 1) * pixels + begin, n, buffer + kPixels);
      const auto add = [&](int64_t from, int64_t to) {
#pragma omp simd
        for (int64_t k = from; k < to; ++k) out[k] += x[k] * x[k] + y[k] * y[k];
      };
      in_blocks(n, add, x, y);
    }
    if (c < a.channels) {
      const T* x = load<T>(a.type, a.data, first + c * pixels + begin, n, buffer);
#pragma omp simd
      for (int64_t k = 0; k < n; ++k) out[k] += x[k] * x[k];
    }
  }
}

// r[n] = sum over channels of A[c, n]^2
template <typename T>
void energy(const Activation& a, int64_t sample, int64_t pixels, T* r, T* buffer) {
  const int64_t first = sample * a.channels * pixels;
  a.channels_last ? energy_of_pixels(a, first, pixels, r, buffer) : energy_of_channels(a, first, pixels, r, buffer);
}

inline int64_t energy_buffer(const MapLayer& l) {  // numbers that energy() needs
  return max<int64_t>(2 * kPixels, max(l.student.channels, l.teacher.channels));
}

template <typename T>
double sum_of_products(const T* a, const T* b, int64_t n) {
  double sum = 0;
  for (int64_t begin = 0; begin < n; begin += kChunk) {
    T part = 0;
#pragma omp simd reduction(+ : part)
    for (int64_t k = begin; k < min(n, begin + kChunk); ++k) part += a[k] * b[k];
    sum += part;
  }
  return sum;
}

// R = ||r||, by way of r / max r: squares of large energies overflow. A single energy is its own norm, exactly.
template <typename T>
T energy_norm(const T* r, int64_t n) {
  const T top = largest(r, n);
  if (top <= 0) return 0;
  double sum = 0;
  for (int64_t begin = 0; begin < n; begin += kChunk) {
    T part = 0;
#pragma omp simd reduction(+ : part)
    for (int64_t k = begin; k < min(n, begin + kChunk); ++k) part += (r[k] / top) * (r[k] / top);
    sum += part;
  }
  return static_cast<T>(std::sqrt(sum) * top);
}

inline int64_t tasks(const MapLayers& x) { return x.count * x.batch; }

// A task is one layer of one sample, the samples outermost: a thread's share has as much of every layer as the others'.
template <typename F>
void each_task(const MapLayers& x, int64_t begin, int64_t end, const F& f) {
  for (int64_t task = begin; task < end; ++task) {
    const int64_t index = task % x.count;
    const MapLayer& layer = x.layers[index];
    if (layer.height > 0 && layer.width > 0) f(layer, index, task / x.count);
  }
}

// The samples' losses [count, batch] summed over layers, over samples, over both or over neither
template <typename T>
void reduce(const MapLoss& x, const double* losses) {
  const int64_t layers = x.per_layer ? x.count : 1, samples = x.per_sample ? x.batch : 1;
  Buffer<double> sums(layers * samples);
  double* sum = sums;
  for (int64_t i = 0; i < layers * samples; ++i) sum[i] = 0;
  for (int64_t i = 0; i < x.count; ++i)
    for (int64_t k = 0; k < x.batch; ++k)
      sum[(x.per_layer ? i : 0) * samples + (x.per_sample ? k : 0)] += losses[i * x.batch + k];
  for (int64_t i = 0; i < layers * samples; ++i) static_cast<T*>(x.loss)[i] = static_cast<T>(sum[i]);
}

// value(layer, sample, scratch) of every layer and sample, summed into x.loss; scratch has `size` numbers
template <typename T, typename F>
void map_loss(const MapLoss& x, const Pool& pool, int64_t size, const F& value) {
  const int64_t count = tasks(x);
  Buffer<double> losses(count);
  double* loss = losses;
  for (int64_t i = 0; i < count; ++i) loss[i] = 0;
  parallel(pool, count, 1, [&](int64_t begin, int64_t end) {
    Buffer<T> scratch(size);
    each_task(x, begin, end, [&](const MapLayer& layer, int64_t index, int64_t sample) {
      loss[index * layer.batch + sample] = value(layer, sample, scratch);
    });
  });
  reduce<T>(x, loss);
}

}  // namespace
}  // namespace KD_ISA
}  // namespace kd
