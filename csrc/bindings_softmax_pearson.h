// softmax_pearson on tensors of the CPU.
#pragma once

#include "bindings_nkd.h"
#include "softmax_pearson.h"

namespace kd {

inline std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> softmax_pearson_forward(Tensor student, Tensor teacher,
                                                                                  double temperature, double beta,
                                                                                  double gamma, double eps) {
  SoftmaxPearsonForward x{};
  const LogitPairTensors tensors(student, teacher, x);
  static_cast<SoftmaxPearsonOptions&>(x) = {temperature, beta, gamma, eps};
  const ScalarType type = compute_type(x.fp64);
  Tensor loss = empty({}, type, student), p_s = empty({x.rows, x.classes}, type, student),
         p_t = empty({x.rows, x.classes}, type, student), rows = empty({3, x.rows}, type, student),
         columns = empty({5, x.classes}, type, student);
  ask_for_huge_pages(p_s);
  ask_for_huge_pages(p_t);
  x.loss = loss.mutable_data_ptr();
  x.p_s = p_s.mutable_data_ptr();
  x.p_t = p_t.mutable_data_ptr();
  x.row_factors = rows.mutable_data_ptr();
  x.column_factors = columns.mutable_data_ptr();
  run_on_cpu(x);
  return {loss, p_s, p_t, rows, columns};
}

inline Tensor softmax_pearson_backward(Tensor grad, Tensor p_s, Tensor p_t, Tensor row_factors, Tensor column_factors,
                                       Tensor student, double temperature) {
  SoftmaxPearsonBackward x{};
  x.fp64 = is_double(p_s);
  const Tensor g = contiguous_as(grad, x.fp64), a = contiguous_as(p_s, x.fp64), b = contiguous_as(p_t, x.fp64),
               rows = contiguous_as(row_factors, x.fp64), columns = contiguous_as(column_factors, x.fp64);
  x.rows = a.size(0);
  x.classes = a.size(1);
  STD_TORCH_CHECK(g.numel() == 1 && b.numel() == a.numel() && rows.numel() == 3 * x.rows &&
                      columns.numel() == 5 * x.classes && student.numel() == a.numel(),
                  "kdkernels: what was saved is not this call's");
  Tensor out = grad_like(student);
  x.grad = g.const_data_ptr();
  x.p_s = a.const_data_ptr();
  x.p_t = b.const_data_ptr();
  x.row_factors = rows.const_data_ptr();
  x.column_factors = columns.const_data_ptr();
  x.temperature = temperature;
  x.out_type = dtype_of(out);
  x.out = out.mutable_data_ptr();
  run_on_cpu(x);
  return out;
}

}  // namespace kd
