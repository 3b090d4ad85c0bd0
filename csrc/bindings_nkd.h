// nkd on tensors of the CPU.
#pragma once

#include "bindings_softmax_kl.h"
#include "nkd.h"

namespace kd {

// Fills a record with a pair of logits; owns the copies that were needed.
class LogitPairTensors {
 public:
  LogitPairTensors(const Tensor& student, const Tensor& teacher, LogitPair& x) {
    check_device(teacher, student);
    STD_TORCH_CHECK(student.dim() == 2 && teacher.dim() == 2 && student.size(0) == teacher.size(0) &&
                        student.size(1) == teacher.size(1),
                    "kdkernels: logits must be (N, C), of one shape");
    x.fp64 = is_double(student) || is_double(teacher);
    x.rows = student.size(0);
    x.classes = student.size(1);
    matrix(student, x.student, x.student_type, x.student_stride);
    matrix(teacher, x.teacher, x.teacher_type, x.teacher_stride);
  }

 private:
  void matrix(const Tensor& m, const void*& data, DType& type, int64_t& stride) {
    keep_.push_back(m.size(1) <= 1 || m.stride(1) == 1 ? m : torch::stable::contiguous(m));
    data = keep_.back().const_data_ptr();
    type = dtype_of(m);
    stride = keep_.back().stride(0);
  }

  std::vector<Tensor> keep_;
};

// What forward and backward both take, in the schemas' order.
struct NkdArguments {
  Tensor student, teacher, target;
  double temperature, gamma;
  int64_t ignore_index;
  Reduction reduction;

  explicit NkdArguments(Arguments& in)
      : student(in.next<Tensor>()),
        teacher(in.next<Tensor>()),
        target(in.next<Tensor>()),
        temperature(in.next<double>()),
        gamma(in.next<double>()),
        ignore_index(in.next<int64_t>()),
        reduction(reduction_of(in.next<std::string>())) {}

  // `labels` owns what x.target points to
  void fill(Nkd& x, Tensor& labels) const {
    STD_TORCH_CHECK(target.scalar_type() == ScalarType::Long && target.dim() == 1 && target.size(0) == x.rows,
                    "kdkernels: labels must be (N,) of int64");
    labels = as_contiguous(target);
    x.target = static_cast<const int64_t*>(labels.const_data_ptr());
    x.temperature = temperature;
    x.gamma = gamma;
    x.ignore_index = ignore_index;
    x.reduction = reduction;
  }
};

inline std::tuple<Tensor, Tensor, Tensor> nkd_forward(NkdArguments arguments, bool need_grad) {
  NkdForward x{};
  const Tensor& like = arguments.student;
  const LogitPairTensors tensors(like, arguments.teacher, x);
  Tensor labels;
  arguments.fill(x, labels);
  const ScalarType type = compute_type(x.fp64);
  Tensor loss = x.reduction == Reduction::none ? empty({x.rows}, type, like) : empty({}, type, like);
  Tensor stats = need_grad ? empty({kNkdStats, x.rows}, type, like) : empty({0}, type, like);
  Tensor scale = empty({}, type, like);
  x.loss = loss.mutable_data_ptr();
  x.stats = need_grad ? stats.mutable_data_ptr() : nullptr;
  x.scale = scale.mutable_data_ptr();
  run_on_cpu(x);
  return {loss, stats, scale};
}

inline Tensor nkd_backward(Tensor grad, NkdArguments arguments, Tensor stats, Tensor scale) {
  NkdBackward x{};
  const LogitPairTensors tensors(arguments.student, arguments.teacher, x);
  Tensor labels;
  arguments.fill(x, labels);
  const Tensor g = contiguous_as(grad, x.fp64), saved = contiguous_as(stats, x.fp64),
               factor = contiguous_as(scale, x.fp64);
  STD_TORCH_CHECK(saved.numel() == kNkdStats * x.rows, "kdkernels: stats are not this call's");
  STD_TORCH_CHECK(g.dim() == 0 || g.numel() == x.rows, "kdkernels: grad must be () or (N,)");
  Tensor out = grad_like(arguments.student);
  x.grad = g.const_data_ptr();
  x.grad_stride = g.dim() ? 1 : 0;
  x.stats = saved.const_data_ptr();
  x.scale = factor.const_data_ptr();
  x.out = out.mutable_data_ptr();
  run_on_cpu(x);
  return out;
}

}  // namespace kd
