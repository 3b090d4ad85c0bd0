// neighbour_correlation: the sum over rows i of <|s_i - t_i|, |s_(i + 1) - t_(i + 1)|>, over their number. On the CPU
// alone.
#pragma once

#include "nkd.h"

namespace kd {

struct NeighbourForward : LogitPair {
  void* loss;  // T []
};

struct NeighbourBackward : LogitPair {
  const void* grad;  // T []
  void* out;         // the student's dtype, [rows, classes] contiguous
};

template <Isa>
void compute(const NeighbourForward&, const Pool&);
template <Isa>
void compute(const NeighbourBackward&, const Pool&);

}  // namespace kd
