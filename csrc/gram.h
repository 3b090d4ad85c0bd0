// gram: similarity-preserving loss from batch Gram matrices, and cosine similarities.
#pragma once

#include "common.h"

namespace kd {

// A matrix of `count` rows of `width` numbers each, one behind the other.
struct Rows {
  const void* data;
  DType type;
  int64_t count, width, stride;
};

struct SpLayer {
  Rows student, teacher;
  void* out;  // backward: the gradient, dense rows in the student's dtype
};

struct SpGram {
  const SpLayer* layers;
  int64_t count, batch;
  bool l1, zero_row_grad;
  double scale, eps;
  void* loss;     // T []
  void* weights;  // T [count, batch, batch], or null if no gradient is wanted
  const void* grad;  // backward: T []
  void* workspace;   // CUDA only
};

struct Cosine {
  Rows a, b;
  void* similarity;  // T [n, m]
  void* inverse_a;   // T [n]
  void* inverse_b;   // T [m]
  const void* grad;  // backward: T [n, m]
  void* grad_a;      // backward: dense, a's dtype
  void* grad_b;
  void* workspace;  // CUDA only
};

KD_FOR_EACH_ISA(void sp_forward(const SpGram&, bool fp64, const Pool&);
                void sp_backward(const SpGram&, bool fp64, const Pool&);
                void cosine_forward(const Cosine&, bool fp64, const Pool&);
                void cosine_backward(const Cosine&, bool fp64, const Pool&);)

}  // namespace kd
