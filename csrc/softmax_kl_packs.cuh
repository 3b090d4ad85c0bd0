// 16 bytes of logits: what a thread of softmax_kl loads and stores at a time on CUDA, and the numbers in it.
#pragma once

#include <cstring>

#include "device.cuh"

namespace kd {
namespace cuda {
namespace {

template <typename To, typename From>
__device__ inline To bits_as(From x) {
  static_assert(sizeof(To) == sizeof(From), "sizes differ");
  To y;
  memcpy(&y, &x, sizeof(y));
  return y;
}

// 2^x by the special-function unit, to 2 ulp; results below 2^-126 are 0
#ifdef __NVCC__
__device__ inline float exp2_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
#else
inline float exp2_of(float x) { return x < -126 ? 0.0f : exp2f(x); }
#endif
__device__ inline double exp2_of(double x) { return exp2(x); }

// By dtype: `count` numbers of type T in a pack. `pop` takes the first one out and `push` puts one behind the last, for
// loops that are too large to be unrolled: a register has no index.
template <DType D>
struct Pack {  // of 16-bit numbers
  using T = float;
  static constexpr int count = 8;

  __device__ static float2 split(unsigned word) {
    if constexpr (D == DType::bf16) return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
    else return __half22float2(bits_as<__half2>(word));
  }
  __device__ static unsigned join(T x, T y) {
    if constexpr (D == DType::bf16) return bits_as<unsigned>(__floats2bfloat162_rn(x, y));
    else return bits_as<unsigned>(__floats2half2_rn(x, y));
  }
  __device__ static void split(const uint4& p, T (&x)[count]) {
    const unsigned words[4] = {p.x, p.y, p.z, p.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = split(words[i]);
      x[2 * i] = pair.x;
      x[2 * i + 1] = pair.y;
    }
  }
  __device__ static uint4 join(const T (&x)[count]) {
    return {join(x[0], x[1]), join(x[2], x[3]), join(x[4], x[5]), join(x[6], x[7])};
  }
  __device__ static uint4 shifted(const uint4& p, unsigned behind) {
    return {p.x >> 16 | p.y << 16, p.y >> 16 | p.z << 16, p.z >> 16 | p.w << 16, p.w >> 16 | behind << 16};
  }
  __device__ static T pop(uint4& p) {
    const T first = split(p.x).x;
    p = shifted(p, 0);
    return first;
  }
  __device__ static void push(uint4& p, T x) { p = shifted(p, join(x, 0)); }
};

template <>
struct Pack<DType::f32> {
  using T = float;
  static constexpr int count = 4;

  __device__ static void split(const uint4& p, T (&x)[count]) {
    const unsigned words[4] = {p.x, p.y, p.z, p.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = __uint_as_float(words[i]);
  }
  __device__ static uint4 join(const T (&x)[count]) {
    return {__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]), __float_as_uint(x[3])};
  }
  __device__ static T pop(uint4& p) {
    const T first = __uint_as_float(p.x);
    p = {p.y, p.z, p.w, 0};
    return first;
  }
  __device__ static void push(uint4& p, T x) { p = {p.y, p.z, p.w, __float_as_uint(x)}; }
};

template <>
struct Pack<DType::f64> {
  using T = double;
  static constexpr int count = 2;

  __device__ static T number(unsigned low, unsigned high) {
    return __longlong_as_double(static_cast<long long>(static_cast<uint64_t>(high) << 32 | low));
  }
  __device__ static void split(const uint4& p, T (&x)[count]) {
    x[0] = number(p.x, p.y);
    x[1] = number(p.z, p.w);
  }
  __device__ static uint4 join(const T (&x)[count]) {
    uint4 p = {};
    push(p, x[0]);
    push(p, x[1]);
    return p;
  }
  __device__ static T pop(uint4& p) {
    const T first = number(p.x, p.y);
    p = {p.z, p.w, 0, 0};
    return first;
  }
  __device__ static void push(uint4& p, T x) {
    const uint64_t b = static_cast<uint64_t>(__double_as_longlong(x));
    p = {p.z, p.w, static_cast<unsigned>(b), static_cast<unsigned>(b >> 32)};
  }
};

}  // namespace
}  // namespace cuda
}  // namespace kd
