// Losses of Gram matrices whose rows are normalised, for relation.cpp.
#pragma once

#include "pairs.h"
#include "relation.h"

namespace kd {
namespace KD_ISA {
namespace {

// 1 / |q_i|, and what a step along q_i changes it by, over |q_i|: 0 where the norm is a constant
struct InverseNorm {
  double inverse, along;
};

inline InverseNorm pkt_norm(double square, double eps) {
  const double norm = std::sqrt(square), inverse = 1 / (norm + eps);
  return {inverse, norm == 0 ? 0 : inverse / norm};
}

inline InverseNorm cc_norm(double square, bool normalize) {
  constexpr double eps = 1e-12;
  if (!normalize) return {1 + 0 * square, 0};
  const double norm = std::sqrt(square), inverse = 1 / max(norm, eps);
  return {inverse, norm < eps ? 0 : inverse * inverse};
}

// dloss/dQ = W Q from h = dloss/dC, C_ij = <q_i, q_j> / (|q_i| |q_j|)
template <typename T>
void through_cosines(const Pool& pool, int64_t n, const T* k, const InverseNorm* norms, const double* h, T* w) {
  over_rows(pool, n, 8 * n, [&](int64_t i) {
    double inner = 0;
    for (int64_t j = 0; j < n; ++j) {
      const double both = h[i * n + j] + h[j * n + i], over = norms[i].inverse * norms[j].inverse;
      inner += both * (over * double(k[i * n + j]));
      w[i * n + j] = static_cast<T>(both * over);
    }
    w[i * n + i] =
        static_cast<T>((h[i * n + i] + h[i * n + i]) * norms[i].inverse * norms[i].inverse - norms[i].along * inner);
  });
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
  Buffer<InverseNorm> norms(2 * n);
  Buffer<double> buffer(n + (w ? n * n : 0));
  InverseNorm *norms_s = norms, *norms_t = norms_s + n;
  double *row_losses = buffer, *h = w ? row_losses + n : nullptr;
  for (int64_t i = 0; i < n; ++i) {
    norms_s[i] = pkt_norm(double(k_s[i * n + i]), x.eps);
    norms_t[i] = pkt_norm(double(k_t[i * n + i]), x.eps);
  }
  over_rows(pool, n, 40 * n, [&](int64_t i) {
    Buffer<double> both(2 * n);  // of this row: the student's p, then the teacher's
    double *p = both, *q = p + n, sum_s = 0, sum_t = 0;
    for (int64_t j = 0; j < n; ++j) {
      p[j] = 0.5 * (double(k_s[i * n + j]) * norms_s[i].inverse * norms_s[j].inverse + 1);
      q[j] = 0.5 * (double(k_t[i * n + j]) * norms_t[i].inverse * norms_t[j].inverse + 1);
      sum_s += p[j];
      sum_t += q[j];
    }
    double divergence = 0, inner = 0;
#pragma omp simd reduction(+ : divergence, inner)
    for (int64_t j = 0; j < n; ++j) {
      p[j] /= sum_s;
      q[j] /= sum_t;
      const double ratio = q[j] / (p[j] + x.eps);
      divergence += q[j] * log_of((q[j] + x.eps) / (p[j] + x.eps));
      inner += ratio * p[j];
      q[j] = ratio;
    }
    row_losses[i] = divergence;
    for (int64_t j = 0; h && j < n; ++j) h[i * n + j] = 0.5 * x.scale * (inner - q[j]) / sum_s;
  });
  *loss = static_cast<T>(x.scale * total(row_losses, n));
  if (w) through_cosines(pool, n, k_s, norms_s, h, w);
}

// sum over p of c_p x^p, and its derivative
inline double power_series(const double* c, int64_t count, double x) {
  double value = 0;
  for (int64_t p = count; p-- > 0;) value = value * x + c[p];
  return value;
}
inline double power_series_slope(const double* c, int64_t count, double x) {
  double value = 0;
  for (int64_t p = count; p-- > 1;) value = value * x + double(p) * c[p];
  return value;
}

template <typename T>
void cc(const Cc& x, const Pool& pool) {
  const int64_t n = x.batch;
  const T *k_s = static_cast<const T*>(x.measures), *k_t = k_s + n * n;
  T *loss = static_cast<T*>(x.loss), *w = static_cast<T*>(x.gradient_matrix);
  Buffer<InverseNorm> norms(2 * n);
  Buffer<double> buffer(n + (w ? n * n : 0));
  InverseNorm *norms_s = norms, *norms_t = norms_s + n;
  double *row_losses = buffer, *h = w ? row_losses + n : nullptr;
  for (int64_t i = 0; i < n; ++i) {
    norms_s[i] = cc_norm(double(k_s[i * n + i]), x.normalize);
    norms_t[i] = cc_norm(double(k_t[i * n + i]), x.normalize);
  }
  over_rows(pool, n, 8 * x.count * n, [&](int64_t i) {
    double sum = 0;
    for (int64_t j = 0; j < n; ++j) {
      const double s = double(k_s[i * n + j]) * norms_s[i].inverse * norms_s[j].inverse;
      const double t = double(k_t[i * n + j]) * norms_t[i].inverse * norms_t[j].inverse;
      const double difference = power_series(x.coefficients, x.count, s) - power_series(x.coefficients, x.count, t);
      sum += difference * difference;
      if (h) h[i * n + j] = 2 * x.scale * difference * power_series_slope(x.coefficients, x.count, s);
    }
    row_losses[i] = sum;
  });
  *loss = static_cast<T>(x.scale * total(row_losses, n));
  if (w) through_cosines(pool, n, k_s, norms_s, h, w);
}

}  // namespace
}  // namespace KD_ISA
}  // namespace kd
