// Weighted sums of rows, W Q: what goes back through Gram matrices and cosines. One launch for all layers.
//
// A block has 64 or 128 rows of W, of which up to 256 columns stay in shared memory, and goes over several tiles of Q's
// columns, so that Q streams through a pipeline 16 bytes at a time and W is loaded once. W is fp32 and must not be
// rounded to half precision: it becomes two numbers of Q's type, or of tf32 in place of fp32.
#pragma once

#include "weights.cuh"

namespace kd {
namespace cuda {
namespace {

template <typename N, int SIDE>
class WeightedBlock {
 public:
  static constexpr int kThreads = WarpPart<SIDE>::kThreads, kStages = 5, kResident = SIDE == 128 ? 1 : 3;
  static constexpr int kDepth = 64 / int(sizeof(N)), kRowBytes = SIDE * int(sizeof(N)),
                       kStageBytes = kDepth * kRowBytes;
  static constexpr int kPitch = 40, kStaging = kThreads / 32 * 16 * kPitch * 4;  // 16 rows of 32 sums of each warp
  static constexpr int kFixed = kStages * kStageBytes + kStaging + SIDE * int(sizeof(RowFacts<float>));

  static int shared(int resident) { return SIDE * resident * 4 + kFixed; }

  __device__ WeightedBlock(const Weighted<float>& p, int resident, int64_t row, char* shared)
      : p_(p),
        resident_(resident),
        row_(row),
        stages_(shared),
        staging_(shared + kStages * kStageBytes),
        facts_(reinterpret_cast<RowFacts<float>*>(staging_ + kStaging)),
        weights_(shared + kFixed) {}

  // Tiles `first` to `end` of Q's columns
  __device__ void run(int64_t first, int64_t end) {
    int64_t depth = 0, tile = first;  // that are loaded next
    const auto load = [&](int slot) {
      if (tile < end)
        load_rows<N, kDepth, kRowBytes / 16, kThreads>(stage(slot), p_.q, p_.whole_q, depth, tile * SIDE, p_.q.width);
      copy_async_commit();
      depth += kDepth;
      if (depth >= p_.q.count) depth = 0, ++tile;
    };
    for (int slot = 0; slot < kStages - 1; ++slot) load(slot);
    row_facts<kTypeOf<N> == DType::f16, SIDE, kThreads>(p_, row_, facts_);
    int slot = 0;
    for (int64_t of = first; of < end; ++of) {
      for (int64_t k = 0; k == 0 || k < p_.q.count; k += kDepth) {
        copy_async_wait<kStages - 2>();
        __syncthreads();  // this stage is there, and nobody reads the one that is loaded next, nor the weights
        load(slot ? slot - 1 : kStages - 1);
        if (k % resident_ == 0 && (p_.q.count > resident_ || of == first)) {
          load_weights<N, SIDE, kThreads>(p_, row_, k, resident_, facts_, weights(0), weights(1));
          __syncthreads();
        }
        multiply_stage(stage(slot), static_cast<int>(k % resident_));
        slot = slot + 1 < kStages ? slot + 1 : 0;
      }
      finish(of * SIDE);
    }
  }

 private:
  __device__ Tile stage(int slot) const { return {stages_ + slot * kStageBytes, kRowBytes}; }
  // The upper parts of W and the rest; of fp32 there is the number itself.
  __device__ Tile weights(int part) const {
    const int bytes = resident_ * int(sizeof(N));
    return {weights_ + (sizeof(N) == 2 ? part * SIDE * bytes : 0), bytes};
  }

  __device__ void multiply_stage(const Tile& q, int k) {
    if (row_ + part_.row >= p_.own.count) return;
    float sum[WarpPart<SIDE>::kSlabs][4][4] = {};
#pragma unroll
    for (int depth = 0; depth < kDepth; depth += 32 / int(sizeof(N))) {
      if constexpr (sizeof(N) == 2) multiply_half(q, k, depth, sum);
      else multiply_float(q, k, depth, sum);
    }
    part_.add(sum);
  }

  template <typename S>
  __device__ void multiply_half(const Tile& q, int k, int depth, S& sum) {
    unsigned right[2][4], x[4];
#pragma unroll
    for (int i = 0; i < 2; ++i) load_16_transposed(right[i], q, depth, part_.column / 8 + 2 * i);
    const Operand<N, 2> columns[4] = {Operand<N, 2>(right[0][0], right[0][1]), Operand<N, 2>(right[0][2], right[0][3]),
                                      Operand<N, 2>(right[1][0], right[1][1]), Operand<N, 2>(right[1][2], right[1][3])};
#pragma unroll
    for (int part = 1; part >= 0; --part)
#pragma unroll
      for (int slab = 0; slab < WarpPart<SIDE>::kSlabs; ++slab) {
        load_16_rows(x, weights(part), part_.row + 16 * slab, (k + depth) / 8);
        const Operand<N, 4> rows(x[0], x[1], x[2], x[3]);
#pragma unroll
        for (int n = 0; n < 4; ++n) multiply(sum[slab][n], rows, columns[n]);
      }
  }

