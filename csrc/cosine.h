// Products and cosines of rows, for gram.cpp.
#pragma once

#include "short_rows.h"

namespace kd {
namespace KD_ISA {
namespace {

// out_i = finish(||q_i||^2)
template <typename T, typename F>
void row_squares(const Rows& q, const Pool& pool, const F& finish, T* out) {
  parallel(pool, q.count, kSmall / (q.width + 1), [&](int64_t begin, int64_t end) {
    Buffer<T> buffer(q.width);
    for (int64_t i = begin; i < end; ++i) {
      const T* x = load<T>(q.type, q.data, i * q.stride, q.width, buffer);
      double sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t k = 0; k < q.width; ++k) sum += double(x[k]) * double(x[k]);
      out[i] = static_cast<T>(finish(sum));
    }
  });
}

// out_ij = finish(i, j, <a_i, b_j>)
template <typename T, typename F>
void row_products(const Rows& a, const Rows& b, const Pool& pool, const F& finish, T* out) {
  const int64_t n = a.count, m = b.count, stride = round_up(m, kTile);
  if (n == 0 || m == 0) return;
  const int64_t threads = n * m * a.width < 2 * kProducts ? 1 : pool.threads;
  const int64_t step = round_up(ceil_div(n, threads), kTile);
  parallel(pool, ceil_div(n, step), 1, [&](int64_t begin, int64_t end) {
    Buffer<double> products(step * stride);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task * step, count = min(step, n - first);
      inner_products<T>(a, first, count, b, false, 0, a.width, products, stride);
      for (int64_t i = 0; i < count; ++i)
        for (int64_t j = 0; j < m; ++j)
          out[(first + i) * m + j] = static_cast<T>(finish(first + i, j, products[i * stride + j]));
    }
  });
}

template <typename T>
void products(const Products& x, const Pool& pool) {
  const auto same = [](double square) { return square; };
  row_squares(x.a, pool, same, static_cast<T*>(x.squares_a));
  row_squares(x.b, pool, same, static_cast<T*>(x.squares_b));
  row_products(x.a, x.b, pool, [](int64_t, int64_t, double product) { return product; }, static_cast<T*>(x.products));
}

template <typename T>
void cosine_forward(const CosineForward& x, const Pool& pool) {
  T *inverse_a = static_cast<T*>(x.inverse_a), *inverse_b = static_cast<T*>(x.inverse_b);
  row_squares(x.a, pool, inverse_norm, inverse_a);
  row_squares(x.b, pool, inverse_norm, inverse_b);
  row_products(
      x.a, x.b, pool,
      [&](int64_t i, int64_t j, double product) { return product * double(inverse_a[i]) * double(inverse_b[j]); },
      static_cast<T*>(x.similarity));
}

// One side of the backward pass: out_i = inverse_i (sum_k W_ik q_k - inner_i inverse_i x_i)
template <typename T, typename F>
void cosine_side(const Pool& pool, const F& weight, const Rows& q, const Rows& x, const T* inverse, const double* inner,
                 void* out) {
  Buffer<T> packed(round_up(x.count, kTall) * q.count);
  pack_weights<T>(x.count, q.count, weight, packed);
  const T* w = packed;
  weighted_rows<T>(pool, w, x.count, q, [&](int64_t row, int64_t column, int64_t width, T* values) {
    T buffer[512];  // weighted_slice() is no more
    const T* own = load<T>(x.type, x.data, row * x.stride + column, width, buffer);
    const T i = inverse[row], along = along_row(inner[row], i);
#pragma omp simd
    for (int64_t k = 0; k < width; ++k) values[k] = (values[k] - along * own[k]) * i;
    store<T>(x.type, out, row * x.width + column, width, values);
  });
}

template <typename T>
void cosine_backward(const CosineBackward& x, const Pool& pool) {
  const int64_t n = x.a.count, m = x.b.count;
  const T *grad = static_cast<const T*>(x.grad), *similarity = static_cast<const T*>(x.similarity);
  const T *inverse_a = static_cast<const T*>(x.inverse_a), *inverse_b = static_cast<const T*>(x.inverse_b);
  Buffer<double> inner(n + m);
  double *inner_a = inner, *inner_b = inner_a + n;
  for (int64_t i = 0; i < n + m; ++i) inner_a[i] = 0;
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < m; ++j) {
      const double product = double(grad[i * m + j]) * double(similarity[i * m + j]);
      inner_a[i] += product;
      inner_b[j] += product;
    }
  cosine_side<T>(
      pool, [&](int64_t i, int64_t j) { return grad[i * m + j] * inverse_b[j]; }, x.b, x.a, inverse_a, inner_a,
      x.grad_a);
  cosine_side<T>(
      pool, [&](int64_t j, int64_t i) { return grad[i * m + j] * inverse_a[i]; }, x.a, x.b, inverse_b, inner_b,
      x.grad_b);
}

}  // namespace
}  // namespace KD_ISA
}  // namespace kd
