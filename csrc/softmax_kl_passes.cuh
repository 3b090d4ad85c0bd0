// The passes of softmax_kl's forward kernel over a row on CUDA: maxima, sums, and what further ones some rows take.
#pragma once

#include "softmax_kl_row.cuh"

namespace kd {
namespace cuda {
namespace {

// A class's part of the sums over q, from its logits at temperature T
template <typename T>
__device__ void add_class(T a, T b, T es, T et, Sums& z) {
  z.s += es;
  z.t += et;
  z.cross += et == 0 ? T(0) : et * (b - a);  // a class without teacher probability adds nothing
  z.gap += divergence_term(b - a, es, et);
}

template <typename T, bool WARP>
__device__ void add_threads(const Team<T, WARP>& team, Sums& z) {
  z.s = team.sum(z.s);
  z.t = team.sum(z.t);
  z.cross = team.sum(z.cross);
  z.gap = team.sum(z.gap);
}

// The first pass: maxima.
template <typename T, bool WARP>
__device__ void row_maxima(const SoftmaxKl& x, const Team<T, WARP>& team, const Logits<T>& s, const Logits<T>& t,
                           RowStats<T>& r) {
  T s_max = -infinity<T>(), t_max = -infinity<T>();
  for (int64_t k = team.rank; k < x.classes; k += team.size) {
    s_max = Max()(s_max, s[k]);
    if (x.soft()) t_max = Max()(t_max, t[k]);
  }
  r.s.max = team.max(s_max);
  if (x.soft()) r.t.max = team.max(t_max);
}

// The second pass: sums, their logarithms, and the maxima of the non-target classes.
template <typename T, bool WARP>
__device__ Sums row_sums(const SoftmaxKl& x, const Team<T, WARP>& team, const Logits<T>& s, const Logits<T>& t,
                         const Labels& l, RowStats<T>& r) {
  const bool ce = x.ce != 0, soft = x.soft();
  const T inverse_s = static_cast<T>(r.s.inverse_t), inverse_t = static_cast<T>(r.t.inverse_t);
  const int n = integer_temperature(x);
  T other_s = -infinity<T>(), other_t = -infinity<T>();
  Sums z;
  for (int64_t k = team.rank; k < x.classes; k += team.size) {
    const T d = s[k] - r.s.max;
    T es = 0;
    if (soft) {
      const T a = d * inverse_s, b = (t[k] - r.t.max) * inverse_t;
      es = exp(a);
      add_class(a, b, es, T(exp(b)), z);
      if (!l.has(k)) {
        other_s = Max()(other_s, a);
        other_t = Max()(other_t, b);
      }
    }
    if (ce) z.p += soft && n ? power(es, n) : exp(d);
  }
  if (ce) r.log_p = log(z.p = team.sum(z.p));
  if (soft) {
    add_threads(team, z);
    r.set_log_z(log(z.s), log_ratio(z));
  }
  if (x.decoupled()) {
    r.s.non_target_max = team.max(other_s);
    r.t.non_target_max = team.max(other_t);
  }
  return z;
}

template <typename T, bool WARP>
__device__ Spread spread(const SoftmaxKl& x, const Team<T, WARP>& team, const Logits<T>& z, T max) {
  double sum = 0, squares = 0;
  for (int64_t k = team.rank; k < x.classes; k += team.size) sum += double(z[k] - max);
  const double mean = team.sum(sum) / double(x.classes);
  for (int64_t k = team.rank; k < x.classes; k += team.size) {
    const double difference = double(z[k] - max) - mean;
    squares += difference * difference;
  }
  return {mean, team.sum(squares), x.classes};
}

// Another divergence than the forward KL, and the mean of its slopes into `r`
template <typename T, bool WARP>
__device__ double sum_parts(const SoftmaxKl& x, const Team<T, WARP>& team, const Logits<T>& s, const Logits<T>& t,
                            RowStats<T>& r) {
  const Shares<T> shares(x);
  const LogRatio<T> log_ratio(r);
  const T inverse_s = static_cast<T>(r.s.inverse_t), inverse_t = static_cast<T>(r.t.inverse_t),
          of_s = static_cast<T>(exp(-r.s.log_z)), of_t = static_cast<T>(exp(-r.t.log_z));
  double value = 0, slope = 0;
  for (int64_t k = team.rank; k < x.classes; k += team.size) {
    const T a = s[k], b = t[k];
    const T q = T(exp((a - r.s.max) * inverse_s)) * of_s, p = T(exp((b - r.t.max) * inverse_t)) * of_t;
    const Part<T> of_class = class_part(x.divergence, log_ratio(a, b), p, q, shares);
    value += of_class.value;
    slope += of_student(q, of_class.slope);
  }
  r.slope = static_cast<T>(team.sum(slope));
  return team.sum(value);
}

}  // namespace
}  // namespace cuda
}  // namespace kd
