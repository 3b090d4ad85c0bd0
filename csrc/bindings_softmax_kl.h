// softmax_kl on tensors.
#pragma once

#include <optional>
#include <string>
#include <tuple>

#include "boxing.h"
#include "dispatch.h"

namespace kd {

inline Reduction reduction_of(const std::string& name) {
  if (name == "mean") return Reduction::mean;
  if (name == "sum") return Reduction::sum;
  STD_TORCH_CHECK(name == "none", "kdkernels: reduction must be mean, sum or none, not ", name.c_str());
  return Reduction::none;
}

inline Divergence divergence_of(const std::string& name) {
  const char* names[] = {"forward", "reverse", "jsd", "skew", "skew_reverse"};
  int found = 0;
  while (found < 5 && name != names[found]) ++found;
  STD_TORCH_CHECK(found < 5, "kdkernels: there is no divergence ", name.c_str());
  return static_cast<Divergence>(found);
}

// What forward and backward both take, in the schemas' order.
struct SoftmaxKlArguments {
  Tensor student, teacher;
  std::optional<Tensor> target, mixed, lam;
  SoftmaxKlOptions options;

  explicit SoftmaxKlArguments(Arguments& in)
      : student(in.next<Tensor>()),
        teacher(in.next<Tensor>()),
        target(in.next<std::optional<Tensor>>()),
        mixed(in.next<std::optional<Tensor>>()),
        lam(in.next<std::optional<Tensor>>()),
        options{in.next<int64_t>(),
                in.next<double>(),
                in.next<double>(),
                in.next<double>(),
                in.next<double>(),
                in.next<double>(),
                in.next<double>(),
                reduction_of(in.next<std::string>()),
                divergence_of(in.next<std::string>()),
                in.next<double>(),
                in.next<bool>()} {}
};

// Fills a record with the tensors of `arguments`; owns the copies that were needed.
class SoftmaxKlTensors {
 public:
  SoftmaxKlTensors(const SoftmaxKlArguments& arguments, SoftmaxKl& x) : like_(arguments.student) {
    static_cast<SoftmaxKlOptions&>(x) = arguments.options;
    x.fp64 = is_double(arguments.student) || is_double(arguments.teacher);
    STD_TORCH_CHECK(like_.dim() == 2, "kdkernels: softmax_kl needs (N, C) logits");
    x.rows = like_.size(0);
    x.classes = like_.size(1);
    matrix(arguments.student, x.student, x.student_type, x.student_stride);
    matrix(arguments.teacher, x.teacher, x.teacher_type, x.teacher_stride);
    const bool labelled = arguments.target && arguments.target->scalar_type() == ScalarType::Long;
    if (labelled) {
      x.target = labels(*arguments.target);
      if (arguments.mixed) x.mixed = labels(*arguments.mixed);
    } else if (arguments.target) {
      matrix(*arguments.target, x.dense, x.dense_type, x.dense_stride);
    }
    if (arguments.lam) weights(*arguments.lam, x);
    STD_TORCH_CHECK(!x.decoupled() || (labelled && x.divergence == Divergence::forward),
                    "kdkernels: decoupled terms need integer labels and the forward KL");
  }

 private:
  // (N, C) with unit column stride
  void matrix(const Tensor& m, const void*& data, DType& type, int64_t& stride) {
    check_device(m, like_);
    STD_TORCH_CHECK(m.dim() == 2 && m.size(0) == like_.size(0) && m.size(1) == like_.size(1),
                    "kdkernels: teacher logits and dense targets must have the student logits' shape");
    keep_.push_back(m.size(1) <= 1 || m.stride(1) == 1 ? m : torch::stable::contiguous(m));
    data = keep_.back().const_data_ptr();
    type = dtype_of(m);
    stride = keep_.back().stride(0);
  }

  const int64_t* labels(const Tensor& y) {
    check_device(y, like_);
    STD_TORCH_CHECK(y.scalar_type() == ScalarType::Long && y.dim() == 1 && y.size(0) == like_.size(0),
                    "kdkernels: labels must be (N,) of int64");
    keep_.push_back(as_contiguous(y));
    return static_cast<const int64_t*>(keep_.back().const_data_ptr());
  }

  void weights(const Tensor& lam, SoftmaxKl& x) {
    check_device(lam, like_);
    STD_TORCH_CHECK(lam.dim() == 0 || (lam.dim() == 1 && lam.size(0) == x.rows), "kdkernels: lam must be () or (N,)");
    x.lam = lam.const_data_ptr();
    x.lam_type = dtype_of(lam);
    x.lam_stride = lam.dim() ? lam.stride(0) : 0;
  }

  const Tensor& like_;
  std::vector<Tensor> keep_;
};

inline std::tuple<Tensor, Tensor, Tensor> softmax_kl_forward(SoftmaxKlArguments arguments, bool need_grad) {
  SoftmaxKlForward x{};
  const SoftmaxKlTensors tensors(arguments, x);
  const Tensor& like = arguments.student;
  const ScalarType type = compute_type(x.fp64);
  Tensor loss = x.reduction == Reduction::none ? empty({x.rows}, type, like) : empty({}, type, like);
  Tensor stats = need_grad ? empty({x.stats_count(), x.rows}, type, like) : empty({0}, type, like);
  Tensor scale = empty({}, type, like);
  x.loss = loss.mutable_data_ptr();
  x.stats = need_grad ? stats.mutable_data_ptr() : nullptr;
  x.scale = scale.mutable_data_ptr();
  run(like, x);
  return {loss, stats, scale};
}

// The gradient into `out`, which may be the student's logits.
inline void softmax_kl_gradient(const Tensor& grad, const SoftmaxKlArguments& arguments, const Tensor& stats,
                                const Tensor& scale, Tensor& out) {
  SoftmaxKlBackward x{};
  const SoftmaxKlTensors tensors(arguments, x);
  const Tensor g = contiguous_as(grad, x.fp64), saved = contiguous_as(stats, x.fp64),
               factor = contiguous_as(scale, x.fp64);
  STD_TORCH_CHECK(saved.numel() == x.stats_count() * x.rows, "kdkernels: stats are not this call's");
  STD_TORCH_CHECK(g.dim() == 0 || g.numel() == x.rows, "kdkernels: grad must be () or (N,)");
  x.grad = g.const_data_ptr();
  x.grad_stride = g.dim() ? 1 : 0;
  x.stats = saved.const_data_ptr();
  x.scale = factor.const_data_ptr();
  x.out = out.mutable_data_ptr();
  run(arguments.student, x);
}

inline Tensor softmax_kl_backward(Tensor grad, SoftmaxKlArguments arguments, Tensor stats, Tensor scale) {
  Tensor out = grad_like(arguments.student);
  softmax_kl_gradient(grad, arguments, stats, scale, out);
  return out;
}

inline std::tuple<> softmax_kl_backward_in_place(Tensor grad, SoftmaxKlArguments arguments, Tensor stats,
                                                 Tensor scale) {
  STD_TORCH_CHECK(arguments.student.is_contiguous(), "kdkernels: only contiguous logits can become their gradient");
  softmax_kl_gradient(grad, arguments, stats, scale, arguments.student);
  return {};
}

}  // namespace kd
