// Numbers of an array that one instruction reads or writes: 16 bytes where the array is aligned, else one number.
#pragma once

#include "device.cuh"

namespace kd {
namespace cuda {
namespace {

template <typename E, int kCount>
struct alignas(sizeof(E) * kCount) Pack {
  using Element = E;
  static constexpr int kSize = kCount;
  E x[kCount];
};

template <typename T>
__device__ inline T number(__half x) {
  return static_cast<T>(__half2float(x));
}
template <typename T>
__device__ inline T number(__nv_bfloat16 x) {
  return static_cast<T>(__bfloat162float(x));
}
template <typename T>
__device__ inline T number(float x) {
  return static_cast<T>(x);
}
template <typename T>
__device__ inline T number(double x) {
  return static_cast<T>(x);
}

template <typename T>
__device__ inline void round_to(T x, __half& to) {
  to = __float2half_rn(static_cast<float>(x));
}
template <typename T>
__device__ inline void round_to(T x, __nv_bfloat16& to) {
  to = __float2bfloat16_rn(static_cast<float>(x));
}
template <typename T>
__device__ inline void round_to(T x, float& to) {
  to = static_cast<float>(x);
}
template <typename T>
__device__ inline void round_to(T x, double& to) {
  to = static_cast<double>(x);
}

// Calls f with an empty pack of the array's type: one compiled variant each. T is double only if f64 can occur.
template <typename T, typename F>
__device__ inline void with_pack(DType type, bool wide, const F& f) {
  switch (type) {
    case DType::f16:
      if (wide) return f(Pack<__half, 8>{});
      return f(Pack<__half, 1>{});
    case DType::bf16:
      if (wide) return f(Pack<__nv_bfloat16, 8>{});
      return f(Pack<__nv_bfloat16, 1>{});
    case DType::f32:
      if (wide) return f(Pack<float, 4>{});
      return f(Pack<float, 1>{});
    case DType::f64:
      if constexpr (sizeof(T) == sizeof(double)) {
        if (wide) return f(Pack<double, 2>{});
        return f(Pack<double, 1>{});
      }
  }
}

constexpr int kAhead = 4;  // loads of a thread in flight

// use(pack, i) for i < count, of packs that are `step` apart
template <typename P, typename F>
__device__ inline void read_ahead(const P* from, int count, int64_t step, const F& use) {
  for (int i = 0; i < count; i += kAhead, from += kAhead * step) {
    P ahead[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k)
      if (i + k < count) ahead[k] = from[k * step];
#pragma unroll
    for (int k = 0; k < kAhead; ++k)
      if (i + k < count) use(ahead[k], i + k);
  }
}

}  // namespace
}  // namespace cuda
}  // namespace kd
