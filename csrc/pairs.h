// Numbers of all pairs of a batch's rows, for gram.cpp and relation.cpp: Gram matrices and squared distances.
#pragma once

#include "short_rows.h"

namespace kd {
namespace KD_ISA {
namespace {

constexpr int64_t kPartMemory = int64_t(1) << 26;  // bytes of partial matrices at most

// The number of parts that the columns are cut into: a function of the shapes and the thread count alone
inline int64_t column_parts(const Rows* features, int64_t count, int64_t stride, const Pool& pool) {
  int64_t width = 1;
  for (int64_t i = 0; i < count; ++i) width = max(width, features[i].width);
  const int64_t wanted = ceil_div(4 * pool.threads, count);
  const int64_t room = kPartMemory / (count * stride * stride * 8 + 1);
  return max<int64_t>(1, min(min(wanted, room), ceil_div(width, 256)));
}

// A symmetric matrix of every feature, [count, batch, batch], that is a sum over columns:
// part(q, begin, end, out, stride) makes its lower half of columns [begin, end)
template <typename Out, typename F>
void pair_matrices(const Rows* features, int64_t count, int64_t batch, const Pool& pool, const F& part_of, Out* out) {
  if (batch == 0) return;
  const int64_t stride = round_up(batch, kTile), size = stride * stride;
  const int64_t parts = column_parts(features, count, stride, pool);
  Buffer<double> partial(count * parts * size);
  double* k = partial;
  parallel(pool, count * parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t matrix = task % count, part = task / count;  // every thread gets some of every matrix
      const Rows& q = features[matrix];
      const int64_t step = round_up(ceil_div(q.width, parts), 64);
      part_of(q, min(q.width, part * step), min(q.width, (part + 1) * step), k + (matrix * parts + part) * size,
              stride);
    }
  });
  // sum the parts and mirror them, some rows at a time: a column's numbers are cache lines apart
  constexpr int64_t kBlock = 16;
  const int64_t blocks = ceil_div(batch, kBlock);
  parallel(pool, count * blocks, kSmall / (kBlock * batch * parts), [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t matrix = task / blocks, first = task % blocks * kBlock, last = min(batch, first + kBlock);
      Out* to = out + matrix * batch * batch;
      for (int64_t i = first; i < last; ++i) {
        double* sum = k + matrix * parts * size + i * stride;
        for (int64_t part = 1; part < parts; ++part)
#pragma omp simd
          for (int64_t j = 0; j <= i; ++j) sum[j] += sum[part * size + j];
        for (int64_t j = 0; j <= i; ++j) to[i * batch + j] = static_cast<Out>(sum[j]);
      }
      for (int64_t j = 0; j < last; ++j)
        for (int64_t i = max(first, j + 1); i < last; ++i) to[j * batch + i] = to[i * batch + j];
    }
  });
}

// K = Q Q^T of every matrix
template <typename T, typename Out>
void raw_grams(const Rows* features, int64_t count, int64_t batch, const Pool& pool, Out* grams) {
  pair_matrices(
      features, count, batch, pool,
      [&](const Rows& q, int64_t begin, int64_t end, double* out, int64_t stride) {
        inner_products<T>(q, 0, batch, q, true, begin, end, out, stride);
      },
      grams);
}

// |q_i - q_j|^2 of every matrix
template <typename T, typename Out>
void squared_distances(const Rows* features, int64_t count, int64_t batch, const Pool& pool, Out* distances) {
  pair_matrices(
      features, count, batch, pool,
      [&](const Rows& q, int64_t begin, int64_t end, double* out, int64_t stride) {
        inner_products_as<T, SquaredDistances>(q, 0, batch, q, true, begin, end, out, stride);
      },
      distances);
}

// ---- work on B x B matrices ----

inline double total(const double* x, int64_t n) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += x[i];
  return sum;
}

// Rows of B x B work, `cost` simple operations each
template <typename F>
void over_rows(const Pool& pool, int64_t n, int64_t cost, const F& row) {
  parallel(pool, n, kSmall / (cost + 1), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) row(i);
  });
}

// row(i, values) with row i of H + H^T, which it may change
template <typename F>
void over_symmetrised(const Pool& pool, int64_t n, const double* h, const F& row) {
  constexpr int64_t kBlock = 16;  // rows at a time: a column's numbers would be cache lines apart
  parallel(pool, ceil_div(n, kBlock), kSmall / (4 * kBlock * n + 1), [&](int64_t begin, int64_t end) {
    Buffer<double> buffer(kBlock * n);
    double* both = buffer;
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kBlock, count = min(kBlock, n - first);
      for (int64_t j = 0; j < n; ++j)
        for (int64_t r = 0; r < count; ++r) both[r * n + j] = h[(first + r) * n + j] + h[j * n + first + r];
      for (int64_t r = 0; r < count; ++r) row(first + r, both + r * n);
    }
  });
}

}  // namespace
}  // namespace KD_ISA
}  // namespace kd
