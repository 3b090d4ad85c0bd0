// Losses of Gram matrices whose rows are normalised, for relation.cpp.
#pragma once

#include "pairs.h"
#include "relation.h"

namespace kd {
namespace KD_ISA {
namespace {

// 1 / |q_i|, and what a step along q_i changes it by, over |q_i|: 0 where the norm is a constant. A zero row has cosine
// 0 with every row and gets no gradient: it has no direction to normalise.
struct InverseNorm {
  double inverse, along;
};

inline InverseNorm pkt_norm(double square, double eps) {
  const double norm = std::sqrt(square), inverse = 1 / (norm + eps);
  return norm == 0 ? InverseNorm{0, 0} : InverseNorm{inverse, inverse / norm};
}

inline InverseNorm cc_norm(double square, bool normalize) {
  constexpr double eps = 1e-12;
  if (!normalize) return {1 + 0 * square, 0};
  const double norm = std::sqrt(square), inverse = 1 / max(norm, eps);
  return norm == 0 ? InverseNorm{0, 0} : InverseNorm{inverse, norm < eps ? 0 : inverse * inverse};
}

// Those of all rows of K
class InverseNorms {
 public:
  template <typename T, typename F>
  InverseNorms(const T* k, int64_t n, const F& of_square) : buffer_(2 * n), inverse(buffer_), along(buffer_ + n) {
    for (int64_t i = 0; i < n; ++i) {
      const InverseNorm norm = of_square(double(k[i * n + i]));
      inverse[i] = norm.inverse;
      along[i] = norm.along;
    }
  }

 private:
  Buffer<double> buffer_;

