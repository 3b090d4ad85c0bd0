// The divergences of softmax_kl but the forward KL, class by class, the same on the CPU and on CUDA. With p the
// teacher's and q the student's probabilities, and up to constants:
//
//   d/dz_j of sum_k f(p_k, q_k) = q_j (h_j - sum_k q_k h_k) / T,   h = df/dq, the slope
//
//   reverse       f = q log(q / p)                             h = log(q / p)
//   jsd           f = b p log(p / m) + (1 - b) q log(q / m)    h = (1 - b) log(q / m)
//   skew          f = p log(p / m)                             h = (1 - b)^2 (q - p) / m
//   skew_reverse  f = q log(q / m)                             h = log(q / m) - b (1 - b) (q - p) / m
//
// m = b p + (1 - b) q, b being beta, or 1 - beta in skew_reverse. All is made from d = log(p / q), which is small where
// the networks are close, so that nothing cancels.
#pragma once

#include "softmax_kl_row.h"

namespace kd {
namespace KD_ISA {
namespace {

// The mixture's parts of p and of q
template <typename T>
struct Shares {
  T teacher, student;
  KD_BOTH explicit Shares(const SoftmaxKlOptions& x)
      : teacher(static_cast<T>(x.divergence == Divergence::skew_reverse ? 1 - x.beta : x.beta)),
        student(static_cast<T>(x.divergence == Divergence::skew_reverse ? x.beta : 1 - x.beta)) {}
};

template <typename T>
struct Mixture {
  T log_p, log_q, ratio;  // log(p / m), log(q / m), (q - p) / m
};

template <typename T>
KD_BOTH inline Mixture<T> mixture(T d, const Shares<T>& b) {
  const bool teacher = d > 0;  // which of the two is larger
  const Exponentials<T> e = unit_exp(teacher ? -d : d);
  const T smaller = teacher ? b.student : b.teacher, larger = teacher ? b.teacher : b.student;
  const T y = -smaller * e.minus_1, m = y < T(0.5) ? 1 - y : larger + smaller * e.exp;  // over the larger one
  const T log = -log_1m(y, m);
  return {teacher ? log : log + d, teacher ? log - d : log, (teacher ? e.minus_1 : -e.minus_1) / m};
}

template <Divergence D, typename T>
KD_BOTH inline T slope(const Mixture<T>& x, const Shares<T>& b) {
  if (D == Divergence::jsd) return b.student * x.log_q;
  if (D == Divergence::skew) return b.student * b.student * x.ratio;
  return x.log_q - b.teacher * b.student * x.ratio;
}

template <Divergence D, typename T>
KD_BOTH inline T slope(T d, const Shares<T>& b) {
  return D == Divergence::reverse ? -d : slope<D>(mixture(d, b), b);
}

// A class's part of the divergence, all of them positive, and its slope
template <typename T>
struct Part {
  T value, slope;
};

template <Divergence D, typename T>
KD_BOTH inline Part<T> part(T d, T p, T q, const Shares<T>& b) {
  if (D == Divergence::reverse) return {divergence_term(-d, p, q), -d};
  const Mixture<T> x = mixture(d, b);
  const T m = b.teacher * p + b.student * q;
  const T of_p = D == Divergence::skew_reverse ? T(0) : divergence_term(x.log_p, m, p);
  const T of_q = D == Divergence::skew ? T(0) : divergence_term(x.log_q, m, q);
  const bool jsd = D == Divergence::jsd;
  return {jsd ? b.teacher * of_p + b.student * of_q : of_p + of_q, slope<D>(x, b)};
}

// q h, where a class without probability adds nothing, even beside an infinity
template <typename T>
KD_BOTH inline T of_student(T q, T h) {
  return q == 0 ? T(0) : q * h;
}

// A divergence as a type
template <Divergence D>
struct Kind {
  static constexpr Divergence value = D;
};

template <typename F>
KD_BOTH inline void choose_divergence(Divergence divergence, const F& f) {
  switch (divergence) {
    case Divergence::forward: return f(Kind<Divergence::forward>());
    case Divergence::reverse: return f(Kind<Divergence::reverse>());
    case Divergence::jsd: return f(Kind<Divergence::jsd>());
    case Divergence::skew: return f(Kind<Divergence::skew>());
    case Divergence::skew_reverse: return f(Kind<Divergence::skew_reverse>());
  }
}

}  // namespace
}  // namespace KD_ISA
}  // namespace kd
