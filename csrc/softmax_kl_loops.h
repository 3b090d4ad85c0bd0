// The loops of softmax_kl over a row's classes on the CPU, which the compiler vectorises.
#pragma once

#include "cpu.h"
#include "divergences.h"
#include "softmax_kl_gradient.h"

namespace kd {
namespace KD_ISA {
namespace {

// What a loop over classes is compiled for: with p, with q, and p's exponential as a power of q's
template <bool CE, bool KL, int POWER>
struct Variant {
  static constexpr bool ce = CE, kl = KL;
  static constexpr int power = POWER;
};

template <typename F>
inline void choose_variant(bool ce, bool kl, int power, const F& f) {
  if (!ce) return kl ? f(Variant<false, true, 0>()) : f(Variant<false, false, 0>());
  if (!kl) return f(Variant<true, false, 0>());
  switch (power) {
    case 1: return f(Variant<true, true, 1>());
    case 2: return f(Variant<true, true, 2>());
    case 3: return f(Variant<true, true, 3>());
    case 4: return f(Variant<true, true, 4>());
    default: return f(Variant<true, true, 0>());
  }
}

// f of whether the networks' logits are near, as a type
template <typename F>
inline void choose_near(bool near, const F& f) {
  if (near) f(std::true_type());
  else f(std::false_type());
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

// ---- forward ----

// Logits are counted from the maxima in `apart`, whose constant is 0.
template <typename T, typename V, typename Near>
Sums sum_classes(V, Near, const T* s, const T* t, int64_t n, const LogRatio<T>& apart) {
  const LogRatio<T> log_ratio = apart;
  const T s_max = apart.s_max, t_max = apart.t_max, inverse_s = apart.inverse_s, inverse_t = apart.inverse_t;
  Sums total;
  for (int64_t begin = 0; begin < n; begin += kChunk) {
    const int64_t end = min(n, begin + kChunk);
    T p = 0, zs = 0, zt = 0, cross = 0, gap = 0;
#pragma omp simd reduction(+ : p, zs, zt, cross, gap)
    for (int64_t k = begin; k < end; ++k) {
      const T d = s[k] - s_max;
      if (V::kl) {
        const T es = fast_exp(d * inverse_s), et = fast_exp((t[k] - t_max) * inverse_t);
        const T x = log_ratio.template of<Near::value>(s[k], t[k]);
        zs += es;
        zt += et;
        cross += et == 0 ? T(0) : et * x;  // a class without teacher probability adds nothing
        gap += divergence_term(x, es, et);
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

template <typename T>
Spread spread(const T* z, int64_t n, T max) {
  double sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t k = 0; k < n; ++k) sum += double(z[k] - max);
  const double mean = sum / double(n);
#pragma omp simd reduction(+ : squares)
  for (int64_t k = 0; k < n; ++k) squares += (double(z[k] - max) - mean) * (double(z[k] - max) - mean);
  return {mean, squares, n};
}

// The divergence, and the mean of its slopes into `r`, which has all else
template <typename T, typename D, typename Near>
double sum_parts(D, Near, const Logits<T>& z, int64_t n, const Shares<T>& shares, RowStats<T>& r) {
  const T *s = z.s, *t = z.t;
  const LogRatio<T> log_ratio = r.class_log_ratio();
  const T s_max = r.s.max, t_max = r.t.max, inverse_s = static_cast<T>(r.s.inverse_t),
          inverse_t = static_cast<T>(r.t.inverse_t), of_s = static_cast<T>(std::exp(-r.s.log_z)),
          of_t = static_cast<T>(std::exp(-r.t.log_z));
  double value = 0, slope = 0;
  for (int64_t begin = 0; begin < n; begin += kChunk) {
    const int64_t end = min(n, begin + kChunk);
    T values = 0, slopes = 0;
#pragma omp simd reduction(+ : values, slopes)
    for (int64_t k = begin; k < end; ++k) {
      const T q = fast_exp((s[k] - s_max) * inverse_s) * of_s, p = fast_exp((t[k] - t_max) * inverse_t) * of_t;
      const Part<T> x = part<D::value>(log_ratio.template of<Near::value>(s[k], t[k]), p, q, shares);
      values += x.value;
      slopes += of_student(q, x.slope);
    }
    value += values;
    slope += slopes;
  }
  r.slope = static_cast<T>(slope);
  return value;
}

// ---- backward; out may be the student's logits ----

template <typename T, typename V, typename Near>
void gradient(V, Near, const Logits<T>& z, int64_t n, const Factors<T>& f, const RowStats<T>& r, T* out) {
  const T *s = z.s, *t = z.t;
  const Factors<T> c = f;
  const LogRatio<T> log_ratio = r.class_log_ratio();
#pragma omp simd
  for (int64_t k = 0; k < n; ++k) {
    T g = 0;
    if (V::kl) {
      const Parted<T> q = parted(c.student(s[k]), c.teacher(t[k]), log_ratio.template of<Near::value>(s[k], t[k]));
      g = c.soft * q.difference;
      if (V::ce && V::power) g += c.hard * power(q.student, V::power);
    }
    if (V::ce && !(V::kl && V::power)) g += c.hard * fast_exp(s[k] - c.s_max);
    if (V::ce) g -= c.uniform;
    out[k] = g;
  }
}

template <typename T, typename D, typename Near>
void slope_gradient(D, Near, const Logits<T>& z, int64_t n, const Factors<T>& f, const Shares<T>& shares,
                    const RowStats<T>& r, T* out) {
  const T *s = z.s, *t = z.t;
  const T s_max = f.s_max, inverse_s = f.inverse_s, soft = f.soft, mean = r.slope;
  const LogRatio<T> log_ratio = r.class_log_ratio();
#pragma omp simd
  for (int64_t k = 0; k < n; ++k) {
    const T h = slope<D::value>(log_ratio.template of<Near::value>(s[k], t[k]), shares);
    out[k] = of_student(soft * fast_exp((s[k] - s_max) * inverse_s), h - mean);
  }
}

// ---- backward; out is not the student's logits ----

// Adds the decoupled terms. At the labelled classes the loop's numbers mean nothing and are replaced.
template <typename T, typename Near>
void decoupled_gradient(Near, const Logits<T>& z, const Labels& l, int64_t n, const Factors<T>& f, const RowStats<T>& r,
                        T* out) {
  const Factors<T> c = f;
  const LogRatio<T> log_ratio = non_target_class_log_ratio(r, f);
  const T *s = z.s, *t = z.t, before_a = out[l.a], before_b = out[l.b];
#pragma omp simd
  for (int64_t k = 0; k < n; ++k) {
    const Parted<T> q =
        parted(c.non_target_student(s[k]), c.non_target_teacher(t[k]), log_ratio.template of<Near::value>(s[k], t[k]));
    out[k] += c.non_target * q.difference + c.non_target_mass * q.student;
  }
  out[l.a] = static_cast<T>(before_a + c.target_a);
  if (l.two()) out[l.b] = static_cast<T>(before_b + c.target_b);
}

// From the gradient by standardised logits
template <typename T>
void standard_gradient(const T* s, int64_t n, const Factors<T>& f, T* out) {
  const Factors<T> c = f;
#pragma omp simd
  for (int64_t k = 0; k < n; ++k) out[k] = c.through_standard(out[k], s[k] - c.s_max);
}

// Adds CE, but for its labels
template <typename T>
void hard_gradient(const T* s, int64_t n, const Factors<T>& f, T* out) {
  const T max = f.s_max, hard = f.hard, uniform = f.uniform;
#pragma omp simd
  for (int64_t k = 0; k < n; ++k) out[k] += hard * fast_exp(s[k] - max) - uniform;
}

}  // namespace
}  // namespace KD_ISA
}  // namespace kd
