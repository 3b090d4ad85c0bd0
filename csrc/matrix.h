// The two matrix products of gram.cpp: inner products of rows (A B^T, or half of A A^T) and weighted sums of rows (W
// Q). Both copy a slice of the rows that fits the core's cache into a packed buffer first: rows are often a power of
// two apart, which would put all of them into the same few lines of the cache.
#pragma once

#include "cpu.h"
#include "gram.h"

#if defined(__AVX512F__) && (defined(__clang__) || __GNUC__ >= 11)
#include <immintrin.h>
#define KD_BF16_PRODUCTS 1
#else
#define KD_BF16_PRODUCTS 0
#endif

namespace kd {
namespace KD_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kTile = 4, kTall = 8;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32, kTile = 3, kTall = 6;
#else
constexpr int kVectorBytes = 16, kTile = 3, kTall = 4;
#endif

template <typename T, int BYTES = kVectorBytes>
struct Vector {
  typedef T type __attribute__((vector_size(BYTES), may_alias));
  static constexpr int lanes = BYTES / static_cast<int>(sizeof(T));
};

template <typename T, int BYTES>
struct LaneSum {
  static inline T of(typename Vector<T, BYTES>::type v) {
    typename Vector<T, BYTES / 2>::type half[2];
    std::memcpy(half, &v, sizeof(v));
    return LaneSum<T, BYTES / 2>::of(half[0] + half[1]);
  }
};
template <>
struct LaneSum<float, 16> {
  static inline float of(Vector<float, 16>::type v) { return (v[0] + v[2]) + (v[1] + v[3]); }
};
template <>
struct LaneSum<double, 16> {
  static inline double of(Vector<double, 16>::type v) { return v[0] + v[1]; }
};

constexpr int64_t kSmall = 1 << 17;     // simple operations that are not worth a second thread
constexpr int64_t kProducts = 1 << 22;  // the same for multiply-adds of a matrix product

// ---- inner products ----

struct Product {
  template <typename V>
  static void add(V& sum, const V& x, const V& y) {
    sum += x * y;
  }
};

// By the differences themselves: equal rows are exactly 0 apart, and rows that are nearly equal keep their digits.
struct SquaredDifference {
  template <typename V>
  static void add(V& sum, const V& x, const V& y) {
    const V difference = x - y;
    sum += difference * difference;
  }
};

template <typename T, typename Term = Product>
inline void inner_tile(const T* a, const T* b, int64_t stride, int64_t width, double* out, int64_t out_stride) {
  using V = typename Vector<T>::type;
  V sum[kTile][kTile] = {};
  for (int64_t k = 0; k < width; k += Vector<T>::lanes) {
    V x[kTile];
#pragma GCC unroll 8
    for (int i = 0; i < kTile; ++i) x[i] = *reinterpret_cast<const V*>(a + i * stride + k);
#pragma GCC unroll 8
    for (int j = 0; j < kTile; ++j) {
      const V y = *reinterpret_cast<const V*>(b + j * stride + k);
#pragma GCC unroll 8
      for (int i = 0; i < kTile; ++i) Term::add(sum[i][j], x[i], y);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kTile; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < kTile; ++j) out[i * out_stride + j] += LaneSum<T, kVectorBytes>::of(sum[i][j]);
}

// bf16 rows as they are: the processor multiplies pairs of them exactly and adds to fp32, 2.5 times as fast as fp32
// FMA. It takes products below 1e-38 for 0; a Gram matrix that loses a row so is made again in fp32 (short_rows.h).
typedef uint16_t Bf16;

#if KD_BF16_PRODUCTS
inline bool multiplies_bf16() {
  static const bool found = __builtin_cpu_supports("avx512bf16");
  return found;
}

__attribute__((target("avx512bf16"))) inline void inner_tile(const Bf16* a, const Bf16* b, int64_t stride,
                                                             int64_t width, double* out, int64_t out_stride) {
  __m512 sum[kTile][kTile] = {};
  for (int64_t k = 0; k < width; k += 32) {
    __m512bh x[kTile];
#pragma GCC unroll 8
    for (int i = 0; i < kTile; ++i) x[i] = (__m512bh)_mm512_loadu_si512(a + i * stride + k);
#pragma GCC unroll 8
    for (int j = 0; j < kTile; ++j) {
      const __m512bh y = (__m512bh)_mm512_loadu_si512(b + j * stride + k);
#pragma GCC unroll 8
      for (int i = 0; i < kTile; ++i) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], x[i], y);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kTile; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < kTile; ++j)
      out[i * out_stride + j] += LaneSum<float, kVectorBytes>::of((Vector<float>::type)sum[i][j]);
}
#else
inline bool multiplies_bf16() { return false; }
inline void inner_tile(const Bf16*, const Bf16*, int64_t, int64_t, double*, int64_t) {}
#endif

template <typename P>
inline const P* load_packed(const Rows& q, int64_t offset, int64_t n, P* buffer) {
  return load<P>(q.type, q.data, offset, n, buffer);
}
template <>
inline const Bf16* load_packed<Bf16>(const Rows& q, int64_t offset, int64_t, Bf16*) {
  return static_cast<const Bf16*>(q.data) + offset;
}

// Columns [begin, begin + n) of rows [first, first + count) to `out`, in whole tiles and vectors, with zeros behind.
template <typename P>
void pack_rows(const Rows& q, int64_t first, int64_t count, int64_t begin, int64_t n, int64_t stride, P* out) {
  const int64_t width = round_up(n, kVectorBytes / static_cast<int>(sizeof(P))), rows = round_up(count, kTile);
  for (int64_t i = 0; i < rows; ++i) {
    P* to = out + i * stride;
    if (i < count) {
      const P* from = load_packed<P>(q, (first + i) * q.stride + begin, n, to);
      if (from != to) std::memcpy(to, from, static_cast<size_t>(n) * sizeof(P));
    }
    for (int64_t k = i < count ? n : 0; k < width; ++k) to[k] = 0;
  }
}

struct InnerProducts {
  template <typename P>
  static void tile(const P* a, const P* b, int64_t stride, int64_t width, double* out, int64_t out_stride) {
    inner_tile(a, b, stride, width, out, out_stride);
  }
};

struct SquaredDistances {
  template <typename T>
  static void tile(const T* a, const T* b, int64_t stride, int64_t width, double* out, int64_t out_stride) {
    inner_tile<T, SquaredDifference>(a, b, stride, width, out, out_stride);
  }
};

// As inner_products in short_rows.h: for rows of many columns, for bf16 as it is, and for distances
template <typename P, typename Tile = InnerProducts>
void inner_products_as(const Rows& a, int64_t first, int64_t count, const Rows& b, bool symmetric, int64_t begin,
                       int64_t end, double* out, int64_t out_stride) {
  const int64_t rows_a = round_up(count, kTile), rows_b = round_up(b.count, kTile);
  std::memset(out, 0, static_cast<size_t>(rows_a * out_stride) * sizeof(double));
  const int64_t packed = rows_b + (symmetric ? 0 : rows_a);
  const int64_t slice = min<int64_t>(1024, max<int64_t>(64, (1 << 17) / (packed + 1) / 64 * 64));
  const int64_t stride = slice + 64 / static_cast<int64_t>(sizeof(P));
  Buffer<P> buffer(packed * stride);
  P *pack_b = buffer, *pack_a = symmetric ? pack_b : pack_b + rows_b * stride;
  for (int64_t k = begin; k < end; k += slice) {
    const int64_t n = min(slice, end - k), width = round_up(n, kVectorBytes / static_cast<int>(sizeof(P)));
    pack_rows(b, 0, b.count, k, n, stride, pack_b);
    if (!symmetric) pack_rows(a, first, count, k, n, stride, pack_a);
    for (int64_t i = 0; i < rows_a; i += kTile)
      for (int64_t j = 0; j < (symmetric ? i + 1 : rows_b); j += kTile)
        Tile::tile(pack_a + i * stride, pack_b + j * stride, stride, width, out + i * out_stride + j, out_stride);
  }
}

// ---- weighted sums of rows ----

// W [n, m] as blocks of kTall rows with the columns outermost, zeros behind the last row
template <typename T, typename F>
void pack_weights(int64_t n, int64_t m, const F& weight, T* out) {
  for (int64_t i = 0; i < n; i += kTall)
    for (int64_t k = 0; k < m; ++k)
      for (int64_t r = 0; r < kTall; ++r) *out++ = i + r < n ? weight(i + r, k) : T(0);
}

template <typename T>
inline void weighted_tile(const T* w, const T* q, int64_t m, T* out, int64_t out_stride) {
  using V = typename Vector<T>::type;
  constexpr int lanes = Vector<T>::lanes;
  V sum[kTall][2] = {};
  for (int64_t k = 0; k < m; ++k) {
    const V q0 = *reinterpret_cast<const V*>(q + 2 * k * lanes);
    const V q1 = *reinterpret_cast<const V*>(q + (2 * k + 1) * lanes);
#pragma GCC unroll 8
    for (int i = 0; i < kTall; ++i) {
      const T x = w[k * kTall + i];
      sum[i][0] += x * q0;
      sum[i][1] += x * q1;
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kTall; ++i) {
    *reinterpret_cast<V*>(out + i * out_stride) = sum[i][0];
    *reinterpret_cast<V*>(out + i * out_stride + lanes) = sum[i][1];
  }
}

inline int64_t weighted_slice(int64_t rows) {  // columns per task
  return min<int64_t>(512, max<int64_t>(64, (1 << 16) / (rows + 1) / 64 * 64));
}

// Columns [begin, begin + n) of W Q, n <= weighted_slice(q.count + count); rows go to finish(row, column, n, values).
template <typename T, typename F>
void weighted_sum(const T* packed_w, int64_t count, const Rows& q, int64_t begin, int64_t n, T* scratch,
                  const F& finish) {
  constexpr int64_t wide = 2 * Vector<T>::lanes;
  const int64_t width = round_up(n, wide), m = q.count, out_stride = width + wide;
  T *row = scratch, *panels = row + width, *out = panels + m * width;
  for (int64_t k = 0; k < m; ++k) {
    const T* from = load<T>(q.type, q.data, k * q.stride + begin, n, row);
    if (n < width) {
      if (from != row) std::memcpy(row, from, static_cast<size_t>(n) * sizeof(T));
      for (int64_t c = n; c < width; ++c) row[c] = 0;
      from = row;
    }
    for (int64_t c = 0; c < width; c += wide) std::memcpy(panels + c * m + k * wide, from + c, wide * sizeof(T));
  }
  for (int64_t c = 0; c < width; c += wide)
    for (int64_t i = 0; i < count; i += kTall)
      weighted_tile(packed_w + i * m, panels + c * m, m, out + i * out_stride + c, out_stride);
  for (int64_t i = 0; i < count; ++i) finish(i, begin, n, out + i * out_stride);
}

template <typename T>
int64_t weighted_scratch(int64_t count, int64_t m, int64_t slice) {
  const int64_t width = slice + 2 * Vector<T>::lanes;
  return width + m * width + round_up(count, kTall) * (width + 2 * Vector<T>::lanes);
}

// out = finish(W Q) for all columns, in parallel. Where threads outnumber the slices of columns, they share the rows
// too.
template <typename T, typename F>
void weighted_rows(const Pool& pool, const T* packed_w, int64_t count, const Rows& q, const F& finish) {
  if (count == 0 || q.width == 0) return;
  const int64_t slice = weighted_slice(q.count + count), slices = ceil_div(q.width, slice);
  const int64_t share = round_up(ceil_div(count, ceil_div(pool.threads, slices)), kTall);
  parallel(pool, slices * ceil_div(count, share), kProducts / (q.count * share * slice + 1),
           [&](int64_t begin, int64_t end) {
             Buffer<T> scratch(weighted_scratch<T>(share, q.count, slice));
             for (int64_t task = begin; task < end; ++task) {
               const int64_t column = task % slices * slice, first = task / slices * share;
               weighted_sum<T>(
                   packed_w + first * q.count, min(share, count - first), q, column, min(slice, q.width - column),
                   scratch,
                   [&](int64_t row, int64_t from, int64_t n, T* values) { finish(first + row, from, n, values); });
             }
           });
}

}  // namespace
}  // namespace KD_ISA
}  // namespace kd
