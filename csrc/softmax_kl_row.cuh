// Rows of softmax_kl on CUDA: which threads share one, and how they read it.
#pragma once

#include "divergences.h"
#include "softmax_kl_gradient.h"

namespace kd {
namespace cuda {
namespace {

constexpr int kWarpRow = 2048;  // classes up to which one warp takes a row
constexpr int kWarpThreads = 128, kBlockThreads = 256, kSumThreads = 1024;

// The threads that share a row.
template <typename T, bool WARP>
struct Team {
  int64_t row;
  int rank, size;
  double* shared;
  __device__ explicit Team(double* s)
      : row(WARP ? int64_t(blockIdx.x) * (kWarpThreads / 32) + threadIdx.x / 32 : int64_t(blockIdx.x)),
        rank(WARP ? threadIdx.x % 32 : threadIdx.x),
        size(WARP ? 32 : kBlockThreads),
        shared(s) {}
  __device__ double sum(double x) const {
    return WARP ? reduce_lanes(x, 32, Add()) : reduce_block(x, shared, 0.0, Add());
  }
  __device__ void wait() const { WARP ? __syncwarp() : __syncthreads(); }
  __device__ T max(T x) const {
    return WARP ? reduce_lanes(x, 32, Max())
                : static_cast<T>(reduce_block(static_cast<double>(x), shared, -infinity<double>(), Max()));
  }
};

// One network's logits of one row.
template <typename T>
struct Logits {
  const void* data;
  DType type;
  int64_t first;
  __device__ T operator[](int64_t k) const { return element<T>(type, data, first + k); }
};

template <typename T>
__device__ Logits<T> student_of(const SoftmaxKl& x, int64_t row) {
  return {x.student, x.student_type, row * x.student_stride};
}
template <typename T>
__device__ Logits<T> teacher_of(const SoftmaxKl& x, int64_t row) {
  return {x.teacher, x.teacher_type, row * x.teacher_stride};
}

// The divergence is the same for a whole launch, so these branches never diverge.
template <typename T>
__device__ Part<T> class_part(Divergence divergence, T d, T p, T q, const Shares<T>& shares) {
  switch (divergence) {
    case Divergence::reverse: return part<Divergence::reverse>(d, p, q, shares);
    case Divergence::jsd: return part<Divergence::jsd>(d, p, q, shares);
    case Divergence::skew: return part<Divergence::skew>(d, p, q, shares);
    default: return part<Divergence::skew_reverse>(d, p, q, shares);
  }
}
template <typename T>
__device__ T class_slope(Divergence divergence, T d, const Shares<T>& shares) {
  switch (divergence) {
    case Divergence::reverse: return slope<Divergence::reverse>(d, shares);
    case Divergence::jsd: return slope<Divergence::jsd>(d, shares);
    case Divergence::skew: return slope<Divergence::skew>(d, shares);
    default: return slope<Divergence::skew_reverse>(d, shares);
  }
}

template <typename T>
__device__ T dense_target(const SoftmaxKl& x, int64_t row, int64_t k) {
  return element<T>(x.dense_type, x.dense, row * x.dense_stride + k);
}

}  // namespace
}  // namespace cuda
}  // namespace kd
