// Products and cosines of rows on CUDA, one launch forward and one backward. Forward a block makes a tile of a part of
// the columns, and the squares of the tile's rows with it; of a tile's blocks the last one adds up the parts in their
// order.
#pragma once

#include "weighted_plain.cuh"

namespace kd {
namespace cuda {
namespace {

// ---- forward ----

template <typename T>
struct PairTable {
  Factors rows;
  int64_t columns, splits;
  T* parts;           // [tiles, splits, (side + 2) * side]: products, squares of a's rows and of b's
  unsigned* arrived;  // [tiles], 0
  T *of_a, *of_b, *out;
  bool cosines;  // else out, of_a and of_b are products and squares as they are
};

template <typename T>
__device__ double sum_of_parts(const T* first, int64_t size, int64_t splits) {
  double sum = 0;
#pragma unroll 4
  for (int64_t s = 0; s < splits; ++s) sum += static_cast<double>(__ldcg(first + s * size));
  return sum;
}

// By one block: what the tile's parts add up to.
template <typename T, int SIDE>
__device__ void finish_tile(const PairTable<T>& x, const T* parts, const Part& part) {
  constexpr int64_t kSize = (SIDE + 2) * SIDE;
  __shared__ double of_row[2 * SIDE];
  const int64_t n = x.rows.a.count, m = x.rows.b.count;
  for (int i = threadIdx.x; i < 2 * SIDE; i += blockDim.x) {
    const double square = sum_of_parts(parts + SIDE * SIDE + i, kSize, x.splits);
    const T value = static_cast<T>(x.cosines ? inverse_norm(square) : square);
    of_row[i] = static_cast<double>(value);
    if (i < SIDE && part.column == 0 && part.row + i < n) x.of_a[part.row + i] = value;
    if (i >= SIDE && part.row == 0 && part.column + i - SIDE < m) x.of_b[part.column + i - SIDE] = value;
  }
  __syncthreads();
  for (int at = threadIdx.x; at < SIDE * SIDE; at += blockDim.x) {
    const int row = at / SIDE, column = at % SIDE;
    if (part.row + row >= n || part.column + column >= m) continue;
    double value = sum_of_parts(parts + at, kSize, x.splits);
    if (x.cosines) value *= of_row[row] * of_row[SIDE + column];
    x.out[(part.row + row) * m + part.column + column] = static_cast<T>(value);
  }
}

template <typename Loop>
__global__ void __launch_bounds__(Loop::kThreads, Loop::kResident)
    pair_kernel(const __grid_constant__ PairTable<typename Loop::Sum> x) {
  extern __shared__ __align__(16) char shared[];
  __shared__ bool last;
  using T = typename Loop::Sum;
  constexpr int kSide = Loop::kSide;
  constexpr int64_t kSize = (kSide + 2) * kSide;
  const int64_t tiles = tiles_of(x.rows, kSide), tile = blockIdx.x % tiles, split = blockIdx.x / tiles;
  Part part = corner(x.rows, tile, kSide);
  part.begin = split * x.columns;
  part.end = min(x.rows.a.width, part.begin + x.columns);
  Loop loop;
  loop.template run<true>(x.rows, part, shared);
  T *parts = x.parts + tile * x.splits * kSize, *mine = parts + split * kSize;
  loop.each([&](int row, int column, T first, T second) {
    mine[row * kSide + column] = first;
    mine[row * kSide + column + 1] = second;
  });
  loop.each_square([&](bool of_b, int row, T square) { mine[kSide * kSide + (of_b ? kSide : 0) + row] = square; });
  if (x.splits > 1) {
    const unsigned blocks = static_cast<unsigned>(x.splits);
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) last = atomicInc(x.arrived + tile, blocks - 1) == blocks - 1;
    __syncthreads();
    if (!last) return;
    __threadfence();
  } else {
    __syncthreads();
  }
  finish_tile<T, kSide>(x, parts, part);
}

// Tiles, parts and scratch memory of a pair of matrices.
struct PairLayout {
  int64_t side, tiles, columns, splits;
  PairLayout(const Rows& a, const Rows& b, bool fp64) {
    const Factors p{a, b, false, false};
    side = !fp64 && tiles_of(p, 128) >= kMultiprocessors ? 128 : 64;
    tiles = tiles_of(p, side);
    columns = part_columns(tiles * a.width, (side == 128 ? 1 : 2) * kMultiprocessors, 64);
    columns = max(columns, round_up(ceil_div(a.width, 32), 64));  // one block adds up a tile's parts
    splits = max<int64_t>(1, ceil_div(a.width, columns));
  }
  int64_t numbers() const { return tiles * splits * (side + 2) * side; }
  int64_t bytes(int64_t size) const { return numbers() * size + 4 * tiles; }
};

template <typename T>
void row_products(const Rows& a, const Rows& b, bool cosines, void* workspace, void* of_a, void* of_b, void* out,
                  cudaStream_t stream) {
  if (a.count + b.count == 0) return;
  const PairLayout layout(a, b, sizeof(T) == 8);
  T* const parts = static_cast<T*>(workspace);
  unsigned* const arrived = reinterpret_cast<unsigned*>(parts + layout.numbers());
  if (layout.splits > 1) check(cudaMemsetAsync(arrived, 0, 4 * layout.tiles, stream), "gram counters");
  const Rows both[] = {a, b};
  with_loop(common_type(both, 2), sizeof(T) == 8, layout.side == 128, [&](auto choice) {
    using Loop = typename decltype(choice)::Loop;
    if constexpr (sizeof(T) == sizeof(typename Loop::Sum)) {
      const bool whole = in_whole_chunks<typename Loop::Number>(a) && in_whole_chunks<typename Loop::Number>(b);
      const PairTable<T> table{{a, b, false, whole},  layout.columns,        layout.splits,        parts,  arrived,
                               static_cast<T*>(of_a), static_cast<T*>(of_b), static_cast<T*>(out), cosines};
      allow_shared(pair_kernel<Loop>, Loop::kShared);
      pair_kernel<Loop><<<layout.tiles * layout.splits, Loop::kThreads, Loop::kShared, stream>>>(table);
      check_launch("gram products of rows");
    }
  });
}

// ---- backward ----

template <typename T>
const T* numbers(const void* data) {
  return static_cast<const T*>(data);
}

template <typename T>
void cosine_backward(const CosineBackward& x, cudaStream_t stream) {
  WeightedTable<T> table{};
  table.count = 2;
  Weighted<T>&a = table.items[0], &b = table.items[1];
  a.w = b.w = numbers<T>(x.grad);
  a.similarity = b.similarity = numbers<T>(x.similarity);
  a.row_stride = b.column_stride = x.b.count;
  a.column_stride = b.row_stride = 1;
  a.own = b.q = x.a;
  b.own = a.q = x.b;
  a.inverse = b.column_scale = numbers<T>(x.inverse_a);
  b.inverse = a.column_scale = numbers<T>(x.inverse_b);
  a.out = x.grad_a;
  b.out = x.grad_b;
  weighted(table, stream);
}

}  // namespace
}  // namespace cuda
}  // namespace kd
