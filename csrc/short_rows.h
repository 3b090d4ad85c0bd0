// Inner products of rows, however short. matrix.h's tiles of them end with adding up the lanes of their sums, which for
// rows of few numbers takes longer than the products; there a sum gets a lane of its own, as in weighted sums, with the
// rows of B as columns.
#pragma once

#include "matrix.h"

namespace kd {
namespace KD_ISA {
namespace {

constexpr int64_t kShort = 128;  // columns; of 256 and more, tiles of rows take less time

// Columns [begin, begin + n) of rows [first, first + count) as blocks of `tall` rows with the columns outermost, zeros
// behind the last row
template <typename T>
void pack_transposed(const Rows& q, int64_t first, int64_t count, int64_t begin, int64_t n, int64_t tall, T* out) {
  Buffer<T> buffer(n);
  for (int64_t i = 0; i < round_up(count, tall); ++i) {
    const T* from = buffer;
    if (i < count) from = load<T>(q.type, q.data, (first + i) * q.stride + begin, n, buffer);
    else std::memset(buffer, 0, static_cast<size_t>(n) * sizeof(T));
    T* to = out + i / tall * tall * n + i % tall;
    for (int64_t k = 0; k < n; ++k) to[k * tall] = from[k];
  }
}

// inner_products of at most kShort columns
template <typename T>
void short_products(const Rows& a, int64_t first, int64_t count, const Rows& b, bool symmetric, int64_t begin,
                    int64_t end, double* out, int64_t out_stride) {
  constexpr int64_t wide = 2 * Vector<T>::lanes;
  const int64_t n = end - begin, rows_a = round_up(count, kTall), rows_b = round_up(b.count, wide);
  Buffer<T> buffer((rows_a + rows_b) * n + kTall * wide);
  T *panels = buffer, *tile = panels + rows_b * n, *weights = tile + kTall * wide;  // the first two on whole vectors
  pack_transposed(a, first, count, begin, n, kTall, weights);
  pack_transposed(b, 0, b.count, begin, n, wide, panels);
  for (int64_t j = 0; j < b.count; j += wide)
    for (int64_t i = symmetric ? j / kTall * kTall : 0; i < count; i += kTall) {
      weighted_tile(weights + i * n, panels + j * n, n, tile, wide);
      for (int64_t r = 0; r < min<int64_t>(kTall, count - i); ++r)
        for (int64_t c = 0; c < min<int64_t>(wide, b.count - j); ++c)
          out[(i + r) * out_stride + j + c] = double(tile[r * wide + c]);
    }
}

// Whether a row of bf16 has a square of 0 over columns [begin, end), though not all of its numbers are 0
inline bool lost_bf16(const Rows& q, int64_t begin, int64_t end, const double* squares, int64_t stride) {
  for (int64_t i = 0; i < q.count; ++i) {
    if (squares[i * stride + i] != 0) continue;
    const Bf16* row = static_cast<const Bf16*>(q.data) + i * q.stride;
    for (int64_t k = begin; k < end; ++k)
      if (row[k] & 0x7fff) return true;
  }
  return false;
}

// out[i, j] = <a_{first + i}, b_j> over columns [begin, end), for i < count; with `symmetric` only j <= i is right.
// `out` has round_up(count, kTile) rows of `out_stride` >= round_up(b.count, kTile) numbers.
template <typename T>
void inner_products(const Rows& a, int64_t first, int64_t count, const Rows& b, bool symmetric, int64_t begin,
                    int64_t end, double* out, int64_t out_stride) {
  const bool bf16 = a.type == DType::bf16 && b.type == DType::bf16 && sizeof(T) == 4 && multiplies_bf16();
  const auto products = bf16                    ? inner_products_as<Bf16>
                        : end - begin <= kShort ? short_products<T>
                                                : inner_products_as<T>;
  products(a, first, count, b, symmetric, begin, end, out, out_stride);
  if (bf16 && symmetric && lost_bf16(b, begin, end, out, out_stride))
    inner_products_as<T>(a, first, count, b, symmetric, begin, end, out, out_stride);
}

}  // namespace
}  // namespace KD_ISA
}  // namespace kd
