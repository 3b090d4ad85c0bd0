// softmax_kl on the CPU. One row at a time: a pass for the maxima, then one for everything else, with exp(z) made
// from exp(z / T) by multiplication where T is a small integer. The row is in the cache for the second pass.
#include "softmax_kl.h"

#include "cpu.h"
#include "softmax_kl_row.h"

namespace kd {
namespace KD_ISA {
namespace {

constexpr int64_t kSmall = 1 << 15;  // logits that are not worth a second thread

// What a loop over classes is compiled for: with p, with q, and p's exponential as a power of q's
template <bool CE, bool KL, int POWER>
struct Variant {
  static constexpr bool ce = CE, kl = KL;
  static constexpr int power = POWER;
};

template <typename F>
inline void choose_variant(bool ce, bool kl, double temperature, const F& f) {
  if (!ce) return kl ? f(Variant<false, true, 0>()) : f(Variant<false, false, 0>());
  if (!kl) return f(Variant<true, false, 0>());
  switch (integer_temperature(temperature)) {
    case 1: return f(Variant<true, true, 1>());
    case 2: return f(Variant<true, true, 2>());
    case 3: return f(Variant<true, true, 3>());
    case 4: return f(Variant<true, true, 4>());
    default: return f(Variant<true, true, 0>());
  }
}

// A row of each network's logits, converted where need be. Of the buffer's four rows two are left for the caller.
template <typename T>
struct Logits {
  const T *s, *t;
  T* spare;
  Logits(const SoftmaxKl& x, int64_t row, T* buffer)
      : s(load<T>(x.student_type, x.student, row * x.student_stride, x.classes, buffer)),
        t(load<T>(x.teacher_type, x.teacher, row * x.teacher_stride, x.classes, buffer + x.classes)),
        spare(buffer + 2 * x.classes) {}
};

template <typename T>
const T* dense_target(const SoftmaxKl& x, int64_t row, T* buffer) {
  return load<T>(x.dense_type, x.dense, row * x.dense_stride, x.classes, buffer);
}

// ---- forward ----

template <typename T, typename V>
Sums sum_classes(V, const T* s, const T* t, int64_t n, T s_max, T t_max, T inverse_t) {
  Sums total;
  for (int64_t begin = 0; begin < n; begin += kChunk) {
    const int64_t end = min(n, begin + kChunk);
    T p = 0, zs = 0, zt = 0, cross = 0, gap = 0;
#pragma omp simd reduction(+ : p, zs, zt, cross, gap)
    for (int64_t k = begin; k < end; ++k) {
      const T d = s[k] - s_max;
      if (V::kl) {
        const T x = d * inverse_t, y = (t[k] - t_max) * inverse_t;
        const T es = fast_exp(x), et = fast_exp(y);
        zs += es;
        zt += et;
        cross += et == 0 ? T(0) : et * (y - x);  // a class without teacher probability adds nothing
        gap += divergence_term(y - x, es, et);
        if (V::ce && V::power) p += power(es, V::power);
      }
      if (V::ce && !(V::kl && V::power)) p += fast_exp(d);
    }
    total.p += p;
    total.s += zs;
    total.t += zt;
    total.cross += cross;
    total.gap += gap;
  }
  return total;
}

// The first pass and the second: maxima, sums, and their logarithms into `r`.
template <typename T>
Sums row_sums(const SoftmaxKl& x, const Logits<T>& z, RowStats<T>& r) {
  const bool ce = x.ce != 0, soft = x.soft();
  r.s.max = largest(z.s, x.classes);
  if (soft) r.t.max = largest(z.t, x.classes);
  Sums sums;
  choose_variant(ce, soft, x.temperature, [&](auto variant) {
    sums = sum_classes(variant, z.s, z.t, x.classes, r.s.max, r.t.max, static_cast<T>(1 / x.temperature));
  });
  if (ce) r.log_p = std::log(sums.p);
  if (soft) {
    r.s.log_z = std::log(sums.s);
    r.t.log_z = std::log(sums.t);
  }
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

// z / T - max of a row, with the labelled classes at -inf, and what the non-target softmax counts from
template <typename T>
T non_target_logits(const T* z, int64_t n, const Softmax<T>& q, T inverse_t, const Labels& l, T* out) {
  const T max = q.max;
#pragma omp simd
  for (int64_t k = 0; k < n; ++k) out[k] = (z[k] - max) * inverse_t;
  out[l.a] = out[l.b] = -HUGE_VALF;
  const T top = largest(out, n);
  // log Z is NaN if anything in the row is, or infinite: it must not hide behind the non-target classes
  return (top == -HUGE_VALF ? T(0) : top) + static_cast<T>(q.log_z * 0);
}

// The decoupled terms, and the non-target part of `r`.
template <typename T>
double decoupled_terms(const SoftmaxKl& x, const Logits<T>& z, const Labels& l, RowStats<T>& r) {
  const int64_t n = x.classes;
  const T inverse_t = static_cast<T>(1 / x.temperature);
  T *s = z.spare, *t = z.spare + n;
  r.s.non_target_max = non_target_logits(z.s, n, r.s, inverse_t, l, s);
  r.t.non_target_max = non_target_logits(z.t, n, r.t, inverse_t, l, t);
  const Sums sums = sum_classes(Variant<false, true, 0>(), s, t, n, r.s.non_target_max, r.t.non_target_max, T(1));
  r.s.non_target_log_z = std::log(sums.s);
  r.t.non_target_log_z = std::log(sums.t);
  double result = (r.s.log_z + r.t.log_z) * 0;  // NaN and infinity show here too
  if (x.non_target_kl != 0) result += x.non_target_kl * non_target_divergence(sums);
  if (x.target_kl != 0) result += x.target_kl * target_divergence(l, z.s, z.t, r, x.temperature);
  return result;
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
    if (x.kl != 0) result += x.kl * divergence(sums);
    if (x.decoupled()) result += decoupled_terms(x, z, l, r);
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

template <typename T, typename V>
void gradient(V, const Logits<T>& z, int64_t n, const Factors<T>& f, T* out) {
  const T *s = z.s, *t = z.t;
  const Factors<T> c = f;
#pragma omp simd
  for (int64_t k = 0; k < n; ++k) {
    const T d = s[k] - c.s_max;
    T g = 0;
    if (V::kl) {
      const T es = fast_exp(d * c.inverse_t), et = fast_exp((t[k] - c.t_max) * c.inverse_t);
      g = c.soft * (es - c.ratio * et);
      if (V::ce && V::power) g += c.hard * power(es, V::power);
    }
    if (V::ce && !(V::kl && V::power)) g += c.hard * fast_exp(d);
    if (V::ce) g -= c.uniform;
    out[k] = g;
  }
}

// Adds the decoupled terms. At the labelled classes the loop's numbers mean nothing and are replaced.
template <typename T>
void decoupled_gradient(const Logits<T>& z, const Labels& l, int64_t n, const Factors<T>& f, T* out) {
  const Factors<T> c = f;
  const T *s = z.s, *t = z.t, before_a = out[l.a], before_b = out[l.b];
#pragma omp simd
  for (int64_t k = 0; k < n; ++k)
    out[k] += c.non_target_s * fast_exp((s[k] - c.s_max) * c.inverse_t - c.non_target_s_max) -
              c.non_target_t * fast_exp((t[k] - c.t_max) * c.inverse_t - c.non_target_t_max);
  out[l.a] = static_cast<T>(before_a + c.target_a);
  if (l.two()) out[l.b] = static_cast<T>(before_b + c.target_b);
}

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
  if (x.decoupled()) add_decoupled(x, l, z.s, z.t, r, upstream, f);
  choose_variant(ce, x.kl != 0, x.temperature, [&](auto variant) { gradient(variant, z, n, f, out); });
  if (y) {
    const T label = f.label;
#pragma omp simd
    for (int64_t k = 0; k < n; ++k) out[k] -= label * y[k];
  } else if (ce) {
    out[l.a] -= f.label * static_cast<T>(l.weight_a);
    if (l.mixed) out[l.b] -= f.label * static_cast<T>(l.weight_b);
  }
  if (x.decoupled()) decoupled_gradient(z, l, n, f, out);
}

template <typename T>
void row_backward(const SoftmaxKlBackward& x, int64_t row, T* buffer) {
  const int64_t n = x.classes;
  T* out = destination<T>(x.student_type, x.out, row * n, buffer + 3 * n);
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
