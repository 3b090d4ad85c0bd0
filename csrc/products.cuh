// The two matrix products of gram.cu: inner products of rows (A B^T, or half of A A^T) and weighted sums of rows (W Q).
#pragma once

#include "arithmetic.h"
#include "cuda.h"

namespace kd {
namespace cuda {
namespace {

constexpr int64_t kTables = 16;  // matrices or layers of a launch; their table is passed by value
constexpr int kTile = 64, kDepth = 16, kThreads = 256;  // each thread makes 4 x 4 of a tile's numbers
constexpr int kRowThreads = 128;                        // of a block for a row
// Eight per multiprocessor of an H100: a constant, so that sums do not depend on the GPU.
constexpr int kWantedBlocks = 1056;

// ---- inner products of rows ----

struct Factors {
  Rows a, b;
  bool symmetric;
  int64_t partial;  // where the [splits, a.count, b.count] partial products start
};

struct ProductTable {
  Factors items[kTables];
  int64_t first_block[kTables + 1];
  int count, splits;
};

template <typename Table>
__device__ inline int item_of(const Table& table, int64_t block) {
  int i = 0;
  while (i + 1 < table.count && block >= table.first_block[i + 1]) ++i;
  return i;
}

__host__ __device__ inline int64_t tiles_of(const Factors& p) {
  const int64_t rows = ceil_div(p.a.count, kTile), columns = ceil_div(p.b.count, kTile);
  return p.symmetric ? rows * (rows + 1) / 2 : rows * columns;
}

template <typename T>
__device__ inline T entry(const Rows& q, int64_t row, int64_t column, int64_t end) {
  return row < q.count && column < end ? element<T>(q.type, q.data, row * q.stride + column) : T(0);
}

template <typename T>
__global__ void __launch_bounds__(kThreads) product_kernel(const __grid_constant__ ProductTable table, T* partial) {
  __shared__ T tile_a[kDepth][kTile + 1], tile_b[kDepth][kTile + 1];
  const int i = item_of(table, blockIdx.x);
  const Factors& p = table.items[i];
  const int64_t block = blockIdx.x - table.first_block[i], split = block % table.splits;
  int64_t tile = block / table.splits, row = 0, column = 0;
  if (p.symmetric) {
    while (tile > row) tile -= ++row;  // row r of the lower triangle has r + 1 tiles
    column = tile;
  } else {
    const int64_t columns = ceil_div(p.b.count, kTile);
    row = tile / columns;
    column = tile % columns;
  }
  row *= kTile;
  column *= kTile;
  const int64_t step = ceil_div(ceil_div(p.a.width, table.splits), kDepth) * kDepth;
  const int64_t begin = split * step, end = min(p.a.width, begin + step);
  const int x = threadIdx.x % 16, y = threadIdx.x / 16;  // also the column and the row of what a thread reads
  T sum[4][4] = {};
  for (int64_t k = begin; k < end; k += kDepth) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      tile_a[x][y + 16 * r] = entry<T>(p.a, row + y + 16 * r, k + x, end);
      tile_b[x][y + 16 * r] = entry<T>(p.b, column + y + 16 * r, k + x, end);
    }
    __syncthreads();
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
      T a[4], b[4];
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        a[r] = tile_a[d][y + 16 * r];
        b[r] = tile_b[d][x + 16 * r];
      }
#pragma unroll
      for (int r = 0; r < 4; ++r)
#pragma unroll
        for (int c = 0; c < 4; ++c) sum[r][c] += a[r] * b[c];
    }
    __syncthreads();
  }
  T* out = partial + p.partial + split * p.a.count * p.b.count;
#pragma unroll
  for (int r = 0; r < 4; ++r)
#pragma unroll
    for (int c = 0; c < 4; ++c)
      if (row + y + 16 * r < p.a.count && column + x + 16 * c < p.b.count)
        out[(row + y + 16 * r) * p.b.count + column + x + 16 * c] = sum[r][c];
}

// How many parts the columns are cut into: enough blocks for a large GPU, of 128 columns at least, and of 4096 at most,
// as what two Grams differ by would drown in the rounding of longer fp32 sums.
inline int splits_for(int64_t tiles, int64_t width) {
  const int64_t wanted = ceil_div(kWantedBlocks, max<int64_t>(tiles, 1)), room = ceil_div(width, 128);
  const int64_t useful = max<int64_t>(1, min<int64_t>(min(wanted, room), 64));
  return static_cast<int>(max(ceil_div(width, 4096), useful));
}

