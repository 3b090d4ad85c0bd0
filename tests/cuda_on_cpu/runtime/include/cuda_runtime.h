// The CUDA language, as far as csrc uses it, in C++ on the executor. Add what a source comes to need.
#pragma once

#include <assert.h>
#include <math.h>

#include <algorithm>

#include "cuda_runtime_api.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __restrict__ __restrict
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

// ---- vectors ----

#define CUDA_ON_CPU_VECTORS(type, name, two, four)              \
  struct alignas(two) name##2 {                                 \
    type x, y;                                                  \
  };                                                            \
  struct alignas(four) name##4 {                                \
    type x, y, z, w;                                            \
  };                                                            \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; } \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
CUDA_ON_CPU_VECTORS(float, float, 8, 16)
CUDA_ON_CPU_VECTORS(int, int, 8, 16)
CUDA_ON_CPU_VECTORS(unsigned, uint, 8, 16)
CUDA_ON_CPU_VECTORS(unsigned short, ushort, 4, 8)
CUDA_ON_CPU_VECTORS(double, double, 16, 16)

// ---- arithmetic ----

using std::max;
using std::min;

template <typename To, typename From>
inline To cuda_on_cpu_bits(From x) {
  static_assert(sizeof(To) == sizeof(From));
  return __builtin_bit_cast(To, x);
}
inline double __longlong_as_double(long long x) { return cuda_on_cpu_bits<double>(x); }
inline long long __double_as_longlong(double x) { return cuda_on_cpu_bits<long long>(x); }
inline float __int_as_float(int x) { return cuda_on_cpu_bits<float>(x); }
inline float __uint_as_float(unsigned x) { return cuda_on_cpu_bits<float>(x); }
inline int __float_as_int(float x) { return cuda_on_cpu_bits<int>(x); }
inline unsigned __float_as_uint(float x) { return cuda_on_cpu_bits<unsigned>(x); }

inline float rsqrtf(float x) { return 1 / sqrtf(x); }
inline float rsqrt(float x) { return 1 / sqrtf(x); }
inline double rsqrt(double x) { return 1 / sqrt(x); }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1 / x; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline double __fma_rn(double a, double b, double c) { return fma(a, b, c); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }

template <typename T>
inline T __ldg(const T* p) {
  return *p;
}
template <typename T>
inline T __ldcg(const T* p) {
  return *p;
}
template <typename T>
inline T __ldcs(const T* p) {
  return *p;
}
template <typename T>
inline void __stcs(T* p, T x) {
  *p = x;
}
template <typename T>
inline void __stcg(T* p, T x) {
  *p = x;
}

// ---- waiting for each other ----

inline void __syncthreads(CUDA_ON_CPU_SITE) { cuda_on_cpu::barrier(site, cuda_on_cpu::Vote::none, false); }
inline int __syncthreads_or(int x, CUDA_ON_CPU_SITE) { return cuda_on_cpu::barrier(site, cuda_on_cpu::Vote::any, x); }
inline int __syncthreads_and(int x, CUDA_ON_CPU_SITE) { return cuda_on_cpu::barrier(site, cuda_on_cpu::Vote::all, x); }
inline int __syncthreads_count(int x, CUDA_ON_CPU_SITE) { return cuda_on_cpu::barrier(site, cuda_on_cpu::Vote::count, x); }
inline void __syncwarp(unsigned mask = 0xffffffffu, CUDA_ON_CPU_SITE) {
  cuda_on_cpu::leave(cuda_on_cpu::meet(mask, nullptr, 0, site, cuda_on_cpu::Orders::memory));
}
inline void __threadfence() { cuda_on_cpu::fence(); }
inline void __threadfence_block() {}
inline unsigned __activemask() { return cuda_on_cpu::active_lanes(); }

template <typename T>
inline T __shfl_sync(unsigned mask, T x, int from, int width = 32, CUDA_ON_CPU_SITE) {
  const int me = cuda_on_cpu::lane(), first = me / width * width;
  return cuda_on_cpu::exchange(mask, x, site, [&](auto read) { return read(first + (from & (width - 1))); });
}
template <typename T>
inline T __shfl_xor_sync(unsigned mask, T x, int with, int width = 32, CUDA_ON_CPU_SITE) {
  const int me = cuda_on_cpu::lane(), from = me ^ with;  // beyond the own group's end: one's own; groups before are allowed
  return cuda_on_cpu::exchange(mask, x, site, [&](auto read) { return read(from < (me / width + 1) * width ? from : me); });
}
template <typename T>
inline T __shfl_down_sync(unsigned mask, T x, unsigned by, int width = 32, CUDA_ON_CPU_SITE) {
  const int me = cuda_on_cpu::lane(), from = me + static_cast<int>(by);
  return cuda_on_cpu::exchange(mask, x, site, [&](auto read) { return read(from / width == me / width ? from : me); });
}
template <typename T>
inline T __shfl_up_sync(unsigned mask, T x, unsigned by, int width = 32, CUDA_ON_CPU_SITE) {
  const int me = cuda_on_cpu::lane(), from = me - static_cast<int>(by);
  return cuda_on_cpu::exchange(mask, x, site, [&](auto read) { return read(from >= me / width * width ? from : me); });
}
inline unsigned __ballot_sync(unsigned mask, int x, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::exchange(mask, x != 0, site, [&](auto read) {
    unsigned lanes = 0;
    for (unsigned l = 0; l < 32; ++l)
      if (mask >> l & 1 && read(l) == true) lanes |= 1u << l;
    return lanes;
  });
}
inline int __any_sync(unsigned mask, int x, CUDA_ON_CPU_SITE) { return __ballot_sync(mask, x, site) != 0; }
inline int __all_sync(unsigned mask, int x, CUDA_ON_CPU_SITE) { return __ballot_sync(mask, !x, site) == 0; }

// ---- atomics: one fiber runs at a time ----

template <typename T, typename Change>
__attribute__((no_sanitize("thread"))) inline T cuda_on_cpu_atomic(T* p, Change change) {
  cuda_on_cpu::note_atomic(p, sizeof(T));
  const T before = *p;
  *p = change(before);
  return before;
}
template <typename T>
inline T atomicAdd(T* p, std::common_type_t<T> x) {
  return cuda_on_cpu_atomic(p, [=](T old) { return old + x; });
}
template <typename T>
inline T atomicMax(T* p, std::common_type_t<T> x) {
  return cuda_on_cpu_atomic(p, [=](T old) { return max(old, x); });
}
template <typename T>
inline T atomicMin(T* p, std::common_type_t<T> x) {
  return cuda_on_cpu_atomic(p, [=](T old) { return min(old, x); });
}
template <typename T>
inline T atomicExch(T* p, std::common_type_t<T> x) {
  return cuda_on_cpu_atomic(p, [=](T) { return x; });
}
template <typename T>
inline T atomicCAS(T* p, std::common_type_t<T> expected, std::common_type_t<T> x) {
  return cuda_on_cpu_atomic(p, [=](T old) { return old == expected ? x : old; });
}
inline unsigned atomicInc(unsigned* p, unsigned last) {
  return cuda_on_cpu::arrived(cuda_on_cpu_atomic(p, [=](unsigned old) { return old >= last ? 0 : old + 1; }), last);
}
