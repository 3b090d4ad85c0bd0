// The scalar arithmetic of a row of softmax_kl, the same on the CPU and on CUDA.
// Notation: z logits, T temperature, p = softmax(z), q = softmax(z / T), s student, t teacher, {a, b} the row's labels.
#pragma once

#include "arithmetic.h"
#include "softmax_kl.h"

namespace kd {
namespace KD_ISA {
namespace {

// weight * value, where a weight of 0 means 0 even beside an infinity
KD_BOTH inline double weighted(double weight, double value) { return weight == 0 ? 0 : weight * value; }

struct Labels {
  int64_t a = -1, b = -1;
  double weight_a = 1, weight_b = 0;
  bool keep = true;   // not to be ignored
  bool valid = true;  // nothing may be read at a label out of range
  bool mixed = false;

  KD_BOTH bool has(int64_t k) const { return k == a || k == b; }
  KD_BOTH bool two() const { return a != b; }  // equal labels are one
};

KD_BOTH inline bool is_kept(const SoftmaxKl& x, int64_t row) {
  return !x.target || (x.target[row] != x.ignore_index && (!x.mixed || x.mixed[row] != x.ignore_index));
}

template <typename T>
KD_BOTH inline Labels read_labels(const SoftmaxKl& x, int64_t row) {
  Labels l;
  if (!x.target) return l;
  l.mixed = x.mixed != nullptr;
  l.a = x.target[row];
  l.b = l.mixed ? x.mixed[row] : l.a;
  l.keep = is_kept(x, row);
  l.valid = l.a >= 0 && l.a < x.classes && l.b >= 0 && l.b < x.classes;
  if (x.lam) {
    l.weight_a = element<T>(x.lam_type, x.lam, row * x.lam_stride);
    l.weight_b = 1 - l.weight_a;
  }
  return l;
}

// exp(z) = exp(z / T)^T: the T for which that is a product; 0 where it takes another exponential
KD_BOTH inline int integer_temperature(double t) {
  return t == 1 || t == 2 || t == 3 || t == 4 ? static_cast<int>(t) : 0;
}
template <typename T>
KD_BOTH inline T power(T x, int n) {  // n in 1..4
  const T square = x * x;
  return n == 1 ? x : n == 2 ? square : n == 3 ? square * x : square * square;
}

// d + expm1(-d), times e_t, where e_s = e_t exp(-d): a class's part of a divergence, with nothing cancelling for small
// d
template <typename T>
KD_BOTH inline T divergence_term(T d, T es, T et) {
  const T small = sizeof(T) == 4 ? T(0.25) : T(0.02);
  const T series = T(0.5) - d * (T(1) / 6 - d * (T(1) / 24 - d * (T(1) / 120 - d * (T(1) / 720 - d * (T(1) / 5040)))));
  const T term = d < small && -d < small ? et * (d * d) * series : et * (d - 1) + es;
  return et == 0 ? es : term;
}

// Over classes: Z of p, q_s and q_t, and with d = (z_t - z_s) / T the sums of e_t d and of e_t (d + expm1(-d)).
struct Sums {
  double p = 0, s = 0, t = 0, cross = 0, gap = 0;
};

// KL = m + log(Z_s / Z_t), m = cross / Z_t, and Z_s / Z_t = 1 + gap / Z_t - m: where the networks are close, that
// second form keeps the digits that the logarithm of a quotient near 1 has lost.
KD_BOTH inline double divergence(const Sums& z) {
  const double m = z.cross / z.t, gap = z.gap / z.t;
  if (m < 0.5 && m > -0.5 && gap < 0.5) return m + std::log1p(gap - m);
  return m + std::log(z.s / z.t);
}

// The same over the non-target classes, which may have no mass left.
KD_BOTH inline double non_target_divergence(const Sums& z) { return z.t == 0 ? 0 : z.s == 0 ? z.cross : divergence(z); }

// One network's softmax at temperature T, and that of its non-target classes; logits are counted from `max`.
template <typename T>
struct Softmax {
  T max = 0;
  double log_z = 0;
  T non_target_max = 0;
  double non_target_log_z = 0;

