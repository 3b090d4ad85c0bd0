// The ops as torch sees them: checks, allocation, and calls of the kernels. With tensors.h the only file that knows torch.
#include "tensors.h"

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "angular_margin.h"
#include "gram.h"
#include "softmax_kl.h"

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

using namespace kd;

// ---- softmax_kl ----

// A (rows, classes) matrix with unit column stride; `keep` owns the copy where one was needed.
struct Matrix {
  Tensor keep;
  int64_t stride;
  explicit Matrix(const Tensor& x)
      : keep(x.size(1) <= 1 || x.stride(1) == 1 ? x : torch::stable::contiguous(x)), stride(keep.stride(0)) {}
};

struct SoftmaxInputs {
  Matrix student, teacher;
  std::vector<Tensor> keep;
  bool fp64;

  SoftmaxInputs(const Tensor& s, const Tensor& t) : student(s), teacher(t), fp64(is_double(s) || is_double(t)) {}

  void fill(kd::SoftmaxKl& x, const Tensor& s, const std::optional<Tensor>& target,
            const std::optional<Tensor>& target_mixed, const std::optional<Tensor>& lam, double temperature,
            const std::vector<double>& weights, int64_t ignore_index) {
    STD_TORCH_CHECK(s.dim() == 2 && weights.size() == 4, "kdkernels: softmax_kl needs (N, C) logits and 4 weights");
    check_device(teacher.keep, s);
    STD_TORCH_CHECK(teacher.keep.size(0) == s.size(0) && teacher.keep.size(1) == s.size(1),
                    "kdkernels: student and teacher logits have different shapes");
    x.rows = s.size(0);
    x.classes = s.size(1);
    x.student_type = dtype_of(student.keep);
    x.teacher_type = dtype_of(teacher.keep);
    x.student = student.keep.const_data_ptr();
    x.teacher = teacher.keep.const_data_ptr();
    x.student_stride = student.stride;
    x.teacher_stride = teacher.stride;
    x.target = x.target_mixed = nullptr;
    x.lam = x.dense = nullptr;
    x.lam_type = x.dense_type = kd::DType::f32;
    x.lam_stride = x.dense_stride = 0;
    if (target && target->scalar_type() == ScalarType::Long) {
      x.target = labels(*target, s);
      if (target_mixed) x.target_mixed = labels(*target_mixed, s);
    } else if (target) {
      const Matrix y(*target);
      STD_TORCH_CHECK(target->dim() == 2 && target->size(0) == x.rows && target->size(1) == x.classes,
                      "kdkernels: a dense target must have the logits' shape");
      check_device(*target, s);
      keep.push_back(y.keep);
      x.dense = y.keep.const_data_ptr();
      x.dense_type = dtype_of(y.keep);
      x.dense_stride = y.stride;
    }
    if (lam) {
      check_device(*lam, s);
      STD_TORCH_CHECK(lam->dim() == 0 || lam->size(0) == x.rows, "kdkernels: lam must be () or (N,)");
      x.lam = lam->const_data_ptr();
      x.lam_type = dtype_of(*lam);
      x.lam_stride = lam->dim() ? lam->stride(0) : 0;
    }
    x.ignore_index = ignore_index;
    x.temperature = temperature;
    x.w_ce = weights[0];
    x.w_kl = weights[1];
    x.w_target = weights[2];
    x.w_other = weights[3];
    STD_TORCH_CHECK(!x.decoupled() || (target && !x.dense), "kdkernels: decoupled terms need integer labels");
  }

 private:
  const int64_t* labels(const Tensor& y, const Tensor& s) {
    check_device(y, s);
    STD_TORCH_CHECK(y.dim() == 1 && y.size(0) == s.size(0), "kdkernels: labels must be (N,)");
    keep.push_back(as_contiguous(y));
    return static_cast<const int64_t*>(keep.back().const_data_ptr());
  }
};

