// What a row's gradient of softmax_kl is made of, the same on the CPU and on CUDA.
#pragma once

#include "softmax_kl_target.h"

namespace kd {
namespace KD_ISA {
namespace {

// Of a class: q_s - q_t, and q_s
template <typename T>
struct Parted {
  T difference, student;
};

// From log q of the student and of the teacher, and d = log(q_t / q_s): the larger one times 1 - exp(-|d|), so that
// nothing cancels where the networks are close. d is NaN of a class that neither network gives any probability.
template <typename T>
KD_BOTH inline Parted<T> parted(T log_s, T log_t, T d) {
  const T larger = fast_exp(max(log_s, log_t)), lost = larger * unit_expm1(-std::fabs(d));
  const T teacher = d > 0 ? T(1) : T(0);  // has the larger one; a branch would not be vectorised
  return {lost * (2 * teacher - 1), larger + lost * teacher};
}

// What a row's gradient is made of, upstream gradient included. With q of both networks at a class, times the
// student's Z, their difference being made by parted():
//   soft (q_s - q_t) + hard e_p - label y - uniform + non_target (q_s' - q_t') + non_target_mass q_s'
// q': among the classes that are not labelled; from target_a or target_b in place of the last two at the labels.
// soft q_s (h - slope) in place of the first of these for another divergence than the forward KL. Where logits are
// standardised, the teacher's terms are (g - lost z') inverse_std, z' = (s - s_max) inverse_std - mean.
template <typename T>
struct Factors {
  T inverse_s, inverse_t, s_max, t_max, log_ratio, soft, hard, label, uniform;
  T non_target_s_max = 0, non_target_t_max = 0, non_target_s_log_z = 0, non_target_t_log_z = 0;
  T non_target_log_ratio = 0, non_target = 0, non_target_mass = 0;
  double target_a = 0, target_b = 0;
  T inverse_std = 1, mean = 0, lost = 0;

  // The gradient by a logit from that by the standardised one; z is the logit, counted from the maximum.
  KD_BOTH T through_standard(T g, T z) const { return (g - lost * (z * inverse_std - mean)) * inverse_std; }

  // log(q_s Z_s) of a class, and log(q_t Z_s)
  KD_BOTH T student(T z) const { return (z - s_max) * inverse_s; }
  KD_BOTH T teacher(T z) const { return (z - t_max) * inverse_t - log_ratio; }
  // The same among the classes that are not labelled, of the probabilities
  KD_BOTH T non_target_student(T z) const { return (z - non_target_s_max) * inverse_s - non_target_s_log_z; }
  KD_BOTH T non_target_teacher(T z) const { return (z - non_target_t_max) * inverse_t - non_target_t_log_z; }
};

template <typename T>
KD_BOTH inline LogRatio<T> non_target_class_log_ratio(const RowStats<T>& r, const Factors<T>& f) {
  return {f.non_target_s_max, f.non_target_t_max, r.s.inverse_t, r.t.inverse_t, double(f.non_target_log_ratio)};
}

template <typename T>
KD_BOTH inline Factors<T> gradient_factors(const SoftmaxKl& x, const RowStats<T>& r, double upstream, double y_sum) {
  Factors<T> f;
  f.inverse_s = static_cast<T>(r.s.inverse_t);
  f.inverse_t = static_cast<T>(r.t.inverse_t);
  f.s_max = r.s.max;
  f.t_max = r.t.max;
  f.log_ratio = static_cast<T>(r.log_ratio);
  f.soft = static_cast<T>(x.kl / x.temperature * upstream * std::exp(-r.s.log_z) + 0 * r.log_ratio);  // NaN shows
  const double e = x.smoothing;
  f.hard = static_cast<T>(x.ce * upstream * ((1 - e) * y_sum + e) * std::exp(-r.log_p));
  f.label = static_cast<T>(x.ce * upstream * (1 - e));
  f.uniform = static_cast<T>(x.ce * upstream * e / double(x.classes));
  f.inverse_std = r.s.inverse_std;
  f.mean = r.mean;
  f.lost = static_cast<T>(r.lost * upstream);
  return f;
}

// -inf, the logarithm of no mass, counts as 0: the classes that it is taken from are at -inf themselves
template <typename T>
KD_BOTH inline T finite_log(double x) {
  return x == -HUGE_VAL ? T(0) : static_cast<T>(x);
}

template <typename T, typename Logits>
KD_BOTH inline void add_decoupled(const SoftmaxKl& x, const Labels& l, const Logits& s, const Logits& t,
                                  const RowStats<T>& r, double upstream, Factors<T>& f) {
  const double scale = upstream / x.temperature;
  const TargetShares q = target_shares(l, s, t, r);
  f.target_a = scale * x.target_kl * q.a.difference();
  f.target_b = scale * x.target_kl * q.b.difference();
  f.non_target_s_max = r.s.non_target_max;
  f.non_target_t_max = r.t.non_target_max;
  f.non_target_s_log_z = finite_log<T>(r.s.non_target_log_z);
  f.non_target_t_log_z = finite_log<T>(r.t.non_target_log_z);
  const bool both = r.s.non_target_log_z != -HUGE_VAL && r.t.non_target_log_z != -HUGE_VAL;
  f.non_target_log_ratio = both ? static_cast<T>(r.non_target_log_ratio) : T(0);
  f.non_target = static_cast<T>(scale * x.non_target_kl + 0 * r.log_ratio);
  f.non_target_mass = static_cast<T>(scale * x.target_kl * q.others.difference());
}

}  // namespace
}  // namespace KD_ISA
}  // namespace kd
