// The CUDA kernels' entry points, on raw pointers and a stream. They never allocate or synchronise: scratch memory
// comes from the caller, so that a CUDA graph can capture every call.
#pragma once

#include <cuda_runtime_api.h>

#include "angular_margin.h"
#include "energy.h"
#include "gram.h"
#include "softmax_kl.h"

namespace kd {
namespace cuda {

// The device of a call, current for its duration by PyTorch's own guard, and PyTorch's current stream on it.
class Launch {
 public:
  explicit Launch(int device);
  ~Launch();
  Launch(const Launch&) = delete;
  Launch& operator=(const Launch&) = delete;
  cudaStream_t stream() const { return stream_; }

 private:
  cudaStream_t stream_ = nullptr;
  void* guard_ = nullptr;
};

// cudaSuccess if the current device and its driver can run the kernels of this library, else what is wrong.
int image_status();

// Bytes of scratch memory that a call needs.
inline int64_t workspace(const Call&) { return 0; }
int64_t workspace(const SoftmaxKlForward&);
int64_t workspace(const Grams&);
int64_t workspace(const SpForward&);
int64_t workspace(const SpFromGrams&);
int64_t workspace(const Products&);
int64_t workspace(const CosineForward&);
int64_t workspace(const CosineBackward&);
int64_t workspace(const Energies&);
int64_t workspace(const AttentionForward&);
int64_t workspace(const AngularMarginForward&);

void compute(const SoftmaxKlForward&, const Launch&);
void compute(const SoftmaxKlBackward&, const Launch&);
void compute(const Grams&, const Launch&);
void compute(const SpForward&, const Launch&);
void compute(const SpFromGrams&, const Launch&);
void compute(const SpBackward&, const Launch&);
void compute(const Products&, const Launch&);
void compute(const CosineForward&, const Launch&);
void compute(const CosineBackward&, const Launch&);
void compute(const Energies&, const Launch&);
void compute(const AttentionForward&, const Launch&);
void compute(const MapBackward&, const Launch&);
void compute(const AngularMarginForward&, const Launch&);

}  // namespace cuda
}  // namespace kd
