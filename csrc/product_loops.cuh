// The main loop of A B^T: a block's tile of it, over a part of the columns. Two ways with one interface:
//   TensorLoop  half precision and fp32 on tensor cores; columns come 128 bytes at a time through a pipeline
//   PlainLoop   fp64, by the thread
#pragma once

#include "tiles.cuh"

namespace kd {
namespace cuda {
namespace {

struct Factors {
  Rows a, b;
  bool symmetric;  // a and b are the same: the lower half is enough
  bool whole;      // in_whole_chunks, both
};

// What of a product a block makes.
struct Part {
  int64_t row, column;  // of the tile
  int64_t begin, end;   // of the sum
};

template <typename N, int SIDE>
class TensorLoop {
 public:
  using Number = N;
  using Sum = float;
  static constexpr int kSide = SIDE, kThreads = WarpPart<SIDE>::kThreads;
  static constexpr int kStages = SIDE == 128 ? 3 : 4, kRowBytes = 128, kColumns = kRowBytes / int(sizeof(N));
  static constexpr int kStageBytes = 2 * SIDE * kRowBytes, kShared = kStages * kStageBytes;
  static constexpr int kResident = SIDE == 128 ? 1 : 3;  // blocks on a multiprocessor

  // With SQUARES a warp also multiplies 16 rows of each tile with themselves, for the diagonal.
  template <bool SQUARES>
  __device__ void run(const Factors& p, const Part& part, char* shared) {
    const bool same = p.symmetric && part.row == part.column;
    const int steps = static_cast<int>(ceil_div(part.end - part.begin, kColumns));
    int64_t column = part.begin;  // that is loaded next
    const auto load = [&](int slot) {
      if (column < part.end) {
        load_rows<N, SIDE, 8, kThreads>(stage(shared, slot, 0), p.a, p.whole, part.row, column, part.end);
        if (!same) load_rows<N, SIDE, 8, kThreads>(stage(shared, slot, 1), p.b, p.whole, part.column, column, part.end);
      }
      copy_async_commit();
      column += kColumns;
    };
    for (int slot = 0; slot < kStages - 1; ++slot) load(slot);
    for (int step = 0, slot = 0; step < steps; ++step) {
      copy_async_wait<kStages - 2>();
      __syncthreads();  // this stage is there, and nobody reads the one that is loaded next
      load(slot ? slot - 1 : kStages - 1);
      multiply_stage<SQUARES>(stage(shared, slot, 0), stage(shared, slot, same ? 0 : 1), p, part);
      slot = slot + 1 < kStages ? slot + 1 : 0;
    }
  }

  template <typename F>
  __device__ void each(const F& f) const {
    part_.each(f);
  }

  // f(whether of b, row of the tile, its square)
  template <typename F>
  __device__ void each_square(const F& f) const {
    if (part_.group / 2 != part_.member) return;
#pragma unroll
    for (int of_b = 0; of_b < 2; ++of_b)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float* d = squares_[of_b][half] + 2 * half;  // the lower eight rows are the lower half of d too
        f(of_b == 1, threadIdx.x / 32 * 16 + 8 * half + part_.group, part_.group % 2 ? d[1] : d[0]);
      }
  }

 private:
  static __device__ Tile stage(char* shared, int slot, int matrix) {
    return {shared + slot * kStageBytes + matrix * (SIDE * kRowBytes), kRowBytes};
  }

  // The stage's sums begin at 0 and are added to the others in fp32: tensor cores truncate what they add up.
  template <bool SQUARES>
  __device__ void multiply_stage(const Tile& a, const Tile& b, const Factors& p, const Part& part) {
    if (part.row + part_.row < p.a.count && part.column + part_.column < p.b.count) multiply_part(a, b);
    if constexpr (SQUARES) {
      add_squares(a, squares_[0]);
      add_squares(b, squares_[1]);
    }
  }

