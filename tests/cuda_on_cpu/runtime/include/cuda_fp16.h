// __half: storage and the conversions that csrc uses. Add what a source comes to need.
#pragma once

#include "cuda_runtime.h"

struct alignas(2) __half {
  unsigned short bits;
};
struct alignas(4) __half2 {
  __half x, y;
};
using half = __half;
using half2 = __half2;

inline float __half2float(__half h) {
  const unsigned sign = (h.bits & 0x8000u) << 16, rest = h.bits & 0x7fffu;
  if (rest >= 0x7c00u) return __uint_as_float(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  // as if the exponents had the same bias; the product sets that right, and subnormal numbers with it
  return __uint_as_float(sign | __float_as_uint(__uint_as_float(rest << 13) * 0x1p112f));
}

inline __half __float2half_rn(float x) {
  const unsigned bits = __float_as_uint(x), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  unsigned out;
  if (magnitude > 0x7f800000u) out = 0x7fffu;
  else if (magnitude >= 0x477ff000u) out = 0x7c00u;  // 65520 and more
  else if (magnitude < 0x38800000u) out = static_cast<unsigned>(nearbyintf(__uint_as_float(magnitude) * 0x1p24f));
  else out = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1)) >> 13;
  return {static_cast<unsigned short>(sign | out)};
}
inline __half __float2half(float x) { return __float2half_rn(x); }
inline float2 __half22float2(__half2 h) { return {__half2float(h.x), __half2float(h.y)}; }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
inline unsigned short __half_as_ushort(__half h) { return h.bits; }
inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
inline float __low2float(__half2 h) { return __half2float(h.x); }
inline float __high2float(__half2 h) { return __half2float(h.y); }
