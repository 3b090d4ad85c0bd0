// Helpers of the CPU kernels. Everything is static and inside the instruction set's own namespace: a function that the
// linker could merge across instruction sets would run AVX-512 code on a machine that has none. For the same reason
// nothing here instantiates templates of the standard library.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

#include "common.h"

#ifndef KD_ISA
#define KD_ISA base
#endif

#ifdef __FMA__
#define KD_FMA(a, b, c) __builtin_fmaf(a, b, c)
#else
#define KD_FMA(a, b, c) ((a) * (b) + (c))
#endif

namespace kd {
namespace KD_ISA {
namespace {

constexpr int64_t kChunk = 512;  // numbers that are summed in their own precision before the sum goes on in double

template <typename T>
inline T min(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
inline T max(T a, T b) {
  return a < b ? b : a;
}

template <typename To, typename From>
inline To bits(From x) {
  static_assert(sizeof(To) == sizeof(From), "sizes differ");
  To y;
  std::memcpy(&y, &x, sizeof(y));
  return y;
}

// Uninitialised, cache-line aligned scratch memory.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t count) {
    const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 127) / 64 * 64;
    data_ = static_cast<T*>(std::aligned_alloc(64, bytes));
    if (!data_) throw std::bad_alloc();
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(data_); }
  operator T*() const { return data_; }

 private:
  T* data_;
};

template <typename F>
inline void parallel(const Pool& pool, int64_t count, int64_t grain, const F& f) {
  if (count <= 0) return;
  pool.run(count, max<int64_t>(grain, 1),
           [](int64_t begin, int64_t end, void* context) { (*static_cast<const F*>(context))(begin, end); },
           const_cast<void*>(static_cast<const void*>(&f)));
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

template <typename T>
struct IsDType;
template <>
struct IsDType<float> {
  static constexpr DType value = DType::f32;
};
template <>
struct IsDType<double> {
  static constexpr DType value = DType::f64;
};

inline int64_t item_size(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

// n numbers from element `offset` on as T, converted into `buffer` unless they are T already.
template <typename T>
inline const T* load(DType dtype, const void* base, int64_t offset, int64_t n, T* buffer) {
  const char* p = static_cast<const char*>(base) + offset * item_size(dtype);
  if (dtype == IsDType<T>::value) return reinterpret_cast<const T*>(p);
  if (dtype == DType::f32 || dtype == DType::f64) {
    for (int64_t i = 0; i < n; ++i)
      buffer[i] = dtype == DType::f32 ? static_cast<T>(reinterpret_cast<const float*>(p)[i])
                                      : static_cast<T>(reinterpret_cast<const double*>(p)[i]);
  } else {
    const uint16_t* half = reinterpret_cast<const uint16_t*>(p);
    if (dtype == DType::f16) {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) buffer[i] = static_cast<T>(from_f16(half[i]));
    } else {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) buffer[i] = static_cast<T>(from_bf16(half[i]));
    }
  }
  return buffer;
}

// Where a kernel writes n numbers: the output itself if it holds T, else `buffer`, which store() then converts.
template <typename T>
inline T* destination(DType dtype, void* base, int64_t offset, T* buffer) {
  return dtype == IsDType<T>::value ? static_cast<T*>(base) + offset : buffer;
}

template <typename T>
inline void store(DType dtype, void* base, int64_t offset, int64_t n, const T* from) {
  if (dtype == IsDType<T>::value) {
    T* to = static_cast<T*>(base) + offset;
    if (to != from) std::memcpy(to, from, static_cast<size_t>(n) * sizeof(T));
  } else if (dtype == DType::f32) {
    for (int64_t i = 0; i < n; ++i) static_cast<float*>(base)[offset + i] = static_cast<float>(from[i]);
  } else if (dtype == DType::f64) {
    for (int64_t i = 0; i < n; ++i) static_cast<double*>(base)[offset + i] = static_cast<double>(from[i]);
  } else {
    uint16_t* half = static_cast<uint16_t*>(base) + offset;
    if (dtype == DType::f16) {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) half[i] = to_f16(static_cast<float>(from[i]));
    } else {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) half[i] = to_bf16(static_cast<float>(from[i]));
    }
  }
}

template <typename T>
inline double read(DType dtype, const void* base, int64_t index) {
  T buffer;
  return static_cast<double>(*load<T>(dtype, base, index, 1, &buffer));
}

// ---- functions that loops over float vectorise; over double they are the library's ----

inline double fast_exp(double x) { return std::exp(x); }

// exp of x <= 0 to 1 ulp or so: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2]. Results below 2^-126 are 0, NaN stays
// NaN, and x > 88 gives nonsense: every caller has its maximum subtracted, or throws such a result away.
inline float fast_exp(float x) {
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
  p = KD_FMA(p, r * r, r) + 1.0f;
  const float power = bits<float>((bits<uint32_t>(shifted) + 127u) << 23);
  p *= power;
  return x < -87.33654f ? 0.0f : p;
}

template <typename T>
inline T largest(const T* x, int64_t n) {  // NaN does not count here; it shows in the sums
  T top = -HUGE_VALF;
#pragma omp simd reduction(max : top)
  for (int64_t i = 0; i < n; ++i) top = x[i] > top ? x[i] : top;
  return top;
}

}  // namespace
}  // namespace KD_ISA
}  // namespace kd