  template <typename S>
  __device__ void multiply_float(const Tile& q, int k, int depth, S& sum) {
    const auto word = [&](int row, int n) {
      const int column = part_.column + 8 * n + part_.group;
      return *reinterpret_cast<const unsigned*>(q.at(part_.member + row % 8, column / 4, row / 8 * 8) + column % 4 * 4);
    };
    const Operand<N, 2> columns[4] = {
        Operand<N, 2>(word(depth, 0), word(depth + 4, 0)), Operand<N, 2>(word(depth, 1), word(depth + 4, 1)),
        Operand<N, 2>(word(depth, 2), word(depth + 4, 2)), Operand<N, 2>(word(depth, 3), word(depth + 4, 3))};
#pragma unroll
    for (int slab = 0; slab < WarpPart<SIDE>::kSlabs; ++slab) {
      unsigned x[4];
      load_16_rows(x, weights(0), part_.row + 16 * slab, (k + depth) / 4);
      const Operand<N, 4> rows(x[0], x[1], x[2], x[3]);
#pragma unroll
      for (int n = 0; n < 4; ++n) multiply(sum[slab][n], rows, columns[n]);
    }
  }

  // A tile is complete: 16 rows at a time through shared memory, so that a lane writes 16 bytes.
  __device__ void finish(int64_t column) {
    float* const mine = reinterpret_cast<float*>(staging_) + threadIdx.x / 32 * (16 * kPitch);
    constexpr int kAcross = 32 / kPerChunk<N>;
#pragma unroll
    for (int slab = 0; slab < WarpPart<SIDE>::kSlabs; ++slab) {
#pragma unroll
      for (int n = 0; n < 4; ++n)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          *reinterpret_cast<float2*>(mine + (part_.group + 8 * half) * kPitch + 8 * n + 2 * part_.member) =
              make_float2(part_.sum[slab][n][2 * half], part_.sum[slab][n][2 * half + 1]);
      __syncwarp();
#pragma unroll
      for (int at = threadIdx.x % 32; at < 16 * kAcross; at += 32) {
        const int row = at / kAcross, chunk = at % kAcross;
        store_chunk<N>(p_, facts_[part_.row + 16 * slab + row], mine + row * kPitch + chunk * kPerChunk<N>,
                       row_ + part_.row + 16 * slab + row, column + part_.column + chunk * kPerChunk<N>);
      }
      __syncwarp();
    }
    part_.clear();
  }

  const Weighted<float>& p_;
  const int resident_;
  const int64_t row_;
  char *const stages_, *const staging_;
  RowFacts<float>* const facts_;
  char* const weights_;
  WarpPart<SIDE> part_;
};

template <typename T>
struct WeightedTable {
  Weighted<T> items[kTables];
  int64_t first_block[kTables + 1], tiles;  // of columns, to a block
  int count, resident;
};

// Neighbouring blocks have the same columns.
template <typename N, int SIDE>
__global__ void __launch_bounds__((WarpPart<SIDE>::kThreads), (WeightedBlock<N, SIDE>::kResident))
    weighted_kernel(const __grid_constant__ WeightedTable<float> table) {
  extern __shared__ __align__(16) char shared[];
  const int i = item_of(table, blockIdx.x);
  const Weighted<float>& p = table.items[i];
  const int64_t block = blockIdx.x - table.first_block[i], rows = ceil_div(p.own.count, SIDE);
  const int64_t first = block / rows * table.tiles, end = min(first + table.tiles, ceil_div(p.own.width, SIDE));
  WeightedBlock<N, SIDE>(p, table.resident, block % rows * SIDE, shared).run(first, end);
}

// How many tiles of columns each block goes over: so many that all blocks run at once.
template <typename T>
void set_blocks(WeightedTable<T>& table, int64_t side, int64_t wanted) {
  int64_t tiles = 0;
  const auto columns = [&](int i) { return ceil_div(table.items[i].own.width, side); };
  const auto rows = [&](int i) { return ceil_div(table.items[i].own.count, side); };
  for (int i = 0; i < table.count; ++i) tiles += rows(i) * columns(i);
  table.tiles = max<int64_t>(1, ceil_div(tiles, wanted));
  for (int i = 0; i < table.count; ++i)
    table.first_block[i + 1] = table.first_block[i] + rows(i) * ceil_div(columns(i), table.tiles);
}

template <typename N, int SIDE>
void start_weighted(WeightedTable<float>& table, cudaStream_t stream) {
  using Block = WeightedBlock<N, SIDE>;
  int64_t most = 0;
  for (int i = 0; i < table.count; ++i) {
    Weighted<float>& p = table.items[i];
    most = max(most, p.q.count);
    p.whole_q = in_whole_chunks<N>(p.q);
    p.whole_own = in_whole_chunks<N>(p.own);
    p.whole_w = p.column_stride == 1 && p.row_stride % 4 == 0 && reinterpret_cast<uintptr_t>(p.w) % 16 == 0;
  }
  set_blocks(table, SIDE, Block::kResident == 1 ? kMultiprocessors : 2 * kMultiprocessors);
  if (table.first_block[table.count] == 0) return;
  table.resident = static_cast<int>(min<int64_t>(256, max<int64_t>(64, round_up(most, 64))));
  while (table.resident > 64 && Block::shared(table.resident) > most_shared()) table.resident -= 64;
  const int bytes = Block::shared(table.resident);
  allow_shared(weighted_kernel<N, SIDE>, bytes);
  weighted_kernel<N, SIDE><<<table.first_block[table.count], Block::kThreads, bytes, stream>>>(table);
  check_launch("gram weighted sum");
}

}  // namespace
}  // namespace cuda
}  // namespace kd
