// What some rows of softmax_kl take beside the one sweep of softmax_kl_sums.cuh: standardised logits, another
// divergence than the forward KL, dense targets and smoothed labels. The first sweep keeps the row in shared memory
// where it fits; all of them go class by class, as their arithmetic is too long to be unrolled.
#pragma once

#include "divergences.h"
#include "softmax_kl_sums.cuh"

namespace kd {
namespace cuda {
namespace {

// The divergence is the same for a whole launch, so these branches never diverge.
template <typename T>
__device__ Part<T> class_part(Divergence divergence, T d, T p, T q, const Shares<T>& shares) {
  switch (divergence) {
    case Divergence::reverse: return part<Divergence::reverse>(d, p, q, shares);
    case Divergence::jsd: return part<Divergence::jsd>(d, p, q, shares);
    case Divergence::skew: return part<Divergence::skew>(d, p, q, shares);
    default: return part<Divergence::skew_reverse>(d, p, q, shares);
  }
}
template <typename T>
__device__ T class_slope(Divergence divergence, T d, const Shares<T>& shares) {
  switch (divergence) {
    case Divergence::reverse: return slope<Divergence::reverse>(d, shares);
    case Divergence::jsd: return slope<Divergence::jsd>(d, shares);
    case Divergence::skew: return slope<Divergence::skew>(d, shares);
    default: return slope<Divergence::skew_reverse>(d, shares);
  }
}

template <typename T>
__device__ T dense_target(const SoftmaxKl& x, int64_t row, int64_t k) {
  return element<T>(x.dense_type, x.dense, row * x.dense_stride + k);
}

// The moments of both networks' rows, in two sweeps; means are counted from the maxima, which come into `r`.
template <typename R, typename T>
__device__ void standardise(const SoftmaxKl& x, R& row, RowStats<T>& r) {
  T most[2] = {-infinity<T>(), -infinity<T>()}, sum[2] = {}, squares[2] = {};
  const T first_s = row.counts() ? row.student()[0] : T(0), first_t = row.counts() ? row.teacher()[0] : T(0);
  row.each_class([&](int, T s, T t) {
    most[0] = fmax(most[0], s);
    most[1] = fmax(most[1], t);
    sum[0] += s - first_s;
    sum[1] += t - first_t;
  });
  double mean[2], square[2];
  row.team.max(most);
  row.team.sum(sum, mean);
  const double n = double(x.classes);
  const T mean_s = static_cast<T>(mean[0] / n), mean_t = static_cast<T>(mean[1] / n);
  row.each_class([&](int, T s, T t) {
    const T of_s = s - first_s - mean_s, of_t = t - first_t - mean_t;
    squares[0] += of_s * of_s;
    squares[1] += of_t * of_t;
  });
  row.team.sum(squares, square);
  const double from_s = double(first_s) - double(most[0]), from_t = double(first_t) - double(most[1]);
  r.standardise(x, Spread(mean[0] / n + from_s, square[0], x.classes),
                Spread(mean[1] / n + from_t, square[1], x.classes));
}

// CE with a dense target or smoothed labels; log p is in `r`.
template <typename R, typename T>
__device__ double wide_cross_entropy(const SoftmaxKl& x, R& row, const Labels& l, const RowStats<T>& r) {
  const T max = r.s.max, log_p = static_cast<T>(r.log_p);
  T sum[2] = {};
  row.each_class([&](int k, T s, T) {
    const T d = s - max;
    sum[0] += d;
    const T y = x.dense ? dense_target<T>(x, row.team.row, k) : T(0);
    sum[1] += y == 0 ? T(0) : y * (d - log_p);
  });
  double total[2];
  row.team.sum(sum, total);
  if (!row.counts()) return 0;
  const double ce = x.dense ? -total[1] : cross_entropy(l, row.student(), r);
  return x.smoothing == 0 ? ce : smoothed(x, ce, total[0], r.log_p);
}

// e^(z / T) of both networks' logits, counted from the maxima, by class
template <typename T>
struct Exponentiated {
  T s_max, t_max, s, t;
  __device__ explicit Exponentiated(const RowStats<T>& r)
      : s_max(r.s.max),
        t_max(r.t.max),
        s(static_cast<T>(r.s.inverse_t * kLog2E)),
        t(static_cast<T>(r.t.inverse_t * kLog2E)) {}
  __device__ T student(T z) const { return exp2_of((z - s_max) * s); }
  __device__ T teacher(T z) const { return exp2_of((z - t_max) * t); }
};

// Another divergence than the forward KL, and the mean of its slopes into `r`
template <typename R, typename T>
__device__ double sum_parts(const SoftmaxKl& x, R& row, RowStats<T>& r) {
  const Shares<T> shares(x);
  const LogRatio<T> log_ratio = r.class_log_ratio();
  const Exponentiated<T> e(r);
  const T of_s = static_cast<T>(exp(-r.s.log_z)), of_t = static_cast<T>(exp(-r.t.log_z));
  T sum[2] = {};
  row.each_class([&](int, T s, T t) {
    const T q = e.student(s) * of_s, p = e.teacher(t) * of_t;
    const Part<T> of_class = class_part(x.divergence, log_ratio(s, t), p, q, shares);
    sum[0] += of_class.value;
    sum[1] += of_student(q, of_class.slope);
  });
  double total[2];
  row.team.sum(sum, total);
  r.slope = static_cast<T>(total[1]);
  return total[0];
}

// The decoupled terms' part at a class that is not labelled; log_ratio is that among those classes
template <typename T>
__device__ T non_target_gradient(const Factors<T>& f, const LogRatio<T>& log_ratio, T s, T t) {
  const Parted<T> q = parted_by_2(f.non_target_student(s), f.non_target_teacher(t), log_ratio(s, t));
  return f.non_target * q.difference + f.non_target_mass * q.student;
}

// The gradient of the terms with a teacher by the student's logit of class k, or by the standardised one
template <typename T>
struct SoftGradient {
  const SoftmaxKl& x;
  const Labels& l;
  const Factors<T>& f;
  const Exponentiated<T> e;
  const LogRatio<T> log_ratio, non_target_log_ratio;
  const Shares<T> shares;
  T mean_slope;