std::tuple<Tensor, Tensor, Tensor> softmax_kl_forward(
    Tensor student, Tensor teacher, std::optional<Tensor> target, std::optional<Tensor> target_mixed,
    std::optional<Tensor> lam, double temperature, std::vector<double> weights, int64_t ignore_index,
    std::string reduction, bool need_grad) {
  SoftmaxInputs inputs(student, teacher);
  kd::SoftmaxKlForward x;
  inputs.fill(x, student, target, target_mixed, lam, temperature, weights, ignore_index);
  const ScalarType type = compute_type(inputs.fp64);
  x.reduction = reduction == "none" ? kd::Reduction::none
                : reduction == "sum" ? kd::Reduction::sum
                                     : kd::Reduction::mean;
  Tensor loss = x.reduction == kd::Reduction::none ? empty({x.rows}, type, student) : empty({}, type, student);
  Tensor stats = need_grad ? empty({x.decoupled() ? 9 : 5, x.rows}, type, student) : empty({0}, type, student);
  Tensor scale = empty({}, type, student);
  x.loss = loss.mutable_data_ptr();
  x.stats = need_grad ? stats.mutable_data_ptr() : nullptr;
  x.scale = scale.mutable_data_ptr();
  std::vector<Tensor> scratch;
  x.workspace = KD_WORKSPACE(student, kd::cuda::softmax_kl_workspace(x), scratch);
  KD_RUN(student, softmax_kl_forward, x, inputs.fp64);
  return {loss, stats, scale};
}

Tensor softmax_kl_backward(Tensor grad, Tensor student, Tensor teacher, std::optional<Tensor> target,
                           std::optional<Tensor> target_mixed, std::optional<Tensor> lam, Tensor stats, Tensor scale,
                           double temperature, std::vector<double> weights, int64_t ignore_index) {
  SoftmaxInputs inputs(student, teacher);
  kd::SoftmaxKlBackward x;
  inputs.fill(x, student, target, target_mixed, lam, temperature, weights, ignore_index);
  const Tensor g = contiguous_as(grad, inputs.fp64), saved = contiguous_as(stats, inputs.fp64),
               factor = contiguous_as(scale, inputs.fp64);
  STD_TORCH_CHECK(saved.numel() == (x.decoupled() ? 9 : 5) * x.rows, "kdkernels: stats are not this call's");
  STD_TORCH_CHECK(g.dim() == 0 || g.numel() == x.rows, "kdkernels: grad must be () or (N,)");
  Tensor out = grad_like(student);
  x.grad = g.const_data_ptr();
  x.grad_stride = g.dim() ? 1 : 0;
  x.stats = saved.const_data_ptr();
  x.scale = factor.const_data_ptr();
  x.out = out.mutable_data_ptr();
  KD_RUN(student, softmax_kl_backward, x, inputs.fp64);
  return out;
}

// ---- angular_margin ----

struct AngularInputs {
  std::vector<Tensor> keep;
  std::vector<kd::AngularLayer> layers;
  bool fp64 = false;
  int64_t pixels = 0;

  void add(const Tensor& s, const Tensor& t, double weight) {
    STD_TORCH_CHECK(s.dim() == 4 && t.dim() == 4 && s.size(0) == t.size(0) && s.size(2) == t.size(2) &&
                        s.size(3) == t.size(3),
                    "kdkernels: activations must be (B, C, H, W) with the same B, H and W");
    check_device(t, s);
    STD_TORCH_CHECK(layers.empty() || layers[0].batch == s.size(0), "kdkernels: all layers must have the same B");
    fp64 = fp64 || is_double(s) || is_double(t);
    kd::AngularLayer layer;
    layer.student = activation(s);
    layer.teacher = activation(t);
    layer.batch = s.size(0);
    layer.height = s.size(2);
    layer.width = s.size(3);
    layer.weight = weight;
    layer.kappa_offset = pixels;
    layer.out = nullptr;
    pixels += layer.batch * layer.height * layer.width;
    layers.push_back(layer);
  }

