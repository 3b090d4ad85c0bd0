// relation on tensors. On the CPU alone: GPUs run it in PyTorch.
#pragma once

#include <tuple>
#include <vector>

#include "bindings_gram.h"
#include "relation.h"

namespace kd {

inline Tensor relation_distances(std::vector<Tensor> features, bool exact) {
  const Features inputs(features);
  Distances x{};
  x.fp64 = exact || any_double(features);
  x.features = inputs.rows.data();
  x.count = static_cast<int64_t>(features.size());
  x.batch = inputs.batch;
  Tensor distances = empty({x.count, x.batch, x.batch}, ScalarType::Double, features[0]);
  x.distances = static_cast<double*>(distances.mutable_data_ptr());
  run_on_cpu(x);
  return distances;
}

// x, whose own options are set, on (2, B, B) measures
template <typename C>
std::tuple<Tensor, Tensor> relation_loss(const Tensor& measures, C& x, bool mean, bool need_grad) {
  STD_TORCH_CHECK(measures.dim() == 3 && measures.size(0) == 2 && measures.size(1) == measures.size(2),
                  "kdkernels: measures must be (2, B, B)");
  x.fp64 = is_double(measures);
  x.batch = measures.size(1);
  const double pairs = double(x.batch) * double(x.batch);
  x.scale = mean && x.batch > 0 ? 1 / pairs : 1;
  const Tensor dense = as_contiguous(measures);
  Tensor loss = empty({}, compute_type(x.fp64), measures);
  Tensor gradient_matrix = need_grad ? empty({x.batch, x.batch}, compute_type(x.fp64), measures)
                                     : empty({0}, compute_type(x.fp64), measures);
  x.measures = dense.const_data_ptr();
  x.loss = loss.mutable_data_ptr();
  x.gradient_matrix = need_grad ? gradient_matrix.mutable_data_ptr() : nullptr;
  run_on_cpu(x);
  return {loss, gradient_matrix};
}

inline void check_distances(const Tensor& measures) {
  STD_TORCH_CHECK(is_double(measures), "kdkernels: squared distances must be float64");
}

inline std::tuple<Tensor, Tensor> relation_rkd(Tensor measures, double distance_weight, double angle_weight, double eps,
                                               bool squared, bool mean, bool need_grad) {
  check_distances(measures);
  Rkd x{};
  x.distance_weight = distance_weight;
  x.angle_weight = angle_weight;
  x.eps = eps;
  x.squared = squared;
  const double batch = measures.dim() ? double(measures.size(-1)) : 0;
  x.angle_scale = mean && batch > 0 ? 1 / (batch * batch * batch) : 1;
  return relation_loss(measures, x, mean, need_grad);
}

inline std::tuple<Tensor, Tensor> relation_irg(Tensor measures, double eps, bool squared, bool mean, bool need_grad) {
  check_distances(measures);
  Irg x{};
  x.eps = eps;
  x.squared = squared;
  return relation_loss(measures, x, mean, need_grad);
}

inline std::tuple<Tensor, Tensor> relation_pkt(Tensor measures, double eps, bool mean, bool need_grad) {
  Pkt x{};
  x.eps = eps;
  return relation_loss(measures, x, mean, need_grad);
}

inline std::tuple<Tensor, Tensor> relation_cc(Tensor measures, std::vector<double> coefficients, bool normalize,
                                              bool mean, bool need_grad) {
  Cc x{};
  x.coefficients = coefficients.data();
  x.count = static_cast<int64_t>(coefficients.size());
  x.normalize = normalize;
  return relation_loss(measures, x, mean, need_grad);
}

}  // namespace kd