  KD_BOTH double log_q(T z, double temperature) const { return double(z - max) / temperature - log_z; }
  KD_BOTH double non_target_log_mass() const { return double(non_target_max) + non_target_log_z - log_z; }
};

// What is saved of a row.
template <typename T>
struct RowStats {
  Softmax<T> s, t;
  double log_p = 0;
};

template <typename T>
KD_BOTH inline void save_stats(const SoftmaxKlForward& x, int64_t row, const RowStats<T>& r) {
  if (!x.stats) return;
  T* to = static_cast<T*>(x.stats) + row;
  to[0] = r.s.max;
  to[x.rows] = r.t.max;
  to[2 * x.rows] = static_cast<T>(r.log_p);
  to[3 * x.rows] = static_cast<T>(r.s.log_z);
  to[4 * x.rows] = static_cast<T>(r.t.log_z);
  if (!x.decoupled()) return;
  to[5 * x.rows] = r.s.non_target_max;
  to[6 * x.rows] = r.t.non_target_max;
  to[7 * x.rows] = static_cast<T>(r.s.non_target_log_z);
  to[8 * x.rows] = static_cast<T>(r.t.non_target_log_z);
}

template <typename T>
KD_BOTH inline RowStats<T> read_stats(const SoftmaxKlBackward& x, int64_t row) {
  const T* from = static_cast<const T*>(x.stats) + row;
  RowStats<T> r;
  r.s.max = from[0];
  r.t.max = from[x.rows];
  r.log_p = from[2 * x.rows];
  r.s.log_z = from[3 * x.rows];
  r.t.log_z = from[4 * x.rows];
  if (!x.decoupled()) return r;
  r.s.non_target_max = from[5 * x.rows];
  r.t.non_target_max = from[6 * x.rows];
  r.s.non_target_log_z = from[7 * x.rows];
  r.t.non_target_log_z = from[8 * x.rows];
  return r;
}

// -log p of the labels, weighted. `s` is a row of logits, by index.
template <typename T, typename Logits>
KD_BOTH inline double cross_entropy(const Labels& l, const Logits& s, const RowStats<T>& r) {
  double sum = weighted(l.weight_a, double(s[l.a] - r.s.max) - r.log_p);
  if (l.mixed) sum += weighted(l.weight_b, double(s[l.b] - r.s.max) - r.log_p);
  return -sum;
}

// CE with smoothed labels, from CE and the sum over classes of z - max
KD_BOTH inline double smoothed(const SoftmaxKl& x, double ce, double z_sum, double log_p) {
  return (1 - x.smoothing) * ce + x.smoothing * (log_p - z_sum / double(x.classes));
}

// log of the non-target mass: log1p of the labelled mass where that is small, else the non-target classes' own log-sum
template <typename T>
KD_BOTH inline double log_non_target(double labelled, const Softmax<T>& q) {
  return labelled < 0.5 ? std::log1p(-labelled) : q.non_target_log_mass();
}

// q_a and q_b of one network, the second 0 where both labels are one
struct Labelled {
  double a, b;
  KD_BOTH double mass() const { return a + b; }
};

template <typename T, typename Logits>
KD_BOTH inline Labelled labelled(const Labels& l, const Logits& z, const Softmax<T>& q, double temperature) {
  return {std::exp(q.log_q(z[l.a], temperature)), l.two() ? std::exp(q.log_q(z[l.b], temperature)) : 0};
}

// sum over the labelled classes of q_t log(q_t / q_s), plus S_t log(S_t / S_s) for the non-target mass S
template <typename T, typename Logits>
KD_BOTH inline double target_divergence(const Labels& l, const Logits& s, const Logits& t, const RowStats<T>& r,
                                        double temperature) {
  const Labelled qs = labelled(l, s, r.s, temperature), qt = labelled(l, t, r.t, temperature);
  double sum = weighted(qt.a, r.t.log_q(t[l.a], temperature) - r.s.log_q(s[l.a], temperature));
  if (l.two()) sum += weighted(qt.b, r.t.log_q(t[l.b], temperature) - r.s.log_q(s[l.b], temperature));
  const double log_s = log_non_target(qs.mass(), r.s), log_t = log_non_target(qt.mass(), r.t);
  return sum + weighted(std::exp(log_t), log_t - log_s);
}

// What a row's gradient is made of, upstream gradient included. With e = exp(logit - max):
//   soft (e_s - ratio e_t) + hard e_p - label y - uniform + non_target_s e_s' - non_target_t e_t'      non-target: e'
//   from target_a or target_b in place of the last two at the labels                              their own maximum
template <typename T>
struct Factors {
  T inverse_t, s_max, t_max, soft, ratio, hard, label, uniform;
  T non_target_s_max = 0, non_target_t_max = 0, non_target_s = 0, non_target_t = 0;
  double target_a = 0, target_b = 0;
};

// The ratio is exactly 1, and so the gradient 0, where both networks agree, whether or not the compiler fuses the
// product.
template <typename T>
KD_BOTH inline Factors<T> gradient_factors(const SoftmaxKlBackward& x, const RowStats<T>& r, double upstream,
                                           double y_sum) {
  Factors<T> f;
  f.inverse_t = static_cast<T>(1 / x.temperature);
  f.s_max = r.s.max;
  f.t_max = r.t.max;
  f.soft = static_cast<T>(x.kl / x.temperature * upstream * std::exp(-r.s.log_z));
  f.ratio = static_cast<T>(std::exp(r.s.log_z - r.t.log_z));
  const double e = x.smoothing;
  f.hard = static_cast<T>(x.ce * upstream * ((1 - e) * y_sum + e) * std::exp(-r.log_p));
  f.label = static_cast<T>(x.ce * upstream * (1 - e));
  f.uniform = static_cast<T>(x.ce * upstream * e / double(x.classes));
  return f;
}

// -inf, the log-sum of no mass, gives a factor of 0
template <typename T>
KD_BOTH inline T non_target_factor(double factor, double log_z) {
  return log_z == -HUGE_VAL ? T(0) : static_cast<T>(factor * std::exp(-log_z));
}

template <typename T, typename Logits>
KD_BOTH inline void add_decoupled(const SoftmaxKlBackward& x, const Labels& l, const Logits& s, const Logits& t,
                                  const RowStats<T>& r, double upstream, Factors<T>& f) {
  const double scale = upstream / x.temperature;
  const Labelled qs = labelled(l, s, r.s, x.temperature), qt = labelled(l, t, r.t, x.temperature);
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