template <typename T>
void start_products(ProductTable& table, T* partial, cudaStream_t stream) {
  for (int i = 0; i < table.count; ++i)
    table.first_block[i + 1] = table.first_block[i] + tiles_of(table.items[i]) * table.splits;
  if (table.first_block[table.count] == 0) return;
  product_kernel<T><<<table.first_block[table.count], kThreads, 0, stream>>>(table, partial);
  check_launch("gram product");
}

// Entry (i, j) of a product: its splits, summed.
template <typename T>
__device__ inline double product_at(const T* partial, int64_t size, int splits, int64_t at) {
  double sum = 0;
  for (int k = 0; k < splits; ++k) sum += static_cast<double>(partial[k * size + at]);
  return sum;
}

// ---- weighted sums of rows ----

// out_i = sum_k W_ik q_k; with `inverse`, out_i = inverse_i (that - inner_i inverse_i own_i)
template <typename T>
struct Weighted {
  const T* w;  // W_ik = w[i * row_stride + k * column_stride] (* column_scale[k]) (* *factor)
  int64_t row_stride, column_stride;
  const T *column_scale, *factor;
  Rows q, own;
  const T* inverse;
  const double* inner;
  void* out;  // dense rows of own's dtype
};

template <typename T>
struct WeightedTable {
  Weighted<T> items[kTables];
  int64_t first_block[kTables + 1];
  int count;
};

template <typename T>
__global__ void __launch_bounds__(kThreads) weighted_kernel(const __grid_constant__ WeightedTable<T> table) {
  __shared__ T tile_w[kDepth][kTile + 1], tile_q[kDepth][kTile];
  const int i = item_of(table, blockIdx.x);
  const Weighted<T>& p = table.items[i];
  const int64_t block = blockIdx.x - table.first_block[i], rows = ceil_div(p.own.count, kTile);
  const int64_t row = block % rows * kTile, column = block / rows * kTile;
  const int x = threadIdx.x % 16, y = threadIdx.x / 16;
  const T factor = p.factor ? *p.factor : T(1);
  T sum[4][4] = {};
  for (int64_t k = 0; k < p.q.count; k += kDepth) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int64_t at = row + y + 16 * r;
      T w = 0;
      if (at < p.own.count && k + x < p.q.count) {
        w = p.w[at * p.row_stride + (k + x) * p.column_stride] * factor;
        if (p.column_scale) w *= p.column_scale[k + x];
      }
      tile_w[x][y + 16 * r] = w;
      tile_q[y][x + 16 * r] = entry<T>(p.q, k + y, column + x + 16 * r, p.q.width);
    }
    __syncthreads();
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
      T w[4], q[4];
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        w[r] = tile_w[d][y + 16 * r];
        q[r] = tile_q[d][x + 16 * r];
      }
#pragma unroll
      for (int r = 0; r < 4; ++r)
#pragma unroll
        for (int c = 0; c < 4; ++c) sum[r][c] += w[r] * q[c];
    }
    __syncthreads();
  }
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const int64_t at = row + y + 16 * r;
    if (at >= p.own.count) continue;
    T scale = 1, along = 0;
    if (p.inverse) {
      scale = p.inverse[at];
      along = along_row(p.inner[at], scale);
    }
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int64_t to = column + x + 16 * c;
      if (to >= p.own.width) continue;
      T value = sum[r][c];
      if (p.inverse) value = (value - along * element<T>(p.own.type, p.own.data, at * p.own.stride + to)) * scale;
      store<T>(p.own.type, p.out, at * p.own.width + to, value);
    }
  }
}

template <typename T>
void start_weighted(WeightedTable<T>& table, cudaStream_t stream) {
  for (int i = 0; i < table.count; ++i) {
    const Rows& own = table.items[i].own;
    table.first_block[i + 1] = table.first_block[i] + ceil_div(own.count, kTile) * ceil_div(own.width, kTile);
  }
  if (table.first_block[table.count] == 0) return;
  weighted_kernel<T><<<table.first_block[table.count], kThreads, 0, stream>>>(table);
  check_launch("gram weighted sum");
}

}  // namespace
}  // namespace cuda
}  // namespace kd
