// The ops as torch sees them: schemas, and by way of the bindings_*.h checks, allocation, and calls of the kernels. The
// only file that is compiled with torch's headers.
#include "bindings_angular_margin.h"
#include "bindings_channel_gram.h"
#include "bindings_energy.h"
#include "bindings_gram.h"
#include "bindings_multi_level.h"
#include "bindings_neighbour_correlation.h"
#include "bindings_nkd.h"
#include "bindings_relation.h"
#include "bindings_softmax_kl.h"
#include "bindings_softmax_pearson.h"
#include "boxing.h"

#ifdef KD_CUDA
// Lives in libtorch_cuda: weak, so that the library loads on a torch without it, where no tensor is on CUDA.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace kd {
namespace cuda {

Launch::Launch(int device) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream, "kdkernels: this torch has no CUDA");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  stream_ = static_cast<cudaStream_t>(stream);
  DeviceGuardHandle guard = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_create_device_guard(device, &guard));
  guard_ = guard;
}

Launch::~Launch() { (void)aoti_torch_delete_device_guard(static_cast<DeviceGuardHandle>(guard_)); }

}  // namespace cuda

int64_t cuda_status(int64_t device) {
  const cuda::Launch launch(static_cast<int>(device));
  return cuda::image_status();
}

}  // namespace kd
#endif

namespace {

using torch::stable::detail::StableLibrary;

void define(StableLibrary& m) {
  const std::string softmax_kl =
      "Tensor student, Tensor teacher, Tensor? target, Tensor? mixed, Tensor? lam, int ignore_index, "
      "float smoothing, float ce, float kl, float target_kl, float non_target_kl, float temperature, str reduction, "
      "str divergence, float beta, bool standardize";
  const std::string nkd =
      "Tensor student, Tensor teacher, Tensor target, float temperature, float gamma, int ignore_index, str reduction";
  const std::string sp = "str row_norm, float[] scales, float eps, bool zero_row_grad, bool per_layer, bool need_grad";
  const std::string relation = ", bool mean, bool need_grad) -> (Tensor loss, Tensor gradient_matrix)";
  const std::string schemas[] = {
      "softmax_kl_forward(" + softmax_kl + ", bool need_grad) -> (Tensor loss, Tensor stats, Tensor scale)",
      "softmax_kl_backward(Tensor grad, " + softmax_kl + ", Tensor stats, Tensor scale) -> Tensor",
      "softmax_kl_backward_(Tensor grad, Tensor(a!) " + softmax_kl.substr(7) + ", Tensor stats, Tensor scale) -> ()",
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
      "angular_margin_backward(Tensor grad, Tensor[] student, Tensor kappa) -> Tensor[]",
      "relation_distances(Tensor[] features, bool exact) -> Tensor",
      "relation_rkd(Tensor measures, float distance_weight, float angle_weight, float eps, bool squared" + relation,
      "relation_irg(Tensor measures, float eps, bool squared" + relation,
      "relation_pkt(Tensor measures, float eps" + relation,
      "relation_cc(Tensor measures, float[] coefficients, bool normalize" + relation,
      "channel_gram_ickd_rows(Tensor student, Tensor teacher, float eps) "
      "-> (Tensor values, Tensor of_student, Tensor of_teacher)",
      "channel_gram_ickd_matrix(Tensor(a!) student, Tensor teacher, Tensor of_student, Tensor of_teacher, float "
      "factor) "
      "-> Tensor(a!)",
      "neighbour_correlation_forward(Tensor student, Tensor teacher) -> Tensor",
      "neighbour_correlation_backward(Tensor grad, Tensor student, Tensor teacher) -> Tensor",
      "nkd_forward(" + nkd + ", bool need_grad) -> (Tensor loss, Tensor stats, Tensor scale)",
      "nkd_backward(Tensor grad, " + nkd + ", Tensor stats, Tensor scale) -> Tensor",
      "softmax_pearson_forward(Tensor student, Tensor teacher, float temperature, float beta, float gamma, float eps) "
      "-> (Tensor loss, Tensor p_s, Tensor p_t, Tensor row_factors, Tensor column_factors)",
      "softmax_pearson_backward(Tensor grad, Tensor p_s, Tensor p_t, Tensor row_factors, Tensor column_factors, "
      "Tensor student, float temperature) -> Tensor",
      "multi_level_rows(Tensor student, Tensor teacher, float temperature) "
      "-> (Tensor q_s, Tensor difference, Tensor middle, Tensor divergence)",
      "multi_level_gradient(Tensor(a!) total, Tensor q_s, Tensor difference, Tensor? by_batch, Tensor? by_class, "
      "float kd, float batch, float of_class) -> Tensor(a!)",
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
  m.impl("softmax_kl_backward_", kd::boxed<kd::softmax_kl_backward_in_place>);
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

// Those without kernels for CUDA.
void implement_on_cpu(StableLibrary& m) {
  m.impl("relation_distances", kd::boxed<kd::relation_distances>);
  m.impl("relation_rkd", kd::boxed<kd::relation_rkd>);
  m.impl("relation_irg", kd::boxed<kd::relation_irg>);
  m.impl("relation_pkt", kd::boxed<kd::relation_pkt>);
  m.impl("relation_cc", kd::boxed<kd::relation_cc>);
  m.impl("channel_gram_ickd_rows", kd::boxed<kd::channel_gram_ickd_rows>);
  m.impl("channel_gram_ickd_matrix", kd::boxed<kd::channel_gram_ickd_matrix>);
  m.impl("neighbour_correlation_forward", kd::boxed<kd::neighbour_correlation_forward>);
  m.impl("neighbour_correlation_backward", kd::boxed<kd::neighbour_correlation_backward>);
  m.impl("nkd_forward", kd::boxed<kd::nkd_forward>);
  m.impl("nkd_backward", kd::boxed<kd::nkd_backward>);
  m.impl("softmax_pearson_forward", kd::boxed<kd::softmax_pearson_forward>);
  m.impl("softmax_pearson_backward", kd::boxed<kd::softmax_pearson_backward>);
  m.impl("multi_level_rows", kd::boxed<kd::multi_level_rows>);
  m.impl("multi_level_gradient", kd::boxed<kd::multi_level_gradient>);
}

}  // namespace

STABLE_TORCH_LIBRARY(kdkernels_native, m) {
  define(m);
#ifdef KD_CUDA
  m.def("cuda_status(int device) -> int");  // that it exists says that there are CUDA kernels
#endif
}
STABLE_TORCH_LIBRARY_IMPL(kdkernels_native, CPU, m) {
  implement(m);
  implement_on_cpu(m);
}
#ifdef KD_CUDA
STABLE_TORCH_LIBRARY_IMPL(kdkernels_native, CUDA, m) { implement(m); }
STABLE_TORCH_LIBRARY_IMPL(kdkernels_native, CompositeExplicitAutograd, m) {
  m.impl("cuda_status", kd::boxed<kd::cuda_status>);
}
#endif