 private:
  kd::Activation activation(const Tensor& x) {
    keep.push_back(dense(x));
    const Tensor& d = keep.back();
    return {d.const_data_ptr(), dtype_of(d), d.size(1), is_channels_last(d)};
  }
};

std::tuple<Tensor, Tensor> angular_margin_forward(std::vector<Tensor> student, std::vector<Tensor> teacher,
                                                  std::vector<double> layer_weights, double margin, double scale,
                                                  double local_weight, bool reduce, bool need_grad) {
  STD_TORCH_CHECK(!student.empty() && student.size() == teacher.size() && student.size() == layer_weights.size(),
                  "kdkernels: angular_margin needs as many student layers as teacher layers and weights");
  AngularInputs inputs;
  for (size_t i = 0; i < student.size(); ++i) inputs.add(student[i], teacher[i], layer_weights[i]);
  const int64_t count = static_cast<int64_t>(student.size());
  const ScalarType type = compute_type(inputs.fp64);
  Tensor loss = reduce ? empty({}, type, student[0]) : empty({count}, type, student[0]);
  Tensor kappa = empty({need_grad ? inputs.pixels : 0}, type, student[0]);
  kd::AngularMargin x{};
  x.layers = inputs.layers.data();
  x.count = count;
  x.margin = margin;
  x.scale = scale;
  x.local_weight = local_weight;
  x.reduce = reduce;
  x.loss = loss.mutable_data_ptr();
  x.kappa = need_grad ? kappa.mutable_data_ptr() : nullptr;
  std::vector<Tensor> scratch;
  x.workspace = KD_WORKSPACE(student[0], kd::cuda::angular_margin_workspace(x, inputs.fp64), scratch);
  KD_RUN(student[0], angular_margin_forward, x, inputs.fp64);
  return {loss, kappa};
}

std::vector<Tensor> angular_margin_backward(Tensor grad, std::vector<Tensor> student, Tensor kappa) {
  AngularInputs inputs;
  std::vector<Tensor> out;
  const bool fp64 = is_double(kappa);
  for (const Tensor& s : student) {
    inputs.add(s, s, 0);
    out.push_back(grad_like(s));
    inputs.layers.back().out = out.back().mutable_data_ptr();
  }
  STD_TORCH_CHECK(kappa.numel() == inputs.pixels, "kdkernels: kappa is not these layers'");
  const Tensor g = contiguous_as(grad, fp64), k = as_contiguous(kappa);
  kd::AngularMargin x{};
  x.layers = inputs.layers.data();
  x.count = static_cast<int64_t>(student.size());
  x.kappa = const_cast<void*>(k.const_data_ptr());
  x.grad = g.const_data_ptr();
  x.grad_stride = g.dim() ? 1 : 0;
  KD_RUN(student[0], angular_margin_backward, x, fp64);
  return out;
}

// ---- gram ----

// (B, ...) as B dense rows; the order inside a row is free, so channels_last needs no copy.
kd::Rows rows_of(const Tensor& x, std::vector<Tensor>& keep) {
  STD_TORCH_CHECK(x.dim() >= 1, "kdkernels: features must be (B, ...)");
  keep.push_back(dense(x));
  const int64_t count = x.size(0), width = count ? x.numel() / count : 0;
  return {keep.back().const_data_ptr(), dtype_of(x), count, width, width};
}

