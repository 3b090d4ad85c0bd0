// neighbour_correlation on tensors of the CPU.
#pragma once

#include "bindings_nkd.h"
#include "neighbour_correlation.h"

namespace kd {

inline Tensor neighbour_correlation_forward(Tensor student, Tensor teacher) {
  NeighbourForward x{};
  const LogitPairTensors tensors(student, teacher, x);
  Tensor loss = empty({}, compute_type(x.fp64), student);
  x.loss = loss.mutable_data_ptr();
  run_on_cpu(x);
  return loss;
}

inline Tensor neighbour_correlation_backward(Tensor grad, Tensor student, Tensor teacher) {
  NeighbourBackward x{};
  const LogitPairTensors tensors(student, teacher, x);
  const Tensor g = contiguous_as(grad, x.fp64);
  STD_TORCH_CHECK(g.numel() == 1, "kdkernels: grad must be ()");
  Tensor out = grad_like(student);
  x.grad = g.const_data_ptr();
  x.out = out.mutable_data_ptr();
  run_on_cpu(x);
  return out;
}

}  // namespace kd
