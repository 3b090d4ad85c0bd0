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

// Rows have unit column stride. T below is float, or double where an input is.
struct SoftmaxKl {
  int64_t rows, classes;
  DType student_type, teacher_type;
  const void* student;  // [rows, classes], stride student_stride
  const void* teacher;
  int64_t student_stride, teacher_stride;

  const int64_t* target;        // [rows] or null
  const int64_t* target_mixed;  // [rows] or null
  const void* lam;              // [] (stride 0) or [rows] (stride 1), or null
  DType lam_type;
  int64_t lam_stride;
  const void* dense;  // [rows, classes] or null
  DType dense_type;
  int64_t dense_stride;
  int64_t ignore_index;

  double temperature, w_ce, w_kl, w_target, w_other;

  KD_BOTH bool decoupled() const { return w_target != 0 || w_other != 0; }
  KD_BOTH bool soft() const { return w_kl != 0 || decoupled(); }
};

struct SoftmaxKlForward : SoftmaxKl {
  Reduction reduction;
  void* loss;   // T [] or [rows]
  void* stats;  // T [5 or 9, rows] or null: max s, max t, log Z of p, q_s, q_t; rest: max s, max t, log Z s, log Z t
  void* scale;  // T []
  void* workspace;  // CUDA: T [rows] and int64 [rows / 32 + 1]; unused on the CPU
};

struct SoftmaxKlBackward : SoftmaxKl {
  const void* grad;  // T, element i * grad_stride
  int64_t grad_stride;
  const void* stats;
  const void* scale;
  void* out;  // the student's dtype, [rows, classes] contiguous
};

KD_FOR_EACH_ISA(void softmax_kl_forward(const SoftmaxKlForward&, bool fp64, const Pool&);
                void softmax_kl_backward(const SoftmaxKlBackward&, bool fp64, const Pool&);)

}  // namespace kd
