// nkd: normalised knowledge distillation, rows of logits with one label each, and the gradient. On the CPU alone.
#pragma once

#include "softmax_kl.h"

namespace kd {

// Rows have unit column stride.
struct LogitPair : Call {
  int64_t rows, classes;
  DType student_type, teacher_type;
  const void* student;  // [rows, classes], stride student_stride
  const void* teacher;
  int64_t student_stride, teacher_stride;
};

struct Nkd : LogitPair {
  const int64_t* target;  // [rows]
  double temperature, gamma;
  int64_t ignore_index;
  Reduction reduction;
};

constexpr int64_t kNkdStats = 6;  // saved numbers per row

struct NkdForward : Nkd {
  void* loss;   // T [] or [rows]
  void* stats;  // T [kNkdStats, rows] or null: of the non-target classes max s, log Z s, log Z at T = 1, max t, log Z
                // t; the teacher's probability of the target
  void* scale;  // T []
};

struct NkdBackward : Nkd {
  const void* grad;  // T, element i * grad_stride
  int64_t grad_stride;
  const void* stats;
  const void* scale;
  void* out;  // the student's dtype, [rows, classes] contiguous
};

template <Isa>
void compute(const NkdForward&, const Pool&);
template <Isa>
void compute(const NkdBackward&, const Pool&);

}  // namespace kd