  __device__ void multiply_part(const Tile& a, const Tile& b) {
    float sum[WarpPart<SIDE>::kSlabs][4][4] = {};
#pragma unroll
    for (int chunk = 0; chunk < 8; chunk += 2) {
      unsigned right[2][4], left[4];
#pragma unroll
      for (int i = 0; i < 2; ++i) load_16_columns(right[i], b, part_.column + 16 * i, chunk);
      const Operand<N, 2> columns[4] = {
          Operand<N, 2>(right[0][0], right[0][1]), Operand<N, 2>(right[0][2], right[0][3]),
          Operand<N, 2>(right[1][0], right[1][1]), Operand<N, 2>(right[1][2], right[1][3])};
#pragma unroll
      for (int slab = 0; slab < WarpPart<SIDE>::kSlabs; ++slab) {
        load_16_rows(left, a, part_.row + 16 * slab, chunk);
        const Operand<N, 4> rows(left[0], left[1], left[2], left[3]);
#pragma unroll
        for (int n = 0; n < 4; ++n) multiply(sum[slab][n], rows, columns[n]);
      }
    }
    part_.add(sum);
  }

  __device__ void add_squares(const Tile& tile, float (&squares)[2][4]) {
    float sum[2][4] = {};
#pragma unroll
    for (int chunk = 0; chunk < 8; chunk += 2) {
      unsigned x[4];
      load_16_rows(x, tile, threadIdx.x / 32 * 16, chunk);
      const Operand<N, 4> rows(x[0], x[1], x[2], x[3]);
      multiply(sum[0], rows, Operand<N, 2>(x[0], x[2]));
      multiply(sum[1], rows, Operand<N, 2>(x[1], x[3]));
    }
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int i = 0; i < 4; ++i) squares[half][i] += sum[half][i];
  }

  WarpPart<SIDE> part_;
  float squares_[2][2][4] = {};  // of a and of b: 16 rows by their upper and by their lower eight
};

class PlainLoop {
 public:
  using Number = double;
  using Sum = double;
  static constexpr int kSide = 64, kThreads = 256, kColumns = 16, kShared = 0, kResident = 2;

  template <bool SQUARES>
  __device__ void run(const Factors& p, const Part& part, char*) {
    __shared__ double tile_a[kColumns][kSide + 1], tile_b[kColumns][kSide + 1];
    const int x = threadIdx.x % 16, y = threadIdx.x / 16;  // also the column and the row of what a thread reads
    for (int64_t k = part.begin; k < part.end; k += kColumns) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        tile_a[x][y + 16 * r] = entry(p.a, part.row + y + 16 * r, k + x, part.end);
        tile_b[x][y + 16 * r] = entry(p.b, part.column + y + 16 * r, k + x, part.end);
      }
      __syncthreads();
#pragma unroll
      for (int d = 0; d < kColumns; ++d) {
        double a[4], b[4];
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          a[r] = tile_a[d][y + 16 * r];
          b[r] = tile_b[d][2 * x + r % 2 + 32 * (r / 2)];
        }
#pragma unroll
        for (int r = 0; r < 4; ++r)
#pragma unroll
          for (int c = 0; c < 4; ++c) sum_[r][c] += a[r] * b[c];
      }
      if constexpr (SQUARES)
        if (threadIdx.x < 2 * kSide)
          for (int d = 0; d < kColumns; ++d) {
            const double v = (threadIdx.x < kSide ? tile_a : tile_b)[d][threadIdx.x % kSide];
            square_ += v * v;
          }
      __syncthreads();
    }
  }

  template <typename F>
  __device__ void each(const F& f) const {
#pragma unroll
    for (int r = 0; r < 4; ++r)
#pragma unroll
      for (int c = 0; c < 4; c += 2)
        f(threadIdx.x / 16 + 16 * r, 2 * (threadIdx.x % 16) + 16 * c, sum_[r][c], sum_[r][c + 1]);
  }

  template <typename F>
  __device__ void each_square(const F& f) const {
    if (threadIdx.x < 2 * kSide) f(threadIdx.x >= kSide, threadIdx.x % kSide, square_);
  }

 private:
  static __device__ double entry(const Rows& q, int64_t row, int64_t column, int64_t end) {
    return row < q.count && column < end ? element<double>(q.type, q.data, row * q.stride + column) : 0.0;
  }

  double sum_[4][4] = {}, square_ = 0;
};

}  // namespace
}  // namespace cuda
}  // namespace kd
