// Helpers of the CUDA kernels: reading any input type as T, block reductions in a fixed order, checked calls. numbers.h
// has on the CPU what arithmetic.h needs.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "common.h"

namespace kd {
namespace cuda {

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess)
    throw std::runtime_error(std::string("kdkernels: ") + what + ": " + cudaGetErrorString(status));
}

inline void check_launch(const char* kernel) { check(cudaGetLastError(), kernel); }

// Number `index` of an array as T. The type is the same for a whole launch, so the branch never diverges.
template <typename T>
__device__ inline T element(DType type, const void* data, int64_t i) {
  switch (type) {
    case DType::f16: return static_cast<T>(__half2float(static_cast<const __half*>(data)[i]));
    case DType::bf16: return static_cast<T>(__bfloat162float(static_cast<const __nv_bfloat16*>(data)[i]));
    case DType::f32: return static_cast<T>(static_cast<const float*>(data)[i]);
    default: return static_cast<T>(static_cast<const double*>(data)[i]);
  }
}

template <typename T>
__device__ inline void store(DType type, void* data, int64_t i, T x) {
  switch (type) {
    case DType::f16: static_cast<__half*>(data)[i] = __float2half_rn(static_cast<float>(x)); break;
    case DType::bf16: static_cast<__nv_bfloat16*>(data)[i] = __float2bfloat16_rn(static_cast<float>(x)); break;
    case DType::f32: static_cast<float*>(data)[i] = static_cast<float>(x); break;
    default: static_cast<double*>(data)[i] = static_cast<double>(x);
  }
}

template <typename T>
__device__ inline T fast_exp(T x) {
  return exp(x);
}
template <typename T>
__device__ inline T unit_log1p(T y) {
  return log1p(y);
}
template <typename T>
__device__ inline Exponentials<T> unit_exp(T x) {
  return {exp(x), expm1(x)};
}
template <typename T>
__device__ inline T unit_expm1(T x) {
  return x > T(-87) ? expm1(x) : T(-1);
}
template <typename T>
__device__ inline T log_1m(T y, T u) {
  return y < T(0.5) ? log1p(-y) : log(u);
}

__device__ inline float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }
__device__ inline double fused(double a, double b, double c) { return __fma_rn(a, b, c); }

// Divides by one number again and again: two fused multiply-adds round the product with its inverse as a division
// would.
template <typename T>
struct Divisor {
  T value, inverse;
  Divisor() = default;
  __device__ explicit Divisor(T value) : value(value), inverse(1 / value) {}
  __device__ T divide(T x) const {
    const T quotient = x * inverse;
    return fused(fused(-quotient, value, x), inverse, quotient);
  }
};

template <typename T>
__device__ inline T infinity() {
  return static_cast<T>(__longlong_as_double(0x7ff0000000000000ll));
}
template <typename T>
__device__ inline T not_a_number() {
  return static_cast<T>(__longlong_as_double(0x7ff8000000000000ll));
}

struct Add {
  template <typename T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};
struct Max {  // NaN does not count; it shows in the sums
  template <typename T>
  __device__ T operator()(T a, T b) const {
    return b > a ? b : a;
  }
};

// Reduces over groups of `width` neighbouring lanes (a power of two up to 32); every lane of a group gets the result.
template <typename T, typename Op>
__device__ inline T reduce_lanes(T x, int width, Op op) {
  for (int offset = width / 2; offset > 0; offset /= 2) x = op(x, __shfl_xor_sync(0xffffffffu, x, offset, width));
  return x;
}

// Reduces over a block of whole warps; every thread gets the result. `shared` holds 32 numbers. The order is fixed.
template <typename T, typename Op>
__device__ inline T reduce_block(T x, T* shared, T identity, Op op) {
  x = reduce_lanes(x, 32, op);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  __syncthreads();  // whoever used `shared` before is done
  if (lane == 0) shared[warp] = x;
  __syncthreads();
  return reduce_lanes(lane < warps ? shared[lane] : identity, 32, op);
}

}  // namespace cuda
}  // namespace kd