std::tuple<Tensor, Tensor> sp_forward(std::vector<Tensor> student, std::vector<Tensor> teacher, std::string row_norm,
                                      double scale, double eps, bool zero_row_grad, bool need_grad) {
  STD_TORCH_CHECK(!student.empty() && student.size() == teacher.size(),
                  "kdkernels: sp_gram needs as many student as teacher layers");
  std::vector<Tensor> keep;
  std::vector<kd::SpLayer> layers;
  bool fp64 = false;
  const int64_t batch = student[0].size(0), count = static_cast<int64_t>(student.size());
  for (size_t i = 0; i < student.size(); ++i) {
    STD_TORCH_CHECK(student[i].size(0) == batch && teacher[i].size(0) == batch, "kdkernels: batch sizes differ");
    check_device(student[i], student[0]);
    check_device(teacher[i], student[0]);
    fp64 = fp64 || is_double(student[i]) || is_double(teacher[i]);
    const kd::Rows s = rows_of(student[i], keep);
    layers.push_back({s, rows_of(teacher[i], keep), nullptr});
  }
  const ScalarType type = compute_type(fp64);
  Tensor loss = empty({}, type, student[0]);
  Tensor weights = need_grad ? empty({count, batch, batch}, type, student[0]) : empty({0}, type, student[0]);
  kd::SpGram x{};
  x.layers = layers.data();
  x.count = count;
  x.batch = batch;
  x.l1 = row_norm == "l1";
  x.zero_row_grad = zero_row_grad;
  x.scale = scale;
  x.eps = eps;
  x.loss = loss.mutable_data_ptr();
  x.weights = need_grad ? weights.mutable_data_ptr() : nullptr;
  std::vector<Tensor> scratch;
  x.workspace = KD_WORKSPACE(student[0], kd::cuda::sp_workspace(x, fp64), scratch);
  KD_RUN(student[0], sp_forward, x, fp64);
  return {loss, weights};
}

std::vector<Tensor> sp_backward(Tensor grad, std::vector<Tensor> student, Tensor weights) {
  std::vector<Tensor> keep, out;
  std::vector<kd::SpLayer> layers;
  const bool fp64 = is_double(weights);
  for (const Tensor& s : student) {
    out.push_back(grad_like(s));
    const kd::Rows rows = rows_of(s, keep);
    layers.push_back({rows, rows, out.back().mutable_data_ptr()});
  }
  const Tensor g = contiguous_as(grad, fp64), w = as_contiguous(weights);
  kd::SpGram x{};
  x.layers = layers.data();
  x.count = static_cast<int64_t>(student.size());
  x.batch = student[0].size(0);
  STD_TORCH_CHECK(w.numel() == x.count * x.batch * x.batch, "kdkernels: weights are not these layers'");
  x.grad = g.const_data_ptr();
  x.weights = const_cast<void*>(w.const_data_ptr());
  KD_RUN(student[0], sp_backward, x, fp64);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> cosine_forward(Tensor a, Tensor b) {
  STD_TORCH_CHECK(a.dim() == 2 && b.dim() == 2 && a.size(1) == b.size(1), "kdkernels: cosines need (N, D) and (M, D)");
  check_device(b, a);
  std::vector<Tensor> keep;
  const bool fp64 = is_double(a) || is_double(b);
  const ScalarType type = compute_type(fp64);
  kd::Cosine x{};
  x.a = rows_of(a, keep);
  x.b = rows_of(b, keep);
  Tensor similarity = empty({x.a.count, x.b.count}, type, a);
  Tensor inverse_a = empty({x.a.count}, type, a), inverse_b = empty({x.b.count}, type, a);
  x.similarity = similarity.mutable_data_ptr();
  x.inverse_a = inverse_a.mutable_data_ptr();
  x.inverse_b = inverse_b.mutable_data_ptr();
  std::vector<Tensor> scratch;
  x.workspace = KD_WORKSPACE(a, kd::cuda::cosine_workspace(x), scratch);
  KD_RUN(a, cosine_forward, x, fp64);
  return {similarity, inverse_a, inverse_b};
}

std::tuple<Tensor, Tensor> cosine_backward(Tensor grad, Tensor a, Tensor b, Tensor similarity, Tensor inverse_a,
                                           Tensor inverse_b) {
  std::vector<Tensor> keep;
  const bool fp64 = is_double(a) || is_double(b);
  kd::Cosine x{};
  x.a = rows_of(a, keep);
  x.b = rows_of(b, keep);
  const Tensor g = contiguous_as(grad, fp64), s = contiguous_as(similarity, fp64),
               i_a = contiguous_as(inverse_a, fp64), i_b = contiguous_as(inverse_b, fp64);
  STD_TORCH_CHECK(g.numel() == x.a.count * x.b.count && s.numel() == g.numel() && i_a.numel() == x.a.count &&
                      i_b.numel() == x.b.count,
                  "kdkernels: the saved cosines are not these rows'");
  Tensor grad_a = empty(sizes_of(a), a.scalar_type(), a), grad_b = empty(sizes_of(b), b.scalar_type(), b);
  x.grad = g.const_data_ptr();
  x.similarity = const_cast<void*>(s.const_data_ptr());
  x.inverse_a = const_cast<void*>(i_a.const_data_ptr());
  x.inverse_b = const_cast<void*>(i_b.const_data_ptr());
  x.grad_a = grad_a.mutable_data_ptr();
  x.grad_b = grad_b.mutable_data_ptr();
  std::vector<Tensor> scratch;
  x.workspace = KD_WORKSPACE(a, kd::cuda::cosine_workspace(x), scratch);
  KD_RUN(a, cosine_backward, x, fp64);
  return {grad_a, grad_b};
}

#define KD_REGISTER(m)                                                \
  m.impl("softmax_kl_forward", TORCH_BOX(&softmax_kl_forward));         \
  m.impl("softmax_kl_backward", TORCH_BOX(&softmax_kl_backward));       \
  m.impl("angular_margin_forward", TORCH_BOX(&angular_margin_forward)); \
  m.impl("angular_margin_backward", TORCH_BOX(&angular_margin_backward)); \
  m.impl("sp_forward", TORCH_BOX(&sp_forward));                         \
  m.impl("sp_backward", TORCH_BOX(&sp_backward));                       \
  m.impl("cosine_forward", TORCH_BOX(&cosine_forward));                 \
  m.impl("cosine_backward", TORCH_BOX(&cosine_backward));

}  // namespace

