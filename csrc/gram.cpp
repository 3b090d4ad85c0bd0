// gram on the CPU: products from matrix.h; all work on B x B matrices is in double, since it costs next to nothing.
#include "gram.h"

#include "cosine.h"
#include "pairs.h"

namespace kd {
namespace KD_ISA {
namespace {

template <typename T>
void grams(const Grams& x, const Pool& pool) {
  raw_grams<T>(x.features, x.count, x.batch, pool, static_cast<T*>(x.grams));
}

// ---- similarity-preserving loss ----

// ||K_i||, by way of K / max |K|: squares of large features overflow
template <typename K>
inline RowNorm row_norm(const K* k, int64_t n, const SpOptions& options) {
  const bool l1 = options.l1;
  double top = 0, sum = 0;
#pragma omp simd reduction(max : top)
  for (int64_t j = 0; j < n; ++j) top = std::fabs(double(k[j])) > top ? std::fabs(double(k[j])) : top;
  const double by = l1 || top == 0 ? 1 : top;  // NaN does not count in the maximum; it shows in the sum
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) sum += l1 ? std::fabs(double(k[j])) : (k[j] / by) * (k[j] / by);
  return RowNorm(l1 ? sum : std::sqrt(sum) * by, options.eps);  // of one number exactly itself
}

// A row of a layer's Gram matrices: returns ||G_t - G_s||^2 of it, and makes the row's gradient by K unless h is null.
template <typename K>
double sp_row(const SpOptions& options, double scale, const K* k_s, const K* k_t, int64_t n, double* h) {
  const RowNorm s = row_norm(k_s, n, options), t = row_norm(k_t, n, options);
  double loss = 0, inner = 0;
#pragma omp simd reduction(+ : loss, inner)
  for (int64_t j = 0; j < n; ++j) {
    const double g = k_s[j] / s.divisor, difference = g - k_t[j] / t.divisor;
    loss += difference * difference;
    inner += 2 * scale * difference * g;
    if (h) h[j] = 2 * scale * difference;
  }
  if (!h) return loss;
  const ThroughRowNorm through(s, inner, options);
  for (int64_t j = 0; j < n; ++j) h[j] = through(h[j], k_s[j]);
  return loss;
}

// H + H^T of every layer
template <typename T>
void symmetrise(const double* h, int64_t layers, int64_t n, const Pool& pool, T* out) {
  parallel(pool, layers * n, kSmall / (2 * n), [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const double* from = h + task / n * n * n;
      for (int64_t i = task % n, j = 0; j < n; ++j)
        out[task * n + j] = static_cast<T>(from[i * n + j] + from[j * n + i]);
    }
  });
}

// The loss and the gradient matrix from the raw K, [2, layers, batch, batch]
template <typename T, typename K>
void sp_loss(const SpLoss& x, const K* grams, const Pool& pool) {
  const int64_t n = x.batch, rows = x.layers * n;
  Buffer<double> row_losses(rows), gradients(x.gradient_matrix ? rows * n : 0);
  double *losses = row_losses, *h = gradients;
  if (n > 0) {
    parallel(pool, rows, kSmall / (8 * n), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row)
        losses[row] = sp_row(x, x.scales[row / n], grams + row * n, grams + (rows + row) * n, n,
                             x.gradient_matrix ? h + row * n : nullptr);
    });
    if (x.gradient_matrix) symmetrise(h, x.layers, n, pool, static_cast<T*>(x.gradient_matrix));
  }
  T* loss = static_cast<T*>(x.loss);
  double total = 0;
  for (int64_t layer = 0; layer < x.layers; ++layer) {
    double sum = 0;
    for (int64_t i = 0; i < n; ++i) sum += losses[layer * n + i];
    total += x.scales[layer] * sum;
    if (x.per_layer) loss[layer] = static_cast<T>(x.scales[layer] * sum);
  }
  if (!x.per_layer) *loss = static_cast<T>(total);
}

template <typename T>
void sp_forward(const SpForward& x, const Pool& pool) {
  Buffer<double> k(2 * x.layers * x.batch * x.batch);
  double* grams = k;
  raw_grams<T>(x.features, 2 * x.layers, x.batch, pool, grams);
  sp_loss<T>(x, grams, pool);
}

template <typename T>
void sp_from_grams(const SpFromGrams& x, const Pool& pool) {
  sp_loss<T>(x, static_cast<const T*>(x.grams), pool);
}

template <typename T>
void sp_backward(const SpBackward& x, const Pool& pool) {
  const int64_t n = x.batch;
  Buffer<T> packed(round_up(n, kTall) * n);
  for (int64_t i = 0; i < x.layers; ++i) {
    const T grad = static_cast<const T*>(x.grad)[i * x.grad_stride];
    const T* w = static_cast<const T*>(x.gradient_matrix) + i * n * n;
    const Rows& q = x.student[i];
    pack_weights<T>(n, n, [&](int64_t r, int64_t k) { return w[r * n + k] * grad; }, packed);
    weighted_rows<T>(pool, packed, n, q, [&](int64_t row, int64_t column, int64_t width, const T* values) {
      store<T>(q.type, x.out[i], row * q.width + column, width, values);
    });
  }
}

}  // namespace
}  // namespace KD_ISA

template <>
void compute<Isa::KD_ISA>(const Grams& x, const Pool& pool) {
  x.fp64 ? KD_ISA::grams<double>(x, pool) : KD_ISA::grams<float>(x, pool);
}

template <>
void compute<Isa::KD_ISA>(const SpForward& x, const Pool& pool) {
  x.fp64 ? KD_ISA::sp_forward<double>(x, pool) : KD_ISA::sp_forward<float>(x, pool);
}

template <>
void compute<Isa::KD_ISA>(const SpFromGrams& x, const Pool& pool) {
  x.fp64 ? KD_ISA::sp_from_grams<double>(x, pool) : KD_ISA::sp_from_grams<float>(x, pool);
}

template <>
void compute<Isa::KD_ISA>(const SpBackward& x, const Pool& pool) {
  x.fp64 ? KD_ISA::sp_backward<double>(x, pool) : KD_ISA::sp_backward<float>(x, pool);
}

template <>
void compute<Isa::KD_ISA>(const Products& x, const Pool& pool) {
  x.fp64 ? KD_ISA::products<double>(x, pool) : KD_ISA::products<float>(x, pool);
}

template <>
void compute<Isa::KD_ISA>(const CosineForward& x, const Pool& pool) {
  x.fp64 ? KD_ISA::cosine_forward<double>(x, pool) : KD_ISA::cosine_forward<float>(x, pool);
}

template <>
void compute<Isa::KD_ISA>(const CosineBackward& x, const Pool& pool) {
  x.fp64 ? KD_ISA::cosine_backward<double>(x, pool) : KD_ISA::cosine_backward<float>(x, pool);
}

}  // namespace kd
