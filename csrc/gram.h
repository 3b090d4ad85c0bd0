// gram: batch Gram matrices and the similarity-preserving loss of them; products and cosines of rows.
#pragma once

#include "common.h"

namespace kd {

// A matrix of `count` rows of `width` numbers each, one behind the other.
struct Rows {
  const void* data;
  DType type;
  int64_t count, width, stride;
};

// K = Q Q^T of every matrix.
struct Grams : Call {
  const Rows* features;  // [count], of `batch` rows each
  int64_t count, batch;
  void* grams;  // T [count, batch, batch]
};

struct SpOptions {  // in the order of the ops' arguments
  bool l1;
  const double* scales;  // [layers]
  double eps;
  bool zero_row_grad, per_layer;
};

// Sum over layers of scale ||G_t - G_s||_F^2, G being K with normalised rows.
struct SpLoss : Call, SpOptions {
  int64_t layers, batch;
  void* loss;             // T [], or [layers] with per_layer
  void* gradient_matrix;  // T [layers, batch, batch], or null if no gradient is wanted
};

struct SpForward : SpLoss {
  const Rows* features;  // [2 layers]: the student's, then the teacher's
};

struct SpFromGrams : SpLoss {
  const void* grams;  // T [2, layers, batch, batch]: the student's K, then the teacher's
};

struct SpBackward : Call {
  const Rows* student;  // [layers]
  void* const* out;     // [layers], dense rows in the student's dtype
  int64_t layers, batch;
  const void* gradient_matrix;
  const void* grad;  // T, element layer * grad_stride
  int64_t grad_stride;
};

struct Products : Call {
  Rows a, b;
  void* products;   // T [n, m]
  void* squares_a;  // T [n]
  void* squares_b;  // T [m]
};

struct CosineForward : Call {
  Rows a, b;
  void* similarity;  // T [n, m]
  void* inverse_a;   // T [n]
  void* inverse_b;   // T [m]
};

struct CosineBackward : Call {
  Rows a, b;
  const void *similarity, *inverse_a, *inverse_b;
  const void* grad;  // T [n, m]
  void* grad_a;      // dense, a's dtype
  void* grad_b;
};

template <Isa>
void compute(const Grams&, const Pool&);
template <Isa>
void compute(const SpForward&, const Pool&);
template <Isa>
void compute(const SpFromGrams&, const Pool&);
template <Isa>
void compute(const SpBackward&, const Pool&);
template <Isa>
void compute(const Products&, const Pool&);
template <Isa>
void compute(const CosineForward&, const Pool&);
template <Isa>
void compute(const CosineBackward&, const Pool&);

}  // namespace kd
