// The ops as torch sees them: schemas, and by way of the bindings_*.h checks, allocation, and calls of the kernels. The
// only file that is compiled with torch's headers.
#include "bindings_angular_margin.h"
#include "bindings_energy.h"
#include "bindings_gram.h"
#include "bindings_softmax_kl.h"
#include "boxing.h"

#ifdef KD_CUDA
// Lives in libtorch_cuda: weak, so that the library loads on a torch without it, where no tensor is on CUDA.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace kd {
namespace cuda {

void check_status(cudaError_t status, const char* what) {
  STD_TORCH_CHECK(status == cudaSuccess, "kdkernels: ", what, ": ", cudaGetErrorString(status));
}

Launch::Launch(int device) : device_(device) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream, "kdkernels: this torch has no CUDA");
  check_status(cudaGetDevice(&before_), "cudaGetDevice");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  stream_ = static_cast<cudaStream_t>(stream);
  if (before_ != device_) check_status(cudaSetDevice(device_), "cudaSetDevice");
}

Launch::~Launch() {
  if (before_ != device_) (void)cudaSetDevice(before_);
}

}  // namespace cuda
}  // namespace kd
#endif

namespace {

using torch::stable::detail::StableLibrary;

void define(StableLibrary& m) {
  const std::string softmax_kl =
      "Tensor student, Tensor teacher, Tensor? target, Tensor? mixed, Tensor? lam, int ignore_index, "
      "float smoothing, float ce, float kl, float target_kl, float non_target_kl, float temperature, str reduction";
  const std::string sp = "str row_norm, float[] scales, float eps, bool zero_row_grad, bool per_layer, bool need_grad";
  const std::string schemas[] = {
      "softmax_kl_forward(" + softmax_kl + ", bool need_grad) -> (Tensor loss, Tensor stats, Tensor scale)",
      "softmax_kl_backward(Tensor grad, " + softmax_kl + ", Tensor stats, Tensor scale) -> Tensor",
      "gram_grams(Tensor[] features) -> Tensor",
      "gram_sp_forward(Tensor[] student, Tensor[] teacher, " + sp + ") -> (Tensor loss, Tensor gradient_matrix)",
      "gram_sp_from_grams(Tensor grams, " + sp + ") -> (Tensor loss, Tensor gradient_matrix)",
      "gram_sp_backward(Tensor grad, Tensor[] student, Tensor gradient_matrix) -> Tensor[]",
      "gram_products(Tensor a, Tensor b) -> (Tensor products, Tensor squares_a, Tensor squares_b)",
      "gram_cosine_forward(Tensor a, Tensor b) -> (Tensor similarity, Tensor inverse_a, Tensor inverse_b)",
      "gram_cosine_backward(Tensor grad, Tensor a, Tensor b, Tensor similarity, Tensor inverse_a, Tensor inverse_b) "
      "-> (Tensor, Tensor)",
      "angular_margin_forward(Tensor[] student, Tensor[] teacher, float[] factors, float margin, float sharpness, "
      "float local_weight, bool per_layer, bool per_sample, bool need_grad) -> (Tensor loss, Tensor kappa)",
      "energy_energies(Tensor activation) -> Tensor",
      "energy_forward(Tensor[] student, Tensor[] teacher, float[] factors, bool absolute, bool per_layer, "
      "bool per_sample, bool need_grad) -> (Tensor loss, Tensor kappa)",
      "energy_backward(Tensor grad, Tensor[] student, Tensor kappa) -> Tensor[]",
  };
  for (const std::string& schema : schemas) m.def(schema.c_str());
}

void implement(StableLibrary& m) {
  m.impl("softmax_kl_forward", kd::boxed<kd::softmax_kl_forward>);
  m.impl("softmax_kl_backward", kd::boxed<kd::softmax_kl_backward>);
  m.impl("gram_grams", kd::boxed<kd::gram_grams>);
  m.impl("gram_sp_forward", kd::boxed<kd::gram_sp_forward>);
  m.impl("gram_sp_from_grams", kd::boxed<kd::gram_sp_from_grams>);
  m.impl("gram_sp_backward", kd::boxed<kd::gram_sp_backward>);
  m.impl("gram_products", kd::boxed<kd::gram_products>);
  m.impl("gram_cosine_forward", kd::boxed<kd::gram_cosine_forward>);
  m.impl("gram_cosine_backward", kd::boxed<kd::gram_cosine_backward>);
  m.impl("angular_margin_forward", kd::boxed<kd::angular_margin_forward>);
  m.impl("energy_energies", kd::boxed<kd::energy_energies>);
  m.impl("energy_forward", kd::boxed<kd::energy_forward>);
  m.impl("energy_backward", kd::boxed<kd::energy_backward>);
}

}  // namespace

STABLE_TORCH_LIBRARY(kdkernels_native, m) {
  define(m);
#ifdef KD_CUDA
  m.def("has_cuda() -> bool");  // never called: that it exists says that there are CUDA kernels
#endif
}
STABLE_TORCH_LIBRARY_IMPL(kdkernels_native, CPU, m) { implement(m); }
#ifdef KD_CUDA
STABLE_TORCH_LIBRARY_IMPL(kdkernels_native, CUDA, m) { implement(m); }
#endif
