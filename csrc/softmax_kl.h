// softmax_kl: rows of student and teacher logits to weighted terms per row, and the gradient.
#pragma once

#include "common.h"

namespace kd {

// d + expm1(-d), times e_t, where e_s = e_t exp(-d): a class's part of a divergence, with nothing cancelling for small d.
template <typename T>
KD_BOTH inline T divergence_term(T d, T es, T et) {
  const T small = sizeof(T) == 4 ? T(0.25) : T(0.02);
  const T series =
      T(0.5) - d * (T(1) / 6 - d * (T(1) / 24 - d * (T(1) / 120 - d * (T(1) / 720 - d * (T(1) / 5040)))));
  const T term = d < small && -d < small ? et * (d * d) * series : et * (d - 1) + es;
  return et == 0 ? es : term;
}

enum class Reduction : int { mean, sum, none };

struct SoftmaxKlOptions {  // in the order of the op's arguments
  int64_t ignore_index;
  double ce, kl, target_kl, non_target_kl;  // the terms' weights
  double temperature;
  Reduction reduction;

  KD_BOTH bool decoupled() const { return target_kl != 0 || non_target_kl != 0; }
  KD_BOTH bool soft() const { return kl != 0 || decoupled(); }
  KD_BOTH int64_t stats_count() const { return decoupled() ? 9 : 5; }  // saved numbers per row
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
  void* stats;  // T [stats_count(), rows] or null: max s, max t, log Z of p, q_s, q_t; non-target: max s, max t, log Z s, log Z t
  void* scale;  // T []
};

struct SoftmaxKlBackward : SoftmaxKl {
  const void* grad;  // T, element i * grad_stride
  int64_t grad_stride;
  const void* stats;
  const void* scale;
  void* out;  // the student's dtype, [rows, classes] contiguous
};

template <Isa>
void compute(const SoftmaxKlForward&, const Pool&);
template <Isa>
void compute(const SoftmaxKlBackward&, const Pool&);

}  // namespace kd
