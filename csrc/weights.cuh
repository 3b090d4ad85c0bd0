// Weighted sums of rows: what is summed, a row's constants, W on its way into shared memory, and sums on their way out.
#pragma once

#include "products.cuh"

namespace kd {
namespace cuda {
namespace {

// out_i = factor sum_k W_ik q_k; with `inverse`, out_i = inverse_i (sum_k W_ik q_k - inner_i inverse_i own_i), inner
// being the sum over k of w_ik similarity_ik
template <typename T>
struct Weighted {
  const T *w, *similarity;  // W_ik = w[i * row_stride + k * column_stride] (* column_scale[k])
  int64_t row_stride, column_stride;
  const T *column_scale, *factor, *inverse;
  Rows q, own;
  void* out;  // dense rows of own's dtype
  bool whole_q, whole_own, whole_w;

  __device__ int64_t at(int64_t i, int64_t k) const { return i * row_stride + k * column_stride; }
  __device__ T weight(int64_t i, int64_t k) const { return column_scale ? w[at(i, k)] * column_scale[k] : w[at(i, k)]; }
};

template <typename T>
struct RowFacts {
  T scale;  // W is multiplied by it, and
  T back;   // the sums by this
  T along, inverse;
};

// The power of two that brings `largest` to 2^13 or so: fp16's two parts of W then hold 22 bits
__device__ inline float scale_of(float largest) {
  const int exponent = static_cast<int>(__float_as_uint(largest) >> 23);
  if (exponent == 0 || exponent == 255) return 1;
  return __uint_as_float(static_cast<unsigned>(min(max(267 - exponent, 1), 253)) << 23);
}

template <bool SCALED, typename T>
__device__ inline RowFacts<T> fact_of(const Weighted<T>& p, int64_t i, T largest, double inner) {
  RowFacts<T> f{1, p.factor ? *p.factor : T(1), 0, 1};
  if constexpr (SCALED) f.scale = scale_of(largest);
  if constexpr (SCALED) f.back /= f.scale;
  if (p.inverse && i < p.own.count) {
    f.inverse = p.inverse[i];
    f.along = along_row(inner, f.inverse);
  }
  return f;
}

// What SIDE rows from `first` on need to know. A warp per row where its numbers lie together, else a thread of each
// warp that has the row: then those of 32 rows do.
template <bool SCALED, int SIDE, int THREADS, typename T>
__device__ void row_facts(const Weighted<T>& p, int64_t first, RowFacts<T>* facts) {
  __shared__ double inner_of[THREADS];
  __shared__ T largest_of[THREADS];
  const bool along = p.column_stride == 1;
  const int thread = threadIdx.x, step = along ? 32 : THREADS / SIDE;
  for (int row = along ? thread / 32 : thread % SIDE; row < SIDE; row += along ? THREADS / 32 : SIDE) {
    const int64_t i = first + row;
    T largest = 0;
    double inner = 0;
    if ((SCALED || p.inverse) && i < p.own.count)
      for (int64_t k = along ? thread % 32 : thread / SIDE; k < p.q.count; k += step) {
        if constexpr (SCALED) largest = Max()(largest, fabsf(p.weight(i, k)));
        if (p.inverse) inner += static_cast<double>(p.w[p.at(i, k)]) * static_cast<double>(p.similarity[p.at(i, k)]);
      }
    if (along) {
      if constexpr (SCALED) largest = reduce_lanes(largest, 32, Max());
      if (p.inverse) inner = reduce_lanes(inner, 32, Add());
      if (thread % 32 == 0) facts[row] = fact_of<SCALED>(p, i, largest, inner);
    } else {
      inner_of[thread] = inner;
      largest_of[thread] = largest;
    }
  }
  if (along) return;
  __syncthreads();
  if (thread >= SIDE) return;
  double inner = 0;
  T largest = 0;
  for (int at = thread; at < THREADS; at += SIDE) {
    inner += inner_of[at];
    largest = Max()(largest, largest_of[at]);
  }
  facts[thread] = fact_of<SCALED>(p, first + thread, largest, inner);
}

// `resident` columns of W from k on into shared memory, of SIDE rows; half precision as its upper part and the rest
template <typename N, int SIDE, int THREADS>
__device__ inline void load_weights(const Weighted<float>& p, int64_t first, int64_t k, int resident,
                                    const RowFacts<float>* facts, const Tile& upper, const Tile& rest) {
  constexpr int kPer = kPerChunk<N>;
  const int across = resident / kPer;
#pragma unroll 4
  for (int at = threadIdx.x; at < SIDE * across; at += THREADS) {  // along what lies together in memory
    const int row = p.column_stride == 1 ? at / across : at % SIDE;
    const int chunk = p.column_stride == 1 ? at % across : at / SIDE;
    const int64_t i = first + row, from = k + chunk * kPer;
    float x[kPer] = {};
    if (i < p.own.count) {
      if (p.whole_w && !p.column_scale && from + kPer <= p.q.count) {
#pragma unroll
        for (int n = 0; n < kPer; n += 4) {
          const float4 four = *reinterpret_cast<const float4*>(p.w + i * p.row_stride + from + n);
          x[n] = four.x, x[n + 1] = four.y, x[n + 2] = four.z, x[n + 3] = four.w;
        }
      } else {
#pragma unroll
        for (int n = 0; n < kPer; ++n)
          if (from + n < p.q.count) x[n] = p.weight(i, from + n);
      }
    }
    if constexpr (sizeof(N) == 4) {
      *reinterpret_cast<uint4*>(upper.at(row, chunk)) = packed<N>(x);
    } else {
      float y[kPer];
#pragma unroll
      for (int n = 0; n < kPer; ++n) x[n] *= facts[row].scale;
      const uint4 bits = packed<N>(x);
      unpack<N>(bits, y);
#pragma unroll
      for (int n = 0; n < kPer; ++n) x[n] -= y[n];
      *reinterpret_cast<uint4*>(upper.at(row, chunk)) = bits;
      *reinterpret_cast<uint4*>(rest.at(row, chunk)) = packed<N>(x);
    }
  }
}

template <typename T>
__device__ inline T finished(const Weighted<T>& p, const RowFacts<T>& f, T sum, T own) {
  return p.inverse ? (sum * f.back - f.along * own) * f.inverse : sum * f.back;
}

// A chunk of sums of row i from `column` on
template <typename N>
__device__ inline void store_chunk(const Weighted<float>& p, const RowFacts<float>& f, const float* sums, int64_t i,
                                   int64_t column) {
  constexpr int kPer = kPerChunk<N>;
  if (i >= p.own.count || column >= p.own.width) return;
  const int64_t at = i * p.own.width + column, of_own = i * p.own.stride + column;
  if (p.whole_own) {
    float x[kPer], own[kPer] = {};
    if (p.inverse) unpack<N>(*reinterpret_cast<const uint4*>(static_cast<const N*>(p.own.data) + of_own), own);
#pragma unroll
    for (int n = 0; n < kPer; n += 4) {
      const float4 four = *reinterpret_cast<const float4*>(sums + n);
      x[n] = four.x, x[n + 1] = four.y, x[n + 2] = four.z, x[n + 3] = four.w;
    }
#pragma unroll
    for (int n = 0; n < kPer; ++n) x[n] = finished(p, f, x[n], own[n]);
    *reinterpret_cast<uint4*>(static_cast<N*>(p.out) + at) = packed<N>(x);
    return;
  }
  for (int n = 0; n < kPer && column + n < p.own.width; ++n) {
    const float own = p.inverse ? element<float>(p.own.type, p.own.data, of_own + n) : 0.0f;
    store<float>(p.own.type, p.out, at + n, finished(p, f, sums[n], own));
  }
}

inline int most_shared() {
  int device = 0, bytes = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "shared memory");
  return bytes;
}

}  // namespace
}  // namespace cuda
}  // namespace kd