STABLE_TORCH_LIBRARY(kdkernels_native, m) {
  m.def(
      "softmax_kl_forward(Tensor student, Tensor teacher, Tensor? target, Tensor? target_mixed, Tensor? lam, "
      "float temperature, float[] weights, int ignore_index, str reduction, bool need_grad) -> (Tensor, Tensor, Tensor)");
  m.def(
      "softmax_kl_backward(Tensor grad, Tensor student, Tensor teacher, Tensor? target, Tensor? target_mixed, "
      "Tensor? lam, Tensor stats, Tensor scale, float temperature, float[] weights, int ignore_index) -> Tensor");
  m.def(
      "angular_margin_forward(Tensor[] student, Tensor[] teacher, float[] layer_weights, float margin, float scale, "
      "float local_weight, bool reduce, bool need_grad) -> (Tensor, Tensor)");
  m.def("angular_margin_backward(Tensor grad, Tensor[] student, Tensor kappa) -> Tensor[]");
  m.def(
      "sp_forward(Tensor[] student, Tensor[] teacher, str row_norm, float scale, float eps, bool zero_row_grad, "
      "bool need_grad) -> (Tensor, Tensor)");
  m.def("sp_backward(Tensor grad, Tensor[] student, Tensor weights) -> Tensor[]");
  m.def("cosine_forward(Tensor a, Tensor b) -> (Tensor, Tensor, Tensor)");
  m.def(
      "cosine_backward(Tensor grad, Tensor a, Tensor b, Tensor similarity, Tensor inverse_a, Tensor inverse_b) "
      "-> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(kdkernels_native, CPU, m) { KD_REGISTER(m) }
#ifdef KD_CUDA
STABLE_TORCH_LIBRARY_IMPL(kdkernels_native, CUDA, m) { KD_REGISTER(m) }
#endif
