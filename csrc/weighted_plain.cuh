// Weighted sums of rows in fp64: a block per tile of 64 x 64, 4 x 4 numbers to a thread.
#pragma once

#include "weighted.cuh"

namespace kd {
namespace cuda {
namespace {

constexpr int kPlainThreads = 256, kPlainSide = 64, kPlainDepth = 16;

__global__ void __launch_bounds__(kPlainThreads)
    plain_weighted_kernel(const __grid_constant__ WeightedTable<double> table) {
  __shared__ double tile_w[kPlainDepth][kPlainSide + 1], tile_q[kPlainDepth][kPlainSide];
  __shared__ RowFacts<double> facts[kPlainSide];
  const int item = item_of(table, blockIdx.x);
  const Weighted<double>& p = table.items[item];
  const int64_t block = blockIdx.x - table.first_block[item], rows = ceil_div(p.own.count, kPlainSide);
  const int64_t row = block % rows * kPlainSide, column = block / rows * kPlainSide;
  const int x = threadIdx.x % 16, y = threadIdx.x / 16;
  double sum[4][4] = {};
  row_facts<false, kPlainSide, kPlainThreads>(p, row, facts);
  for (int64_t k = 0; k < p.q.count; k += kPlainDepth) {
    __syncthreads();
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int64_t i = row + y + 16 * r, j = column + x + 16 * r;
      tile_w[x][y + 16 * r] = i < p.own.count && k + x < p.q.count ? p.weight(i, k + x) : 0.0;
      const bool inside = k + y < p.q.count && j < p.q.width;
      tile_q[y][x + 16 * r] = inside ? element<double>(p.q.type, p.q.data, (k + y) * p.q.stride + j) : 0.0;
    }
    __syncthreads();
#pragma unroll
    for (int d = 0; d < kPlainDepth; ++d)
#pragma unroll
      for (int r = 0; r < 4; ++r)
#pragma unroll
        for (int c = 0; c < 4; ++c) sum[r][c] += tile_w[d][y + 16 * r] * tile_q[d][x + 16 * c];
  }
  __syncthreads();
#pragma unroll
  for (int r = 0; r < 4; ++r)
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int64_t i = row + y + 16 * r, j = column + x + 16 * c;
      if (i >= p.own.count || j >= p.own.width) continue;
      const double own = p.inverse ? element<double>(p.own.type, p.own.data, i * p.own.stride + j) : 0.0;
      store<double>(p.own.type, p.out, i * p.own.width + j, finished(p, facts[y + 16 * r], sum[r][c], own));
    }
}

// Starts the launch for a table whose items and count are set: by the type of its rows, in tiles that suit their
// number.
inline void weighted(WeightedTable<double>& table, cudaStream_t stream) {
  set_blocks(table, kPlainSide, int64_t(1) << 62);  // a tile to a block
  if (table.first_block[table.count] == 0) return;
  plain_weighted_kernel<<<table.first_block[table.count], kPlainThreads, 0, stream>>>(table);
  check_launch("gram weighted sum in fp64");
}

inline void weighted(WeightedTable<float>& table, cudaStream_t stream) {
  Rows rows[2 * kTables];
  int64_t tiles = 0;
  for (int i = 0; i < table.count; ++i) {
    rows[2 * i] = table.items[i].q;
    rows[2 * i + 1] = table.items[i].own;
    const Rows& own = table.items[i].own;
    if (own.count > 64) tiles += ceil_div(own.count, 128) * ceil_div(own.width, 128);
  }
  const auto with_side = [&](auto number) {
    using N = decltype(number);
    tiles >= kMultiprocessors ? start_weighted<N, 128>(table, stream) : start_weighted<N, 64>(table, stream);
  };
  const DType type = common_type(rows, 2 * table.count);
  if (type == DType::bf16) return with_side(__nv_bfloat16());
  type == DType::f16 ? with_side(__half()) : with_side(float());
}

}  // namespace
}  // namespace cuda
}  // namespace kd
