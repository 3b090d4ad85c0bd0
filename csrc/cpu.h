// Helpers of the CPU kernels: scratch memory, threads, rows of any type.
#pragma once

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include <cstdlib>
#include <cstring>
#include <new>
#include <type_traits>

#include "arithmetic.h"

namespace kd {
namespace KD_ISA {
namespace {

constexpr int64_t kChunk = 512;  // numbers that are summed in their own precision before the sum goes on in double

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
  pool.run(
      count, max<int64_t>(grain, 1),
      [](int64_t begin, int64_t end, void* context) { (*static_cast<const F*>(context))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&f)));
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

// Asks for the memory 16 KB behind these bytes. The hardware looks ahead too, but stops at the end of every page.
inline void look_ahead(const void* from, int64_t bytes) {
  constexpr int64_t kAhead = 1 << 14, kLine = 64;
  const char* p = static_cast<const char*>(from) + kAhead;
  for (int64_t i = 0; i < bytes; i += kLine) __builtin_prefetch(p + i, 0, 2);  // 2: to the second cache
}

// f(begin, end) for blocks of 0 .. n, looking ahead in the rows that it reads.
template <typename F, typename... T>
inline void in_blocks(int64_t n, const F& f, const T*... rows) {
  constexpr int64_t kBlock = 256;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t end = min(n, begin + kBlock);
    (look_ahead(rows + begin, (end - begin) * int64_t(sizeof(T))), ...);
    f(begin, end);
  }
}

// fp16 to fp32 and back, sixteen at a time where the processor can; returns how many are done.
template <typename T>
inline int64_t widen_f16(const uint16_t* from, int64_t n, T* to) {
  int64_t i = 0;
#ifdef __AVX512F__
  if constexpr (std::is_same_v<T, float>)
    for (; i + 16 <= n; i += 16)
      _mm512_storeu_ps(to + i, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i))));
#else
  (void)from, (void)n, (void)to;
#endif
  return i;
}

template <typename T>
inline int64_t round_to_f16(const T* from, int64_t n, uint16_t* to) {
  int64_t i = 0;
#ifdef __AVX512F__
  if constexpr (std::is_same_v<T, float>)
    for (; i + 16 <= n; i += 16)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i),
                          _mm512_cvtps_ph(_mm512_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  (void)from, (void)n, (void)to;
#endif
  return i;
}

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
    look_ahead(half, 2 * n);
    if (dtype == DType::f16) {
#pragma omp simd
      for (int64_t i = widen_f16(half, n, buffer); i < n; ++i) buffer[i] = static_cast<T>(from_f16(half[i]));
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
      for (int64_t i = round_to_f16(from, n, half); i < n; ++i) half[i] = to_f16(static_cast<float>(from[i]));
    } else {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) half[i] = to_bf16(static_cast<float>(from[i]));
    }
  }
}

// Whether stream() can write these bytes and should: that is, if the call writes so many in `total` that the caches do
// not keep them until somebody reads them. Lines are written by one store each, or this is slower than store().
inline bool streams(const void* to, int64_t bytes, int64_t total) {
#ifdef __AVX512F__
  constexpr int64_t kCached = int64_t(1) << 24, kLine = 64;
  return total >= kCached && bytes % kLine == 0 && reinterpret_cast<uintptr_t>(to) % kLine == 0;
#else
  (void)to, (void)bytes, (void)total;
  return false;
#endif
}

// memcpy of whole cache lines past the caches, which else read each line before they write it. finish_streams() comes
// before other threads may read them.
inline void stream(void* to, const void* from, int64_t bytes) {
#ifdef __AVX512F__
  __m512i* out = static_cast<__m512i*>(to);
  for (int64_t i = 0; i < bytes / 64; ++i)
    _mm512_stream_si512(out + i, _mm512_loadu_si512(static_cast<const __m512i*>(from) + i));
#else
  std::memcpy(to, from, static_cast<size_t>(bytes));
#endif
}

inline void finish_streams() {
#ifdef __AVX512F__
  _mm_sfence();
#endif
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