  __device__ SoftGradient(const SoftmaxKl& call, const Labels& labels, const RowStats<T>& r, const Factors<T>& factors)
      : x(call),
        l(labels),
        f(factors),
        e(r),
        log_ratio(r.class_log_ratio()),
        non_target_log_ratio(non_target_class_log_ratio(r, factors)),
        shares(call),
        mean_slope(r.slope) {}

  __device__ T operator()(int k, T s, T t) const {
    T g = 0;
    if (x.kl != 0 && x.divergence == Divergence::forward) {
      g = f.soft * parted_by_2(f.student(s), f.teacher(t), log_ratio(s, t)).difference;
    } else if (x.kl != 0) {
      const T h = class_slope(x.divergence, log_ratio(s, t), shares);
      g = of_student(f.soft * e.student(s), h - mean_slope);
    }
    if (!x.decoupled()) return g;
    if (l.has(k)) return static_cast<T>(g + (k == l.a ? f.target_a : f.target_b));
    return g + non_target_gradient(f, non_target_log_ratio, s, t);
  }
};

// <dL/dz', z'>, whose share the gradient loses on its way from the standardised logits z'
template <typename R, typename T>
__device__ double along_logits(const SoftmaxKl& x, R& row, const Labels& l, const RowStats<T>& r) {
  Factors<T> f = gradient_factors(x, r, 1.0, 0.0);
  if (x.decoupled() && row.counts()) add_decoupled(x, l, row.student(), row.teacher(), r, 1.0, f);
  const SoftGradient<T> gradient(x, l, r, f);
  T sum = 0;
  row.each_class([&](int k, T s, T t) { sum += gradient(k, s, t) * ((s - r.s.max) * r.s.inverse_std - r.mean); });
  return row.team.sum(sum);
}

// A row's loss, whatever it is made of, and what is saved of it
template <typename R, typename T>
__device__ double any_terms(const SoftmaxKl& x, R& row, const Labels& l, bool save, RowStats<T>& r) {
  const bool standard = x.standardize && x.soft();
  r.standardise(x, Spread(), Spread());
  if (standard) standardise(x, row, r);
  double result = terms_of_sums<true>(x, row, l, r);
  if (x.ce != 0 && (x.dense || x.smoothing != 0)) result += x.ce * wide_cross_entropy(x, row, l, r);
  if (x.kl != 0 && x.divergence != Divergence::forward) result += x.kl * sum_parts(x, row, r);
  if (standard && save) r.lose(along_logits(x, row, l, r), x.classes);
  return result;
}

}  // namespace
}  // namespace cuda
}  // namespace kd
