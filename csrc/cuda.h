// The CUDA kernels' entry points, on raw pointers and a stream. They never allocate or synchronise: scratch memory comes from
// the caller, so that a CUDA graph can capture every call.
#pragma once

#include <cuda_runtime_api.h>

#include "angular_margin.h"
#include "gram.h"
#include "softmax_kl.h"

namespace kd {
namespace cuda {

// The device of a call, current for its duration, and PyTorch's current stream on it.
class Launch {
 public:
  explicit Launch(int device);
  ~Launch();
  Launch(const Launch&) = delete;
  Launch& operator=(const Launch&) = delete;
  cudaStream_t stream() const { return stream_; }

 private:
  int device_ = 0, before_ = 0;
  cudaStream_t stream_ = nullptr;
};

int64_t softmax_kl_workspace(const SoftmaxKlForward&);
void softmax_kl_forward(const SoftmaxKlForward&, bool fp64, const Launch&);
void softmax_kl_backward(const SoftmaxKlBackward&, bool fp64, const Launch&);

int64_t angular_margin_workspace(const AngularMargin&, bool fp64);
void angular_margin_forward(const AngularMargin&, bool fp64, const Launch&);
void angular_margin_backward(const AngularMargin&, bool fp64, const Launch&);

int64_t sp_workspace(const SpGram&, bool fp64);
void sp_forward(const SpGram&, bool fp64, const Launch&);
void sp_backward(const SpGram&, bool fp64, const Launch&);
int64_t cosine_workspace(const Cosine&);
void cosine_forward(const Cosine&, bool fp64, const Launch&);
void cosine_backward(const Cosine&, bool fp64, const Launch&);

}  // namespace cuda
}  // namespace kd
