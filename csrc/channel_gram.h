// channel_gram: ICKD's distance of two networks' channel products, and its gradient by them. On the CPU alone; the
// products are PyTorch's. The formulas are in kdkernels/ops/channel_gram/definition.py.
#pragma once

#include "common.h"

namespace kd {

// K = X X^T of some samples, both networks'.
struct ChannelGrams : Call {
  int64_t count, channels;
  const void* teacher;  // T [count, channels, channels]
};

struct IckdRows : ChannelGrams {
  const void* student;  // T [count, channels, channels]
  double eps;
  void* values;                     // T [count, channels]: |D_i|^2 / C, D being the difference of the unit rows
  double *of_student, *of_teacher;  // [count, channels]: a and b of H = a_i K_s - b_i K_t
};

struct IckdMatrix : ChannelGrams {
  void* student;  // T [count, channels, channels]: K_s, which becomes factor (H + H^T)
  const double *of_student, *of_teacher;
  double factor;
};

template <Isa>
void compute(const IckdRows&, const Pool&);
template <Isa>
void compute(const IckdMatrix&, const Pool&);

}  // namespace kd
