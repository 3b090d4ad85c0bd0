// angular_margin on tensors.
#pragma once

#include <tuple>
#include <vector>

#include "bindings_energy.h"

namespace kd {

inline std::tuple<Tensor, Tensor> angular_margin_forward(std::vector<Tensor> student, std::vector<Tensor> teacher,
                                                         std::vector<double> factors, double margin, double sharpness,
                                                         double local_weight, bool per_layer, bool per_sample,
                                                         bool need_grad) {
  AngularMarginForward x{};
  x.margin = margin;
  x.sharpness = sharpness;
  x.local_weight = local_weight;
  return map_loss(student, teacher, factors, per_layer, per_sample, need_grad, x);
}

}  // namespace kd
