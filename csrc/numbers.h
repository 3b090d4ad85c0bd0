// Numbers on the CPU: 16-bit formats, and exponentials and logarithms that loops vectorise; device.cuh is CUDA's side.
//
// Here and in everything else that is compiled per instruction set, functions are in the set's own, unnamed namespace:
// one that the linker could merge across sets would run AVX-512 code on a machine that has none. For the same reason
// nothing instantiates templates of the standard library.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "common.h"

#ifdef __FMA__
#define KD_FMA(a, b, c) __builtin_fmaf(a, b, c)
#else
#define KD_FMA(a, b, c) ((a) * (b) + (c))
#endif

namespace kd {
namespace KD_ISA {
namespace {

template <typename To, typename From>
inline To bits(From x) {
  static_assert(sizeof(To) == sizeof(From), "sizes differ");
  To y;
  std::memcpy(&y, &x, sizeof(y));
  return y;
}

// ---- 16-bit formats, by integer arithmetic that every instruction set can vectorise ----

inline float from_bf16(uint16_t x) { return bits<float>(static_cast<uint32_t>(x) << 16); }

inline float from_f16(uint16_t x) {
  const uint32_t magnitude = x & 0x7fffu;
  const uint32_t finite = bits<uint32_t>(bits<float>(magnitude << 13) * 0x1p112f);  // exact for subnormals too
  const uint32_t value = magnitude >= 0x7c00u ? finite | 0x7f800000u : finite;
  return bits<float>(value | static_cast<uint32_t>(x & 0x8000u) << 16);
}

inline uint16_t to_bf16(float x) {  // to nearest, ties to even
  const uint32_t b = bits<uint32_t>(x);
  const uint32_t rounded = (b + 0x7fffu + (b >> 16 & 1u)) >> 16;
  return static_cast<uint16_t>((b & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

inline uint16_t to_f16(float x) {  // to nearest, ties to even
  const uint32_t b = bits<uint32_t>(x), magnitude = b & 0x7fffffffu;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  const uint32_t subnormal = bits<uint32_t>(bits<float>(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t value = magnitude < 0x38800000u ? subnormal : normal;
  value = magnitude >= 0x47800000u ? 0x7c00u : value;
  value = magnitude > 0x7f800000u ? 0x7e00u : value;
  return static_cast<uint16_t>(value | (b >> 16 & 0x8000u));
}

// Number `index` of an array as T.
template <typename T>
inline T element(DType type, const void* data, int64_t index) {
  switch (type) {
    case DType::f16: return static_cast<T>(from_f16(static_cast<const uint16_t*>(data)[index]));
    case DType::bf16: return static_cast<T>(from_bf16(static_cast<const uint16_t*>(data)[index]));
    case DType::f32: return static_cast<T>(static_cast<const float*>(data)[index]);
    default: return static_cast<T>(static_cast<const double*>(data)[index]);
  }
}

// ---- functions that loops over float vectorise; over double they are the library's ----

inline double fast_exp(double x) { return std::exp(x); }

// exp(x) as (1 + p) 2^n, p from a polynomial on [-ln 2 / 2, ln 2 / 2]
struct ReducedExp {
  float p, power;
};
KD_BOTH inline ReducedExp reduced_exp(float x) {
  const float shifted = KD_FMA(x, 1.44269504088896341f, 12582912.0f);  // 1.5 * 2^23 rounds to an integer
  const float n = shifted - 12582912.0f;
  float r = KD_FMA(n, -0.693359375f, x);
  r = KD_FMA(n, 2.12194440e-4f, r);
  float p = 1.9875691500e-4f;
  p = KD_FMA(p, r, 1.3981999507e-3f);
  p = KD_FMA(p, r, 8.3334519073e-3f);
  p = KD_FMA(p, r, 4.1665795894e-2f);
  p = KD_FMA(p, r, 1.6666665459e-1f);
  p = KD_FMA(p, r, 5.0000001201e-1f);
  return {KD_FMA(p, r * r, r), bits<float>((bits<uint32_t>(shifted) + 127u) << 23)};
}

// exp of x <= 0 to 1 ulp or so. Results below 2^-126 are 0, NaN stays NaN, and x > 88 gives nonsense: every caller has
// its maximum subtracted, or throws such a result away.
KD_BOTH inline float fast_exp(float x) {
  const ReducedExp e = reduced_exp(x);
  return x < -87.33654f ? 0.0f : (e.p + 1.0f) * e.power;
}

// exp(x) and exp(x) - 1 of x <= 0, each to its own digits
KD_BOTH inline Exponentials<float> unit_exp(float x) {
  const ReducedExp e = reduced_exp(x);
  const bool none = x < -87.33654f;
  return {none ? 0.0f : (e.p + 1.0f) * e.power, none ? -1.0f : KD_FMA(e.p, e.power, e.power - 1.0f)};
}
inline Exponentials<double> unit_exp(double x) { return {std::exp(x), std::expm1(x)}; }

// exp(x) - 1 of x <= 0, and -1 of NaN
KD_BOTH inline float unit_expm1(float x) {
  const ReducedExp e = reduced_exp(x > -87.0f ? x : -87.0f);
  return KD_FMA(e.p, e.power, e.power - 1.0f);
}
inline double unit_expm1(double x) { return x > -700 ? std::expm1(x) : -1; }

inline double unit_log1p(double y) { return std::log1p(y); }

// log(1 + y) for y in [0, 1] to 1 ulp or so, as 2 atanh of (1 + y - a) / (1 + y + a) with a = 1, or 2 above sqrt 2
KD_BOTH inline float unit_log1p(float y) {
  const bool high = y > 0.41421356f;
  const float top = high ? y - 1.0f : y, bottom = high ? y + 3.0f : y + 2.0f;
  const float z = top / bottom, w = z * z;
  float p = 0.1111111111f;
  p = KD_FMA(p, w, 0.1428571429f);
  p = KD_FMA(p, w, 0.2f);
  p = KD_FMA(p, w, 0.3333333333f);
  const float value = 2.0f * KD_FMA(p * w, z, z);
  return high ? value + 0.69314718056f : value;
}

inline double log_1m(double y, double u) { return y < 0.5 ? std::log1p(-y) : std::log(u); }

// log(1 - y) of y in [0, 1) to 2 ulp or so, given u = 1 - y too: k ln 2 + 2 atanh(f / (2 + f)), u = 2^k (1 + f). NaN
// stays
KD_BOTH inline float log_1m(float y, float u) {
  const uint32_t b = bits<uint32_t>(u) + (0x3f800000u - 0x3f3504f3u);  // 1 + f in [1 / sqrt 2, sqrt 2)
  const float k = static_cast<float>(static_cast<int32_t>(b >> 23) - 127);
  const float f = k == 0.0f ? -y : bits<float>((b & 0x7fffffu) + 0x3f3504f3u) - 1.0f;
  const float z = f / (2.0f + f), w = z * z;
  float p = 0.1111111111f;
  p = KD_FMA(p, w, 0.1428571429f);
  p = KD_FMA(p, w, 0.2f);
  p = KD_FMA(p, w, 0.3333333333f);
  const float value = KD_FMA(k, 0.69314718056f, 2.0f * KD_FMA(p * w, z, z));
  return u == u ? value : u;
}

}  // namespace
}  // namespace KD_ISA
}  // namespace kd
