// angular_margin: the distance between the angular maps of two activations, and the gradient's kappa.
#pragma once

#include "energy.h"

namespace kd {

struct AngularMarginForward : MapLoss {
  double margin, sharpness, local_weight;
};

template <Isa>
void compute(const AngularMarginForward&, const Pool&);

}  // namespace kd
