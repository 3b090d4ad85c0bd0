// Products and cosines of rows, for gram.cu.
#pragma once

#include "products.cuh"

namespace kd {
namespace cuda {
namespace {

// A block per row of a, then of b: its squared norm, or 1 / max(|row|, 1e-8)
template <typename T>
__global__ void square_kernel(const Rows a, const Rows b, bool inverse, T* out_a, T* out_b) {
  __shared__ double shared[32];
  const bool second = blockIdx.x >= a.count;
  const Rows& q = second ? b : a;
  const int64_t i = second ? blockIdx.x - a.count : blockIdx.x;
  double sum = 0;
  for (int64_t k = threadIdx.x; k < q.width; k += blockDim.x) {
    const double v = static_cast<double>(element<T>(q.type, q.data, i * q.stride + k));
    sum += v * v;
  }
  sum = reduce_block(sum, shared, 0.0, Add());
  if (threadIdx.x == 0) (second ? out_b : out_a)[i] = static_cast<T>(inverse ? inverse_norm(sum) : sum);
}

// The splits summed, and times the inverse norms unless these are null
template <typename T>
__global__ void product_sum_kernel(const T* partial, int splits, int64_t n, int64_t m, const T* inverse_a,
                                   const T* inverse_b, T* out) {
  const int64_t at = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (at >= n * m) return;
  double value = product_at(partial, n * m, splits, at);
  if (inverse_a) value *= double(inverse_a[at / m]) * double(inverse_b[at % m]);
  out[at] = static_cast<T>(value);
}

inline int product_splits(const Rows& a, const Rows& b) { return splits_for(tiles_of({a, b, false, 0}), a.width); }

template <typename T>
void start_row_products(const Rows& a, const Rows& b, bool cosines, void* workspace, void* of_a, void* of_b, void* out,
                        cudaStream_t stream) {
  const int64_t n = a.count, m = b.count;
  if (n + m == 0) return;
  T *row_a = static_cast<T*>(of_a), *row_b = static_cast<T*>(of_b), *partial = static_cast<T*>(workspace);
  square_kernel<T><<<n + m, kRowThreads, 0, stream>>>(a, b, cosines, row_a, row_b);
  check_launch("gram squares");
  if (n * m == 0) return;
  ProductTable table{};
  table.count = 1;
  table.splits = product_splits(a, b);
  table.items[0] = {a, b, false, 0};
  start_products(table, partial, stream);
  product_sum_kernel<T><<<ceil_div(n * m, kThreads), kThreads, 0, stream>>>(
      partial, table.splits, n, m, cosines ? row_a : nullptr, cosines ? row_b : nullptr, static_cast<T*>(out));
  check_launch("gram product sum");
}

template <typename T>
void products(const Products& x, cudaStream_t stream) {
  start_row_products<T>(x.a, x.b, false, x.workspace, x.squares_a, x.squares_b, x.products, stream);
}

template <typename T>
void cosine_forward(const CosineForward& x, cudaStream_t stream) {
  start_row_products<T>(x.a, x.b, true, x.workspace, x.inverse_a, x.inverse_b, x.similarity, stream);
}

// A block per row, then per column, of dS * S: its sum
template <typename T>
__global__ void inner_kernel(const T* grad, const T* similarity, int64_t n, int64_t m, double* inner) {
  __shared__ double shared[32];
  const bool column = blockIdx.x >= n;
  const int64_t first = column ? blockIdx.x - n : blockIdx.x * m, step = column ? m : 1, count = column ? n : m;
  double sum = 0;
  for (int64_t k = threadIdx.x; k < count; k += blockDim.x)
    sum += double(grad[first + k * step]) * double(similarity[first + k * step]);
  sum = reduce_block(sum, shared, 0.0, Add());
  if (threadIdx.x == 0) inner[blockIdx.x] = sum;
}

template <typename T>
const T* numbers(const void* data) {
  return static_cast<const T*>(data);
}

template <typename T>
void cosine_backward(const CosineBackward& x, cudaStream_t stream) {
  const int64_t n = x.a.count, m = x.b.count;
  if (n + m == 0) return;
  double* inner = static_cast<double*>(x.workspace);
  inner_kernel<T><<<n + m, kRowThreads, 0, stream>>>(numbers<T>(x.grad), numbers<T>(x.similarity), n, m, inner);
  check_launch("cosine inner products");
  WeightedTable<T> table{};
  table.count = 2;
  Weighted<T>&a = table.items[0], &b = table.items[1];
  a.w = b.w = numbers<T>(x.grad);
  a.row_stride = b.column_stride = m;
  a.column_stride = b.row_stride = 1;
  a.own = b.q = x.a;
  b.own = a.q = x.b;
  a.inverse = b.column_scale = numbers<T>(x.inverse_a);
  b.inverse = a.column_scale = numbers<T>(x.inverse_b);
  a.inner = inner;
  b.inner = inner + n;
  a.out = x.grad_a;
  b.out = x.grad_b;
  start_weighted(table, stream);
}

}  // namespace
}  // namespace cuda
}  // namespace kd
