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

// exp(z) = exp(z / T)^T, unless logits are standardised: the T for which that is a product; 0 where it takes another
// exponential
KD_BOTH inline int integer_temperature(const SoftmaxKl& x) {
  const double t = x.temperature;
  return !x.standardize && (t == 1 || t == 2 || t == 3 || t == 4) ? static_cast<int>(t) : 0;
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

// log(Z_t / Z_s). Z_s / Z_t = 1 + gap / Z_t - cross / Z_t: where the networks are close, that form keeps the digits
// that the logarithm of a quotient near 1 has lost.
KD_BOTH inline double log_ratio(const Sums& z) {
  const double m = z.cross / z.t, gap = z.gap / z.t;
  if (m < 0.5 && m > -0.5 && gap < 0.5) return -std::log1p(gap - m);
  return std::log(z.t / z.s);
}

KD_BOTH inline double divergence(const Sums& z, double log_ratio) { return z.cross / z.t - log_ratio; }

// The same over the non-target classes, which may have no mass left: the logarithm of none counts as 0 beside some.
KD_BOTH inline double non_target_log_ratio(const Sums& z) {
  return z.s == 0 || z.t == 0 ? std::log(z.t) : log_ratio(z);
}
KD_BOTH inline double non_target_divergence(const Sums& z) {
  return z.t == 0 ? 0 : z.s == 0 ? z.cross : divergence(z, log_ratio(z));
}

// log(q_t / q_s) of a class from its logits, less `constant`. Where the maxima are near, the logits are subtracted from
// each other first, which rounds nothing where the networks are close.
template <typename T>
struct LogRatio {
  T s_max, t_max, inverse_s, inverse_t, constant, shift;
  bool near;
  KD_BOTH LogRatio(T top_s, T top_t, double over_s, double over_t, double less)
      : s_max(top_s),
        t_max(top_t),
        inverse_s(static_cast<T>(over_s)),
        inverse_t(static_cast<T>(over_t)),
        constant(static_cast<T>(less)) {
    const double apart = (double(top_t) - double(top_s)) * over_t;
    near = over_s == over_t && apart < 1 && apart > -1;
    shift = static_cast<T>(apart + less);
  }
  template <bool NEAR>
  KD_BOTH T of(T s, T t) const {
    return NEAR ? (t - s) * inverse_t - shift : (t - t_max) * inverse_t - constant - (s - s_max) * inverse_s;
  }
  KD_BOTH T operator()(T s, T t) const { return near ? of<true>(s, t) : of<false>(s, t); }
};

// A row's mean, counted from its maximum, and its unbiased standard deviation: 0 for a single class
struct Spread {
  double mean = 0, std = 0;
  KD_BOTH Spread() {}
  KD_BOTH Spread(double mean, double squares, int64_t classes)
      : mean(mean), std(std::sqrt(squares / double(classes > 1 ? classes - 1 : 1))) {}
  KD_BOTH double inverse() const { return 1 / (std + 1e-7); }
};

// One network's softmax at temperature T, whose logits are counted from `max`, and that of its non-target classes,
// whose logits are counted from their own.
template <typename T>
struct Softmax {
  T max = 0;
  T inverse_std = 1;     // 1 unless logits are standardised
  double inverse_t = 1;  // over the temperature
  double log_z = 0;
  T non_target_max = 0;
  double non_target_log_z = 0;

  KD_BOTH void scale(T inverse, double over_temperature) {
    inverse_std = inverse;
    inverse_t = double(inverse) * over_temperature;
  }
  KD_BOTH double over(T z) const { return (double(z) - double(max)) * inverse_t; }
  KD_BOTH double log_q(T z) const { return over(z) - log_z; }
  KD_BOTH double non_target_log_mass() const { return over(non_target_max) + non_target_log_z - log_z; }

  // log Z is NaN if anything in the row is, or infinite: it must not hide behind the non-target classes
  KD_BOTH void set_non_target(T top, double sum) {
    non_target_max = (top == -HUGE_VALF ? T(0) : top) + static_cast<T>(log_z * 0);
    non_target_log_z = std::log(sum);
  }
};

// What is saved of a row.
template <typename T>
struct RowStats {
  Softmax<T> s, t;
  double log_p = 0;
  double log_ratio = 0;  // log(Z_t / Z_s)
  double non_target_log_ratio = 0;
  T slope = 0;           // the mean of the divergence's slopes
  double std = 0;        // of the standardised student: 1, or 0 without spread
  T mean = 0, lost = 0;  // its mean, counted from its maximum; how much of it the gradient by it loses

  KD_BOTH void standardise(const SoftmaxKl& x, const Spread& of_s, const Spread& of_t) {
    s.inverse_t = t.inverse_t = 1 / x.temperature;
    if (!x.standardize) return;
    s.scale(static_cast<T>(of_s.inverse()), s.inverse_t);
    t.scale(static_cast<T>(of_t.inverse()), t.inverse_t);
    mean = static_cast<T>(of_s.mean * s.inverse_std);
    std = of_s.std * s.inverse_std;
  }
  // d std / dz = (z - mean) / (classes - 1) / std, so that much of <dL/dz', z'> is lost
  KD_BOTH void lose(double along, int64_t classes) {
    lost = std == 0 ? T(0) : static_cast<T>(along / (std * double(classes > 1 ? classes - 1 : 1)));
  }
  KD_BOTH void set_log_z(double of_s, double ratio) {
    s.log_z = of_s;
    log_ratio = ratio;
    t.log_z = of_s + ratio;
  }
  KD_BOTH void set_non_target(T top_s, T top_t, const Sums& z) {
    s.set_non_target(top_s, z.s);
    t.set_non_target(top_t, z.t);
    non_target_log_ratio = kd::KD_ISA::non_target_log_ratio(z);
  }
  KD_BOTH LogRatio<T> class_log_ratio() const { return {s.max, t.max, s.inverse_t, t.inverse_t, log_ratio}; }
};

template <typename T>
KD_BOTH inline void save_stats(const SoftmaxKlForward& x, int64_t row, const RowStats<T>& r) {
  if (!x.stats) return;
  T* to = static_cast<T*>(x.stats) + row;
  to[0] = r.s.max;
  to[x.rows] = r.t.max;
  to[2 * x.rows] = static_cast<T>(r.log_p);
  to[3 * x.rows] = static_cast<T>(r.s.log_z);
  to[4 * x.rows] = static_cast<T>(r.log_ratio);
  to += 5 * x.rows;
  if (x.decoupled()) {
    to[0] = r.s.non_target_max;
    to[x.rows] = r.t.non_target_max;
    to[2 * x.rows] = static_cast<T>(r.s.non_target_log_z);
    to[3 * x.rows] = static_cast<T>(r.non_target_log_ratio);
    to += 4 * x.rows;
  }
  if (x.divergence != Divergence::forward) {
    to[0] = r.slope;
    to += x.rows;
  }
  if (x.standardize) {
    to[0] = r.s.inverse_std;
    to[x.rows] = r.t.inverse_std;
    to[2 * x.rows] = r.mean;
    to[3 * x.rows] = r.lost;
  }
}

template <typename T>
KD_BOTH inline RowStats<T> read_stats(const SoftmaxKlBackward& x, int64_t row) {
  const T* from = static_cast<const T*>(x.stats) + row;
  RowStats<T> r;
  r.s.max = from[0];
  r.t.max = from[x.rows];
  r.log_p = from[2 * x.rows];
  r.set_log_z(from[3 * x.rows], from[4 * x.rows]);
  from += 5 * x.rows;
  if (x.decoupled()) {
    r.s.non_target_max = from[0];
    r.t.non_target_max = from[x.rows];
    const double log_z = from[2 * x.rows];
    r.s.non_target_log_z = log_z;
    r.non_target_log_ratio = from[3 * x.rows];
    r.t.non_target_log_z = (log_z == -HUGE_VAL ? 0 : log_z) + r.non_target_log_ratio;
    from += 4 * x.rows;
  }
  if (x.divergence != Divergence::forward) {
    r.slope = from[0];
    from += x.rows;
  }
  r.s.inverse_t = r.t.inverse_t = 1 / x.temperature;
  if (x.standardize) {
    r.s.scale(from[0], r.s.inverse_t);
    r.t.scale(from[x.rows], r.t.inverse_t);
    r.mean = from[2 * x.rows];
    r.lost = from[3 * x.rows];
  }
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

}  // namespace
}  // namespace KD_ISA
}  // namespace kd
