// channel_gram on tensors of the CPU: fp32 or fp64, contiguous.
#pragma once

#include <tuple>

#include "channel_gram.h"
#include "dispatch.h"

namespace kd {

inline void set_channel_grams(const Tensor& student, const Tensor& teacher, ChannelGrams& x) {
  STD_TORCH_CHECK(student.dim() == 3 && student.size(1) == student.size(2) && teacher.numel() == student.numel() &&
                      teacher.scalar_type() == student.scalar_type() && student.is_contiguous() &&
                      teacher.is_contiguous(),
                  "kdkernels: products of channels must be (B, C, C), contiguous, of one shape and dtype");
  check_device(teacher, student);
  x.fp64 = is_double(student);
  x.count = student.size(0);
  x.channels = student.size(1);
  x.teacher = teacher.const_data_ptr();
}

inline std::tuple<Tensor, Tensor, Tensor> channel_gram_ickd_rows(Tensor student, Tensor teacher, double eps) {
  IckdRows x{};
  set_channel_grams(student, teacher, x);
  const auto rows = [&](ScalarType type) { return empty({x.count, x.channels}, type, student); };
  Tensor values = rows(student.scalar_type()), of_student = rows(ScalarType::Double),
         of_teacher = rows(ScalarType::Double);
  x.student = student.const_data_ptr();
  x.eps = eps;
  x.values = values.mutable_data_ptr();
  x.of_student = static_cast<double*>(of_student.mutable_data_ptr());
  x.of_teacher = static_cast<double*>(of_teacher.mutable_data_ptr());
  run_on_cpu(x);
  return {values, of_student, of_teacher};
}

inline Tensor channel_gram_ickd_matrix(Tensor student, Tensor teacher, Tensor of_student, Tensor of_teacher,
                                       double factor) {
  IckdMatrix x{};
  set_channel_grams(student, teacher, x);
  const Tensor a = contiguous_as(of_student, true), b = contiguous_as(of_teacher, true);
  STD_TORCH_CHECK(a.numel() == x.count * x.channels && b.numel() == a.numel(),
                  "kdkernels: the rows' numbers are not these products'");
  x.student = student.mutable_data_ptr();
  x.of_student = static_cast<const double*>(a.const_data_ptr());
  x.of_teacher = static_cast<const double*>(b.const_data_ptr());
  x.factor = factor;
  run_on_cpu(x);
  return student;
}

}  // namespace kd
