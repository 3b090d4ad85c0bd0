// From the parts of the raw Gram matrices to the similarity-preserving loss and the gradient matrix W = H + H^T, in one
// launch for all layers. A layer's rows are cut into 64 groups at most, a block each:
//   add up the parts of its rows of K, in place; a warp per row: norms, loss, H
//   of W it makes what meets its rows in those groups that came before it, as the bits of an atomic tell, and in
//   itself, so that of any two groups the later one does what concerns both; the last one adds up the loss
#pragma once

#include "products.cuh"

namespace kd {
namespace cuda {
namespace {

constexpr int kRowThreads = 512;
constexpr int64_t kGroups = 64;  // as many as an atomic has bits

template <typename T>
struct SpTable {
  Parts<T> student[kTables], teacher[kTables];
  double scales[kTables];
  SpOptions options;  // its own scales are on the host
  int64_t first_layer, layers, batch;
  T *h, *gradient_matrix;        // [layers, batch, batch], or both null
  double* losses;                // [layers, batch]
  unsigned long long* counters;  // [layers] bits of the groups that have arrived, [1] blocks that have
  T* loss;
};

__host__ __device__ inline int64_t rows_of_group(int64_t batch) { return ceil_div(batch, kGroups); }

template <typename T>
struct alignas(16) Quad {
  T v[4];
};

// Rows first to end of student's and teacher's K: their parts added up, into the first of them. Slices of the threads
// take every so many-th part, and four columns at a time.
template <typename T>
__device__ void add_parts(const Parts<T>& student, const Parts<T>& teacher, int64_t n, int64_t first, int64_t end) {
  __shared__ Quad<double> of_slice[kRowThreads];
  const int64_t pitch = student.pitch, quads = pitch / 4, items = 2 * (end - first) * quads;
  int slices = 1;
  while (2 * slices * items <= kRowThreads) slices *= 2;
  const int together = kRowThreads / slices, slice = threadIdx.x / together;
  for (int64_t begin = 0; begin < items; begin += together) {
    const int64_t item = begin + threadIdx.x % together, row = first + item / quads / 2;
    const Parts<T>& parts = item / quads % 2 ? teacher : student;
    T* const to = parts.data + row * pitch + item % quads * 4;
    Quad<double> sum{};
    if (item < items)
#pragma unroll 4
      for (int64_t s = slice; s < parts.splits; s += slices) {
        const Quad<T> x = *reinterpret_cast<const Quad<T>*>(to + s * n * pitch);
        for (int i = 0; i < 4; ++i) sum.v[i] += static_cast<double>(x.v[i]);
      }
    of_slice[threadIdx.x] = sum;
    __syncthreads();
    if (slice == 0 && item < items) {
      for (int s = 1; s < slices; ++s)
        for (int i = 0; i < 4; ++i) sum.v[i] += of_slice[threadIdx.x + s * together].v[i];
      Quad<T> total;
      for (int i = 0; i < 4; ++i) total.v[i] = static_cast<T>(sum.v[i]);
      *reinterpret_cast<Quad<T>*>(to) = total;
    }
    __syncthreads();
  }
}

// ||K_i|| by a warp, by way of K / max |K|: squares of large features overflow
template <typename T>
__device__ double row_norm(const T* k, int64_t n, bool l1) {
  const int lane = threadIdx.x % 32;
  T top = 0;
  double sum = 0;
  for (int64_t j = lane; j < n; j += 32) top = Max()(top, static_cast<T>(fabs(k[j])));
  top = reduce_lanes(top, 32, Max());
  const double largest = l1 || top == 0 ? 1.0 : static_cast<double>(top);
  for (int64_t j = lane; j < n; j += 32) {
    const double v = fabs(static_cast<double>(k[j])) / largest;
    sum += l1 ? v : v * v;
  }
  sum = reduce_lanes(sum, 32, Add());
  return l1 ? sum : sqrt(sum) * largest;
}

// Row i of a layer by a warp: its share of the loss, and H's row unless h is null
template <typename T>
__device__ void sp_row(const SpTable<T>& c, double scale, const T* k_s, const T* k_t, double* loss_of_row, T* h) {
  const int lane = threadIdx.x % 32;
  const int64_t n = c.batch;
  const RowNorm s(row_norm(k_s, n, c.options.l1), c.options.eps), t(row_norm(k_t, n, c.options.l1), c.options.eps);
  double loss = 0, inner = 0;
  for (int64_t j = lane; j < n; j += 32) {
    const double g = k_s[j] / s.divisor, difference = g - k_t[j] / t.divisor;
    loss += difference * difference;
    inner += 2 * scale * difference * g;
  }
  loss = reduce_lanes(loss, 32, Add());
  inner = reduce_lanes(inner, 32, Add());
  if (lane == 0) *loss_of_row = scale * loss;
  if (!h) return;
  const ThroughRowNorm through(s, inner, c.options);
  for (int64_t j = lane; j < n; j += 32)
    h[j] = static_cast<T>(through(2 * scale * (k_s[j] / s.divisor - k_t[j] / t.divisor), k_s[j]));
}

// Of W what lies in the rows first to end and the columns of `arrived` groups, and its mirror image
template <typename T>
__device__ void sp_gradient_matrix(const T* h, T* w, int64_t n, int64_t first, int64_t end,
                                   unsigned long long arrived) {
  const int64_t rows = end - first, group = rows_of_group(n);
  for (int64_t at = threadIdx.x; at < n * rows; at += kRowThreads) {
    const int64_t j = at / rows, i = first + at % rows;
    const bool own = j >= first && j < end;
    if (!own && !(arrived >> (j / group) & 1)) continue;
    const T sum = __ldcg(h + i * n + j) + __ldcg(h + j * n + i);
    w[i * n + j] = sum;
    if (!own) w[j * n + i] = sum;
  }
}

template <typename T>
__device__ void sp_sum(const double* losses, int64_t count, T* out) {
  __shared__ double shared[32];
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kRowThreads) sum += __ldcg(losses + i);
  sum = reduce_block(sum, shared, 0.0, Add());
  if (threadIdx.x == 0) *out = static_cast<T>(sum);
}

// A block per (layer, group of rows)
template <typename T>
__global__ void __launch_bounds__(kRowThreads) sp_loss_kernel(const __grid_constant__ SpTable<T> c) {
  __shared__ unsigned long long before;
  __shared__ bool last_of_all;
  const int64_t n = c.batch, group = rows_of_group(n), groups = ceil_div(n, group);
  const int64_t mine = blockIdx.x % groups, first = mine * group, end = min(n, first + group);
  const int64_t item = blockIdx.x / groups, layer = c.first_layer + item;
  const Parts<T>&k_s = c.student[item], &k_t = c.teacher[item];
  if (k_s.splits > 1 || k_t.splits > 1) add_parts(k_s, k_t, n, first, end);
  double* const losses = c.losses + layer * n;
  T* const h = c.h ? c.h + layer * n * n : nullptr;
  for (int64_t i = first + threadIdx.x / 32; i < end; i += kRowThreads / 32)
    sp_row(c, c.scales[item], k_s.data + i * k_s.pitch, k_t.data + i * k_t.pitch, losses + i, h ? h + i * n : nullptr);
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    before = atomicOr(c.counters + layer, 1ull << mine);
    const unsigned blocks = static_cast<unsigned>(c.layers * groups);
    last_of_all = atomicInc(reinterpret_cast<unsigned*>(c.counters + c.layers), blocks - 1) == blocks - 1;
  }
  __syncthreads();
  __threadfence();
  if (h) sp_gradient_matrix(h, c.gradient_matrix + layer * n * n, n, first, end, before);
  if (c.options.per_layer && __popcll(before) == groups - 1) sp_sum(losses, n, c.loss + layer);
  if (!c.options.per_layer && last_of_all) sp_sum(c.losses, c.layers * n, c.loss);
}

}  // namespace
}  // namespace cuda
}  // namespace kd
