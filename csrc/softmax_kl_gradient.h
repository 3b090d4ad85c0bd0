// What a row's gradient of softmax_kl is made of, the same on the CPU and on CUDA.
#pragma once

#include "softmax_kl_row.h"

namespace kd {
namespace KD_ISA {
namespace {

// What a row's gradient is made of, upstream gradient included. With e = exp(logit - max):
//   soft (e_s - ratio e_t) + hard e_p - label y - uniform + non_target_s e_s' - non_target_t e_t'      non-target: e'
//   from target_a or target_b in place of the last two at the labels                              their own maximum
// soft e_s (h - slope) in place of the first of these for another divergence than the forward KL. Where logits are
// standardised, the teacher's terms are (g - lost z') inverse_std, z' = (s - s_max) inverse_std - mean.
template <typename T>
struct Factors {
  T inverse_s, inverse_t, s_max, t_max, soft, ratio, hard, label, uniform;
  T non_target_s_max = 0, non_target_t_max = 0, non_target_s = 0, non_target_t = 0;
  double target_a = 0, target_b = 0;
  T inverse_std = 1, mean = 0, lost = 0;

  // The gradient by a logit from that by the standardised one; z is the logit, counted from the maximum.
  KD_BOTH T through_standard(T g, T z) const { return (g - lost * (z * inverse_std - mean)) * inverse_std; }
};

// The ratio is exactly 1, and so the gradient 0, where both networks agree, whether or not the compiler fuses the
// product.
template <typename T>
KD_BOTH inline Factors<T> gradient_factors(const SoftmaxKl& x, const RowStats<T>& r, double upstream, double y_sum) {
  Factors<T> f;
  f.inverse_s = static_cast<T>(r.s.inverse_t);
  f.inverse_t = static_cast<T>(r.t.inverse_t);
  f.s_max = r.s.max;
  f.t_max = r.t.max;
  f.soft = static_cast<T>(x.kl / x.temperature * upstream * std::exp(-r.s.log_z));
  f.ratio = static_cast<T>(std::exp(-r.log_ratio));
  const double e = x.smoothing;
  f.hard = static_cast<T>(x.ce * upstream * ((1 - e) * y_sum + e) * std::exp(-r.log_p));
  f.label = static_cast<T>(x.ce * upstream * (1 - e));
  f.uniform = static_cast<T>(x.ce * upstream * e / double(x.classes));
  f.inverse_std = r.s.inverse_std;
  f.mean = r.mean;
  f.lost = static_cast<T>(r.lost * upstream);
  return f;
}

// -inf, the log-sum of no mass, gives a factor of 0
template <typename T>
KD_BOTH inline T non_target_factor(double factor, double log_z) {
  return log_z == -HUGE_VAL ? T(0) : static_cast<T>(factor * std::exp(-log_z));
}

template <typename T, typename Logits>
KD_BOTH inline void add_decoupled(const SoftmaxKl& x, const Labels& l, const Logits& s, const Logits& t,
                                  const RowStats<T>& r, double upstream, Factors<T>& f) {
  const double scale = upstream / x.temperature;
  const Labelled qs = labelled(l, s, r.s), qt = labelled(l, t, r.t);
  // S_s - S_t from whichever side has the smaller numbers
  const double difference = qs.mass() < 0.5 ? qt.mass() - qs.mass()
                                            : std::exp(r.s.non_target_log_mass()) - std::exp(r.t.non_target_log_mass());
  f.target_a = scale * x.target_kl * (qs.a - qt.a);
  f.target_b = scale * x.target_kl * (qs.b - qt.b);
  f.non_target_s_max = r.s.non_target_max;
  f.non_target_t_max = r.t.non_target_max;
  f.non_target_s = non_target_factor<T>(scale * (x.target_kl * difference + x.non_target_kl), r.s.non_target_log_z);
  f.non_target_t = non_target_factor<T>(scale * x.non_target_kl, r.t.non_target_log_z);
}

}  // namespace
}  // namespace KD_ISA
}  // namespace kd