 public:
  double *const inverse, *const along;
};

// Row i of W from that of H + H^T; w may be the latter
template <typename T, typename H>
inline void row_through_cosines(int64_t n, int64_t i, const T* k, const InverseNorms& norms, const H* both, T* w) {
  const double own = norms.inverse[i];
  const double* inverse = norms.inverse;
  double inner = 0;
#pragma omp simd reduction(+ : inner)
  for (int64_t j = 0; j < n; ++j) {
    const double value = double(both[j]) * own * inverse[j];
    inner += value * double(k[j]);
    w[j] = static_cast<T>(value);
  }
  w[i] = static_cast<T>(double(w[i]) - norms.along[i] * inner);
}

// dloss/dQ = W Q from h = dloss/dC, C_ij = <q_i, q_j> / (|q_i| |q_j|)
template <typename T>
void through_cosines(const Pool& pool, int64_t n, const T* k, const InverseNorms& norms, const double* h, T* w) {
  over_symmetrised(
      pool, n, h, [&](int64_t i, const double* both) { row_through_cosines(n, i, k + i * n, norms, both, w + i * n); });
}

// The logarithm of a normal number, in loops that vectorise; NaN for everything else
inline double log_of(double x) {
  constexpr uint64_t kMantissa = (uint64_t(1) << 52) - 1;
  const uint64_t b = bits<uint64_t>(x);
  double exponent = double(int64_t(b >> 52) - 1023), m = bits<double>((b & kMantissa) | 0x3ff0000000000000u);
  const bool high = m > 1.4142135623730951;
  m = high ? 0.5 * m : m;
  exponent = high ? exponent + 1 : exponent;
  const double z = (m - 1) / (m + 1), y = z * z;  // log m = 2 atanh z
  double p = 1.0 / 19;
  p = p * y + 1.0 / 17;
  p = p * y + 1.0 / 15;
  p = p * y + 1.0 / 13;
  p = p * y + 1.0 / 11;
  p = p * y + 1.0 / 9;
  p = p * y + 1.0 / 7;
  p = p * y + 1.0 / 5;
  p = p * y + 1.0 / 3;
  const double value = 0.69314718055994531 * exponent + 2 * (p * y * z + z);
  return x > 0 && x < HUGE_VAL ? value : __builtin_nan("");
}

template <typename T>
void pkt(const Pkt& x, const Pool& pool) {
  const int64_t n = x.batch;
  const T *k_s = static_cast<const T*>(x.measures), *k_t = k_s + n * n;
  T *loss = static_cast<T*>(x.loss), *w = static_cast<T*>(x.gradient_matrix);
  const auto norm = [&](double square) { return pkt_norm(square, x.eps); };
  const InverseNorms norms_s(k_s, n, norm), norms_t(k_t, n, norm);
  Buffer<double> buffer(n + (w ? n * n : 0));
  double *row_losses = buffer, *h = w ? row_losses + n : nullptr;
  over_rows(pool, n, 40 * n, [&](int64_t i) {
    Buffer<double> row(2 * n);  // the student's p, then the teacher's
    double *p = row, *q = p + n, sum_s = 0, sum_t = 0;
    const double *inverse_s = norms_s.inverse, *inverse_t = norms_t.inverse;
    const double own_s = 0.5 * inverse_s[i], own_t = 0.5 * inverse_t[i];
#pragma omp simd reduction(+ : sum_s, sum_t)
    for (int64_t j = 0; j < n; ++j) {
      p[j] = double(k_s[i * n + j]) * own_s * inverse_s[j] + 0.5;
      q[j] = double(k_t[i * n + j]) * own_t * inverse_t[j] + 0.5;
      sum_s += p[j];
      sum_t += q[j];
    }
    const double over_s = 1 / sum_s, over_t = 1 / sum_t;
    double divergence = 0, inner = 0;
#pragma omp simd reduction(+ : divergence, inner)
    for (int64_t j = 0; j < n; ++j) {
      const double of_s = p[j] * over_s, of_t = q[j] * over_t, over = 1 / (of_s + x.eps);
      divergence += of_t * log_of((of_t + x.eps) * over);
      inner += of_t * over * of_s;
      q[j] = of_t * over;
    }
    row_losses[i] = n == 1 ? 0 * divergence : divergence;  // a single row is certain of itself
    const double factor = 0.5 * x.scale * over_s;
    for (int64_t j = 0; h && j < n; ++j) h[i * n + j] = factor * (inner - q[j]);
  });
  *loss = static_cast<T>(x.scale * total(row_losses, n));
  if (w) through_cosines(pool, n, k_s, norms_s, h, w);
}

// sum over p of c_p x^p of n numbers, and its derivative
template <typename T>
inline void power_series(const double* c, int64_t count, int64_t n, const T* x, T* value, T* slope) {
  for (int64_t j = 0; j < n; ++j) value[j] = slope[j] = 0;
  for (int64_t p = count; p-- > 0;) {
    const T own = static_cast<T>(c[p]);
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) {
      slope[j] = slope[j] * x[j] + value[j];
      value[j] = value[j] * x[j] + own;
    }
  }
}

template <typename T>
void cc(const Cc& x, const Pool& pool) {
  const int64_t n = x.batch;
  const T *k_s = static_cast<const T*>(x.measures), *k_t = k_s + n * n;
  T *loss = static_cast<T*>(x.loss), *w = static_cast<T*>(x.gradient_matrix);
  const auto norm = [&](double square) { return cc_norm(square, x.normalize); };
  const InverseNorms norms_s(k_s, n, norm), norms_t(k_t, n, norm);
  Buffer<double> row_losses(n);
  double* losses = row_losses;
  over_rows(pool, n, 8 * x.count * n, [&](int64_t i) {
    Buffer<T> row(5 * n);
    const double *inverse_s = norms_s.inverse, *inverse_t = norms_t.inverse;
    T *s = row, *t = s + n, *value_s = t + n, *value_t = value_s + n, *slope = value_t + n;
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) {
      s[j] = static_cast<T>(double(k_s[i * n + j]) * inverse_s[i] * inverse_s[j]);
      t[j] = static_cast<T>(double(k_t[i * n + j]) * inverse_t[i] * inverse_t[j]);
    }
    power_series(x.coefficients, x.count, n, t, value_t, slope);
    power_series(x.coefficients, x.count, n, s, value_s, slope);
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < n; ++j) {
      const double difference = double(value_s[j]) - double(value_t[j]);
      sum += difference * difference;
      slope[j] = static_cast<T>(4 * x.scale * difference * double(slope[j]));  // H is symmetric: twice its own
    }
    losses[i] = sum;
    if (w) row_through_cosines(n, i, k_s + i * n, norms_s, slope, w + i * n);
  });
  *loss = static_cast<T>(x.scale * total(losses, n));
}

}  // namespace
}  // namespace KD_ISA
}  // namespace kd
