// Whether this library's code can run on the current device: asked before anything is launched, once per device.
#include <cuda_runtime.h>

#include "cuda.h"

namespace kd {
namespace cuda {
namespace {

// Compiled for the same devices as all other kernels, and never launched.
__global__ void probe_kernel() {}

}  // namespace

int image_status() {
  cudaFuncAttributes attributes;
  const cudaError_t status = cudaFuncGetAttributes(&attributes, probe_kernel);
  (void)cudaGetLastError();  // nobody's next call has failed because of this one
  return static_cast<int>(status);
}

}  // namespace cuda
}  // namespace kd
