// multi_level: what MLLD needs of rows of logits at one temperature, before and behind its Gram matrices. On the CPU
// alone.
#pragma once

#include "nkd.h"

namespace kd {

struct MultiLevelRows : LogitPair {
  double temperature;
  // T [rows, classes]: the student's probabilities, how much larger the teacher's are, and the mean of both
  void *q_s, *difference, *middle;
  void* divergence;  // T []: the sum over rows of KL(q_t || q_s)
};

// Adds to `out` the gradient at the logits: kd * difference, and through the softmax batch * by_batch + class *
// by_class
struct MultiLevelGradient : Call {
  int64_t rows, classes;
  const void *q_s, *difference;
  const void *by_batch, *by_class;  // T [rows, classes] or null
  double kd, batch, of_class;
  void* out;  // T [rows, classes]
};

template <Isa>
void compute(const MultiLevelRows&, const Pool&);
template <Isa>
void compute(const MultiLevelGradient&, const Pool&);

}  // namespace kd
