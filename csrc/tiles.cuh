// What tensor-core kernels have in common: tiles of rows in shared memory, filled 16 bytes at a time, and the operands
// of mma that a warp takes out of them. Numbers are __nv_bfloat16, __half, or float, which is multiplied as three
// products of tf32 numbers: each is split into 11 upper bits and the rest, and of the four products the smallest is
// left out.
#pragma once

#include "arithmetic.h"
#include "ptx.cuh"

namespace kd {
namespace cuda {
namespace {

template <typename N>
constexpr DType kTypeOf = DType::f32;
template <>
constexpr DType kTypeOf<__half> = DType::f16;
template <>
constexpr DType kTypeOf<__nv_bfloat16> = DType::bf16;

template <typename N>
constexpr int kPerChunk = 16 / static_cast<int>(sizeof(N));

// ---- 16 bytes of numbers ----

template <typename To, typename From>
__device__ inline To as_bits(const From& x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  memcpy(&y, &x, sizeof(y));
  return y;
}

template <typename N>
__device__ inline uint4 packed(const float (&x)[kPerChunk<N>]) {
  unsigned w[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (kTypeOf<N> == DType::f32) w[i] = __float_as_uint(x[i]);
    else if constexpr (kTypeOf<N> == DType::f16) w[i] = as_bits<unsigned>(__floats2half2_rn(x[2 * i], x[2 * i + 1]));
    else w[i] = as_bits<unsigned>(__floats2bfloat162_rn(x[2 * i], x[2 * i + 1]));
  }
  return make_uint4(w[0], w[1], w[2], w[3]);
}

template <typename N>
__device__ inline void unpack(const uint4& chunk, float (&x)[kPerChunk<N>]) {
  const unsigned w[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (kTypeOf<N> == DType::f32) {
      x[i] = __uint_as_float(w[i]);
    } else if constexpr (kTypeOf<N> == DType::f16) {
      const float2 pair = __half22float2(as_bits<__half2>(w[i]));
      x[2 * i] = pair.x;
      x[2 * i + 1] = pair.y;
    } else {
      x[2 * i] = __uint_as_float(w[i] << 16);
      x[2 * i + 1] = __uint_as_float(w[i] & 0xffff0000u);
    }
  }
}

// ---- tiles ----

// Rows of chunks, eight to a row at least. Each row has its own order of every eight, so that in no bank meet what
// ldmatrix takes of eight rows or a fragment's words of four. Eight rows further on the order is the same.
struct Tile {
  char* data;
  int row_bytes;
  __device__ char* at(int row, int chunk, int eights = 0) const {
    const int order = (2 * row | (row >> 2 & 1)) & 7;
    return data + row * row_bytes + (chunk ^ order) * 16 + eights * row_bytes;
  }
};

// Whether rows consist of whole chunks, each at a multiple of 16 bytes, of the type that is multiplied.
template <typename N>
bool in_whole_chunks(const Rows& q) {
  return q.type == kTypeOf<N> && reinterpret_cast<uintptr_t>(q.data) % 16 == 0 && q.stride % kPerChunk<N> == 0 &&
         q.width % kPerChunk<N> == 0;
}

template <typename N>
__device__ inline uint4 gathered(const Rows& q, int64_t row, int64_t column, int64_t end) {
  float x[kPerChunk<N>];
#pragma unroll
  for (int i = 0; i < kPerChunk<N>; ++i)
    x[i] = column + i < end ? element<float>(q.type, q.data, row * q.stride + column + i) : 0.0f;
  return packed<N>(x);
}

// ROWS rows from `first` on, of each CHUNKS chunks from `column` on: on their way when this returns if they are in
// whole chunks, in place if not. What is beyond the rows or `end` becomes 0.
template <typename N, int ROWS, int CHUNKS, int THREADS>
__device__ inline void load_rows(const Tile& tile, const Rows& q, bool whole, int64_t first, int64_t column,
                                 int64_t end) {
  constexpr int kStep = THREADS / CHUNKS;  // from one of a thread's rows to the next
  static_assert(THREADS % CHUNKS == 0 && ROWS % kStep == 0 && kStep % 8 == 0);
  const int chunk = threadIdx.x % CHUNKS, top = threadIdx.x / CHUNKS;
  const int64_t from = column + chunk * kPerChunk<N>, row = first + top;
  const int rows = static_cast<int>(min<int64_t>(ROWS, from < end ? q.count - row : 0));
  if (whole) {
    const N *const data = static_cast<const N*>(q.data), *source = data + row * q.stride + from;
#pragma unroll
    for (int i = 0; i < ROWS; i += kStep, source += kStep * q.stride)
      copy_async_if(i < rows, tile.at(top, chunk, i), i < rows ? source : data);
  } else {
#pragma unroll 1
    for (int i = 0; i < ROWS; i += kStep)
      *reinterpret_cast<uint4*>(tile.at(top, chunk, i)) =
          i < rows ? gathered<N>(q, row + i, from, end) : make_uint4(0, 0, 0, 0);
  }
}

// ---- operands ----

template <typename N, int COUNT>
struct Operand {
  unsigned bits[COUNT];
  template <typename... W>
  __device__ explicit Operand(W... words) : bits{words...} {}
};

template <int COUNT>
struct Operand<float, COUNT> {
  unsigned upper[COUNT], rest[COUNT];
  template <typename... W>
  __device__ explicit Operand(W... words) : upper{words...} {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      const unsigned x = upper[i];
      upper[i] = (x + 0x1000u) & 0xffffe000u;  // to nearest, so that what is left out has no sign
      rest[i] = __float_as_uint(__uint_as_float(x) - __uint_as_float(upper[i]));
    }
  }
};

__device__ inline void multiply(float (&d)[4], const Operand<__nv_bfloat16, 4>& a, const Operand<__nv_bfloat16, 2>& b) {
  mma_bf16(d, a.bits, b.bits, d);
}
__device__ inline void multiply(float (&d)[4], const Operand<__half, 4>& a, const Operand<__half, 2>& b) {
  mma_fp16(d, a.bits, b.bits, d);
}
__device__ inline void multiply(float (&d)[4], const Operand<float, 4>& a, const Operand<float, 2>& b) {
  mma_tf32(d, a.rest, b.upper, d);
  mma_tf32(d, a.upper, b.rest, d);
  mma_tf32(d, a.upper, b.upper, d);
}

// Two neighbouring chunks of 16 rows, `row` and `chunk` being multiples of 16 and 2, as the operand a: words 0 and 1 of
// a lane are of the first chunk, of the upper and the lower eight rows, words 2 and 3 of the second
__device__ inline void load_16_rows(unsigned (&words)[4], const Tile& tile, int row, int chunk) {
  const int lane = threadIdx.x % 32;
  load_matrices<4, false>(words, tile.at(lane % 16, chunk ^ lane / 16, row));
}

// The same of columns that lie along the rows, as two operands b: words 0 and 1 are of the first chunk's eight columns
__device__ inline void load_16_transposed(unsigned (&words)[4], const Tile& tile, int row, int chunk) {
  const int lane = threadIdx.x % 32;
  load_matrices<4, true>(words, tile.at(lane % 16, chunk ^ lane / 16, row));
}

// The same as two operands b: words 0 and 1 are of both chunks of the upper eight rows, words 2 and 3 of the lower ones
__device__ inline void load_16_columns(unsigned (&words)[4], const Tile& tile, int row, int chunk) {
  const int lane = threadIdx.x % 32;
  load_matrices<4, false>(words, tile.at(lane % 8, chunk ^ lane / 8 % 2, row + lane / 16 * 8));
}

// ---- what a warp makes of a tile of SIDE columns: SIDE / 2 rows of 32 columns ----

template <int SIDE>
struct WarpPart {
  static constexpr int kThreads = SIDE == 128 ? 256 : 128, kSlabs = SIDE / 32;  // of 16 rows
  int row = threadIdx.x / 32 / (SIDE / 32) * (SIDE / 2), column = threadIdx.x / 32 % (SIDE / 32) * 32;
  int group = threadIdx.x % 32 / 4, member = threadIdx.x % 4;
  float sum[kSlabs][4][4] = {};

  __device__ void add(const float (&x)[kSlabs][4][4]) {
#pragma unroll
    for (int slab = 0; slab < kSlabs; ++slab)
#pragma unroll
      for (int n = 0; n < 4; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[slab][n][i] += x[slab][n][i];
  }

  __device__ void clear() {
#pragma unroll
    for (int slab = 0; slab < kSlabs; ++slab)
#pragma unroll
      for (int n = 0; n < 4; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[slab][n][i] = 0;
  }

  // f(row, column, its number, the next column's) for all of this lane's
  template <typename F>
  __device__ void each(const F& f) const {
#pragma unroll
    for (int slab = 0; slab < kSlabs; ++slab)
#pragma unroll
      for (int n = 0; n < 4; ++n)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          f(row + 16 * slab + 8 * half + group, column + 8 * n + 2 * member, sum[slab][n][2 * half],
            sum[slab][n][2 * half + 1]);
  }
};

}  // namespace
}  // namespace cuda
}  // namespace kd
