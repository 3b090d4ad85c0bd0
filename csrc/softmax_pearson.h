// softmax_pearson: how well the probabilities of two networks correlate, row by row and column by column. On the CPU
// alone.
#pragma once

#include "nkd.h"

namespace kd {

struct SoftmaxPearsonOptions {
  double temperature, beta, gamma, eps;  // the weights of rows and columns; eps beside the product of the norms
};

// a and b are the student's and the teacher's probabilities.
struct SoftmaxPearsonForward : LogitPair, SoftmaxPearsonOptions {
  void* loss;       // T []
  void *p_s, *p_t;  // T [rows, classes]: a and b
  // dloss/da[i, k] = R0 (b - R2 a - (1 - R2) / C) + R1 (a - 1 / C) + C0 (b - C2 a - C3) + C1 (a - C4), of row i and
  // column k; but for a number per row
  void* row_factors;     // T [3, rows]
  void* column_factors;  // T [5, classes]
};

struct SoftmaxPearsonBackward : Call {
  int64_t rows, classes;
  const void* grad;  // T []
  const void *p_s, *p_t, *row_factors, *column_factors;
  double temperature;
  DType out_type;
  void* out;  // [rows, classes] contiguous
};

template <Isa>
void compute(const SoftmaxPearsonForward&, const Pool&);
template <Isa>
void compute(const SoftmaxPearsonBackward&, const Pool&);

}  // namespace kd
