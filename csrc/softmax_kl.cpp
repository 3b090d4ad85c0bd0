// softmax_kl on the CPU. One row at a time: a pass for the maxima, then one for everything else, with exp(z) made
// from exp(z / T) by multiplication where T is a small integer. The row is in the cache for the second pass, and for
// the further ones that standardised logits and another divergence than the forward KL take.
#include "softmax_kl.h"

#include "softmax_kl_loops.h"

namespace kd {
namespace KD_ISA {
namespace {

constexpr int64_t kSmall = 1 << 15;  // logits that are not worth a second thread

template <typename T>
const T* dense_target(const SoftmaxKl& x, int64_t row, T* buffer) {
  return load<T>(x.dense_type, x.dense, row * x.dense_stride, x.classes, buffer);
}

// ---- forward ----

// The first pass and the second: maxima, sums, and their logarithms into `r`.
template <typename T>
Sums row_sums(const SoftmaxKl& x, const Logits<T>& z, RowStats<T>& r) {
  const bool ce = x.ce != 0, soft = x.soft();
  r.s.max = largest(z.s, x.classes);
  if (soft) r.t.max = largest(z.t, x.classes);
  Spread of_s, of_t;
  if (soft && x.standardize) {
    of_s = spread(z.s, x.classes, r.s.max);
    of_t = spread(z.t, x.classes, r.t.max);
  }
  r.standardise(x, of_s, of_t);
  Sums sums;
  const LogRatio<T> apart = r.class_log_ratio();
  choose_variant(ce, soft, integer_temperature(x), [&](auto variant) {
    choose_near(apart.near, [&](auto near) { sums = sum_classes(variant, near, z.s, z.t, x.classes, apart); });
  });
  if (ce) r.log_p = std::log(sums.p);
  if (soft) r.set_log_z(std::log(sums.s), log_ratio(sums));
  return sums;
}

template <typename T>
double dense_cross_entropy(const SoftmaxKl& x, int64_t row, const Logits<T>& z, const RowStats<T>& r) {
  const T* y = dense_target(x, row, z.spare);
  const T* s = z.s;
  const T s_max = r.s.max, log_p = static_cast<T>(r.log_p);
  double sum = 0;
  for (int64_t begin = 0; begin < x.classes; begin += kChunk) {
    const int64_t end = min(x.classes, begin + kChunk);
    T part = 0;
#pragma omp simd reduction(+ : part)
    for (int64_t k = begin; k < end; ++k) part += y[k] == 0 ? T(0) : y[k] * (s[k] - s_max - log_p);
    sum += part;
  }
  return -sum;
}

template <typename T>
double sum_of_logits(const SoftmaxKl& x, const Logits<T>& z, const RowStats<T>& r) {
  double sum = 0;
  for (int64_t k = 0; k < x.classes; ++k) sum += double(z.s[k] - r.s.max);
  return sum;
}

// A row's logits with the labelled classes at -inf, and the largest of the others
template <typename T>
T non_target_logits(const T* z, int64_t n, const Labels& l, T* out) {
  std::memcpy(out, z, static_cast<size_t>(n) * sizeof(T));
  out[l.a] = out[l.b] = -HUGE_VALF;
  return largest(out, n);
}

// The decoupled terms, and the non-target part of `r`.
template <typename T>
double decoupled_terms(const SoftmaxKl& x, const Logits<T>& z, const Labels& l, RowStats<T>& r) {
  const int64_t n = x.classes;
  T *s = z.spare, *t = z.spare + n;
  const T top_s = non_target_logits(z.s, n, l, s), top_t = non_target_logits(z.t, n, l, t), none = -HUGE_VALF;
  const LogRatio<T> apart(top_s == none ? T(0) : top_s, top_t == none ? T(0) : top_t, r.s.inverse_t, r.t.inverse_t, 0);
  Sums sums;
  choose_near(apart.near, [&](auto near) { sums = sum_classes(Variant<false, true, 0>(), near, s, t, n, apart); });
  r.set_non_target(top_s, top_t, sums);
  double result = (r.s.log_z + r.t.log_z) * 0;  // NaN and infinity show here too
  if (x.non_target_kl != 0) result += x.non_target_kl * non_target_divergence(sums);
  if (x.target_kl != 0) result += x.target_kl * target_divergence(l, z.s, z.t, r);
  return result;
}

// Of the rows' divergence; `sums` has the forward KL.
template <typename T>
double row_divergence(const SoftmaxKl& x, const Logits<T>& z, const Sums& sums, RowStats<T>& r) {
  double result = 0;
  choose_divergence(x.divergence, [&](auto kind) {
    if constexpr (kind.value == Divergence::forward) result = divergence(sums, r.log_ratio);
    else
      choose_near(r.class_log_ratio().near,
                  [&](auto near) { result = sum_parts(kind, near, z, x.classes, Shares<T>(x), r); });
  });
  return result;
}

// The gradient of the terms with a teacher by their own logits, standardised or not
template <typename T>
void soft_gradient(const SoftmaxKl& x, const Logits<T>& z, const Labels& l, const RowStats<T>& r, double upstream,
                   Factors<T>& f, T* out) {
  const int64_t n = x.classes;
  choose_near(r.class_log_ratio().near, [&](auto near) {
    choose_divergence(x.divergence, [&](auto kind) {
      if (x.kl == 0) std::memset(out, 0, static_cast<size_t>(n) * sizeof(T));
      else if constexpr (kind.value == Divergence::forward) gradient(Variant<false, true, 0>(), near, z, n, f, r, out);
      else slope_gradient(kind, near, z, n, f, Shares<T>(x), r, out);
    });
  });
  if (!x.decoupled()) return;
  add_decoupled(x, l, z.s, z.t, r, upstream, f);
  choose_near(non_target_class_log_ratio(r, f).near, [&](auto near) { decoupled_gradient(near, z, l, n, f, r, out); });
}

// <dL/dz', z'>, whose share the gradient loses on its way from the standardised logits z'
template <typename T>
double along_logits(const SoftmaxKl& x, const Logits<T>& z, const Labels& l, const RowStats<T>& r) {
  Factors<T> f = gradient_factors(x, r, 1.0, 0.0);
  T* g = z.spare;
  soft_gradient(x, z, l, r, 1.0, f, g);
  const T *s = z.s, max = r.s.max, inverse_std = r.s.inverse_std, mean = r.mean;
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t k = 0; k < x.classes; ++k) sum += double(g[k]) * double((s[k] - max) * inverse_std - mean);
  return sum;
}

template <typename T>
double row_forward(const SoftmaxKlForward& x, int64_t row, T* buffer) {
  const Labels l = read_labels<T>(x, row);
  RowStats<T> r;
  double result = 0;
  if (!l.keep || !l.valid) {
    result = l.keep ? std::nan("") : 0;
  } else {
    const Logits<T> z(x, row, buffer);
    const Sums sums = row_sums(x, z, r);
    if (x.ce != 0) {
      const double ce = x.dense ? dense_cross_entropy(x, row, z, r) : cross_entropy(l, z.s, r);
      result += x.ce * (x.smoothing == 0 ? ce : smoothed(x, ce, sum_of_logits(x, z, r), r.log_p));
    }
    if (x.kl != 0) result += x.kl * row_divergence(x, z, sums, r);
    if (x.decoupled()) result += decoupled_terms(x, z, l, r);
    if (x.standardize && x.soft() && x.stats) r.lose(along_logits(x, z, l, r), x.classes);
  }
  save_stats(x, row, r);
  return result;
}

template <typename T>
void forward(const SoftmaxKlForward& x, const Pool& pool) {
  Buffer<double> losses(x.rows + 1);
  double* row_loss = losses;
  parallel(pool, x.rows, kSmall / (x.classes + 1), [&](int64_t begin, int64_t end) {
    Buffer<T> buffer(4 * x.classes);
    for (int64_t row = begin; row < end; ++row) row_loss[row] = row_forward<T>(x, row, buffer);
  });
  int64_t count = 0;
  double sum = 0;
  for (int64_t row = 0; row < x.rows; ++row) {
    sum += row_loss[row];
    count += is_kept(x, row);
  }
  const double scale = x.reduction == Reduction::mean ? 1.0 / double(max<int64_t>(count, 1)) : 1;
  *static_cast<T*>(x.scale) = static_cast<T>(scale);
  T* loss = static_cast<T*>(x.loss);
  if (x.reduction == Reduction::none)
    for (int64_t row = 0; row < x.rows; ++row) loss[row] = static_cast<T>(row_loss[row]);
  else *loss = static_cast<T>(sum * scale);
}

// ---- backward ----

// Whether a class's gradient needs its logits once, so that it may be written over them
inline bool in_one_loop(const SoftmaxKl& x) { return x.plain() && !x.decoupled(); }

template <typename T>
void row_gradient(const SoftmaxKlBackward& x, int64_t row, const Labels& l, T* buffer, T* out) {
  const int64_t n = x.classes;
  const Logits<T> z(x, row, buffer);
  const RowStats<T> r = read_stats<T>(x, row);
  const double upstream = double(static_cast<const T*>(x.grad)[row * x.grad_stride]) * *static_cast<const T*>(x.scale);
  const bool ce = x.ce != 0 && (x.target || x.dense);
  const T* y = ce && x.dense ? dense_target(x, row, z.spare) : nullptr;
  double y_sum = y ? 0 : 1;
  for (int64_t k = 0; y && k < n; ++k) y_sum += y[k];
  Factors<T> f = gradient_factors(x, r, upstream, y_sum);
  if (in_one_loop(x)) {
    choose_near(r.class_log_ratio().near, [&](auto near) {
      choose_variant(ce, x.kl != 0, integer_temperature(x),
                     [&](auto variant) { gradient(variant, near, z, n, f, r, out); });
    });
  } else {
    soft_gradient(x, z, l, r, upstream, f, out);
    if (x.standardize) standard_gradient(z.s, n, f, out);
    if (ce) hard_gradient(z.s, n, f, out);
  }
  if (y) {
    const T label = f.label;
#pragma omp simd
    for (int64_t k = 0; k < n; ++k) out[k] -= label * y[k];
  } else if (ce) {
    out[l.a] -= f.label * static_cast<T>(l.weight_a);
    if (l.mixed) out[l.b] -= f.label * static_cast<T>(l.weight_b);
  }
}

template <typename T>
void row_backward(const SoftmaxKlBackward& x, int64_t row, T* buffer) {
  const int64_t n = x.classes;
  T* spare = buffer + 3 * n;
  const bool direct = in_one_loop(x) || x.out != x.student;
  T* out = direct ? destination<T>(x.student_type, x.out, row * n, spare) : spare;
  const Labels l = read_labels<T>(x, row);
  if (l.keep && l.valid) row_gradient(x, row, l, buffer, out);
  else
    for (int64_t k = 0; k < n; ++k) out[k] = l.keep ? static_cast<T>(NAN) : T(0);
  store<T>(x.student_type, x.out, row * n, n, out);
}

template <typename T>
void backward(const SoftmaxKlBackward& x, const Pool& pool) {
  parallel(pool, x.rows, kSmall / (x.classes + 1), [&](int64_t begin, int64_t end) {
    Buffer<T> buffer(4 * x.classes);
    for (int64_t row = begin; row < end; ++row) row_backward<T>(x, row, buffer);
  });
}

}  // namespace
}  // namespace KD_ISA

template <>
void compute<Isa::KD_ISA>(const SoftmaxKlForward& x, const Pool& pool) {
  x.fp64 ? KD_ISA::forward<double>(x, pool) : KD_ISA::forward<float>(x, pool);
}

template <>
void compute<Isa::KD_ISA>(const SoftmaxKlBackward& x, const Pool& pool) {
  x.fp64 ? KD_ISA::backward<double>(x, pool) : KD_ISA::backward<float>(x, pool);
}

}  // namespace kd
