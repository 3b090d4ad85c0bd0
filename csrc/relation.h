// relation: losses of the pairs of a batch, from Gram matrices or squared distances. The formulas are in
// kdkernels/ops/relation/definition.py.
#pragma once

#include "gram.h"

namespace kd {

// |q_i - q_j|^2 of every matrix, summed in T and kept in double.
struct Distances : Call {
  const Rows* features;  // [count], of `batch` rows each
  int64_t count, batch;
  double* distances;  // [count, batch, batch]
};

struct RelationLoss : Call {
  int64_t batch;
  double scale;           // 1, or 1 / batch^2 for the mean over pairs
  const void* measures;   // T [2, batch, batch]: the student's, then the teacher's
  void* loss;             // T []
  void* gradient_matrix;  // T [batch, batch], or null if no gradient is wanted: dloss/dQ = gradient_matrix Q
};

struct Rkd : RelationLoss {  // of squared distances; T is double
  double distance_weight, angle_weight, eps;
  bool squared;
  double angle_scale;  // 1, or 1 / batch^3
};

struct Irg : RelationLoss {  // of squared distances; T is double
  double eps;
  bool squared;
};

struct Pkt : RelationLoss {  // of Gram matrices
  double eps;
};

struct Cc : RelationLoss {     // of Gram matrices
  const double* coefficients;  // of the kernel's powers of the similarity
  int64_t count;
  bool normalize;
};

template <Isa>
void compute(const Distances&, const Pool&);
template <Isa>
void compute(const Rkd&, const Pool&);
template <Isa>
void compute(const Irg&, const Pool&);
template <Isa>
void compute(const Pkt&, const Pool&);
template <Isa>
void compute(const Cc&, const Pool&);

}  // namespace kd
