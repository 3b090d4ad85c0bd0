// The host calls of the CUDA runtime. A stream is the order of the calls.
#include "include/cuda_runtime_api.h"
#include "state.h"

using namespace cuda_on_cpu;

static int status_of_images = 0;
cudaError_t image_status() { return static_cast<cudaError_t>(status_of_images); }

extern "C" {

cudaError_t cudaPeekAtLastError() { return error().empty() ? cudaSuccess : cudaErrorLaunchFailure; }
cudaError_t cudaGetLastError() { return cudaPeekAtLastError(); }
const char* cudaGetErrorString(cudaError_t status) {
  return status == cudaErrorLaunchFailure ? error().c_str() : status == cudaSuccess ? "no error" : "invalid value";
}

cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  memory::written_by_host(to, bytes, "cudaMemsetAsync");
  if (error().empty()) std::memset(to, value, bytes);
  return cudaGetLastError();
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  memory::written_by_host(to, bytes, "cudaMemcpyAsync");
  if (error().empty()) std::memcpy(to, from, bytes);
  return cudaGetLastError();
}

// ---- for a probe that Python loads without torch ----

#define PUBLIC __attribute__((visibility("default")))
PUBLIC const char* cuda_on_cpu_error() {
  static std::string text;
  text = error();
  forget_error();
  return text.c_str();
}
PUBLIC void cuda_on_cpu_allow(void* p, size_t bytes, int output) {
  memory::allow(p, bytes, output ? memory::readable | memory::writable : memory::readable | memory::written);
  memory::name_tensor(p, bytes);
}
PUBLIC void cuda_on_cpu_forget() { memory::forget_tensors(); }
PUBLIC void cuda_on_cpu_images(int status) { status_of_images = status; }
PUBLIC void cuda_on_cpu_reverse(int on) { reverse = on; }

}  // extern "C"
