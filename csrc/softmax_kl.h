// softmax_kl: rows of student and teacher logits to weighted terms per row, and the gradient.
#pragma once

#include "common.h"

namespace kd {

enum class Reduction : int { mean, sum, none };
enum class Divergence : int { forward, reverse, jsd, skew, skew_reverse };

struct SoftmaxKlOptions {  // in the order of the op's arguments
  int64_t ignore_index;
  double smoothing;                         // e: CE is with (1 - e) y + e / C
  double ce, kl, target_kl, non_target_kl;  // the terms' weights
  double temperature;
  Reduction reduction;
  Divergence divergence;
  double beta;
  bool standardize;

  KD_BOTH bool decoupled() const { return target_kl != 0 || non_target_kl != 0; }
  KD_BOTH bool soft() const { return kl != 0 || decoupled(); }
  // the forward KL of logits as they are
  KD_BOTH bool plain() const { return divergence == Divergence::forward && !standardize; }
  KD_BOTH int64_t stats_count() const {  // saved numbers per row
    return 5 + (decoupled() ? 4 : 0) + (divergence == Divergence::forward ? 0 : 1) + (standardize ? 4 : 0);
  }
};

// Rows have unit column stride.
struct SoftmaxKl : Call, SoftmaxKlOptions {
  int64_t rows, classes;
  DType student_type, teacher_type;
  const void* student;  // [rows, classes], stride student_stride
  const void* teacher;
  int64_t student_stride, teacher_stride;

  const int64_t* target;  // [rows] or null
  const int64_t* mixed;   // [rows] or null
  const void* lam;        // [] (stride 0) or [rows] (stride 1), or null
  DType lam_type;
  int64_t lam_stride;
  const void* dense;  // [rows, classes] or null
  DType dense_type;
  int64_t dense_stride;
};

struct SoftmaxKlForward : SoftmaxKl {
  void* loss;   // T [] or [rows]
  void* stats;  // T [stats_count(), rows] or null; save_stats has the order
  void* scale;  // T []
};

struct SoftmaxKlBackward : SoftmaxKl {
  const void* grad;  // T, element i * grad_stride
  int64_t grad_stride;
  const void* stats;
  const void* scale;
  void* out;  // the student's dtype, [rows, classes] contiguous; may be the student's own memory
};

template <Isa>
void compute(const SoftmaxKlForward&, const Pool&);
template <Isa>
void compute(const SoftmaxKlBackward&, const Pool&);

}  // namespace kd
