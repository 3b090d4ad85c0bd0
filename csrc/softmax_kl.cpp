// softmax_kl on the CPU. One row at a time: a pass for the maxima, then one for everything else, with exp(z) made
// from exp(z / T) by multiplication where T is a small integer. The row is in the cache for the second pass.
#include "softmax_kl.h"

#include "cpu.h"

namespace kd {
namespace KD_ISA {
namespace {

constexpr int64_t kSmall = 1 << 15;  // logits that are not worth a second thread

struct Labels {
  int64_t a = -1, b = -1;
  double weight_a = 1, weight_b = 0;
  bool keep = true, valid = true, mixed = false;
};

template <typename T>
Labels read_labels(const SoftmaxKl& x, int64_t row) {
  Labels l;
  l.a = x.target[row];
  l.mixed = x.mixed != nullptr;
  l.b = l.mixed ? x.mixed[row] : l.a;
  l.keep = l.a != x.ignore_index && l.b != x.ignore_index;
  l.valid = l.a >= 0 && l.a < x.classes && l.b >= 0 && l.b < x.classes;
  if (x.lam) {
    l.weight_a = read<T>(x.lam_type, x.lam, row * x.lam_stride);
    l.weight_b = 1 - l.weight_a;
  }
  return l;
}

inline double weighted(double weight, double value) { return weight == 0 ? 0 : weight * value; }

// x^n for the n that the kernels are compiled for; 0 means: not an integer, take another exponential
template <int N, typename T>
inline T power(T x) {
  if (N == 2) return x * x;
  if (N == 3) return x * x * x;
  if (N == 4) return (x * x) * (x * x);
  return x;
}

inline int integer_temperature(double t) { return t == 1 || t == 2 || t == 3 || t == 4 ? static_cast<int>(t) : 0; }

struct Sums {
  double p = 0, s = 0, t = 0;      // Z of p, q_s, q_t
  double cross = 0, gap = 0;  // with d = (z_t - z_s) / T: sum of e_t d, and of e_t (d + expm1(-d))
};

template <typename T, int N, bool CE, bool KL>
Sums sums(const T* s, const T* t, int64_t n, T s_max, T t_max, T inverse_t) {
  Sums total;
  for (int64_t begin = 0; begin < n; begin += kChunk) {
    const int64_t end = min(n, begin + kChunk);
    T p = 0, zs = 0, zt = 0, cross = 0, gap = 0;
#pragma omp simd reduction(+ : p, zs, zt, cross, gap)
    for (int64_t k = begin; k < end; ++k) {
      const T d = s[k] - s_max;
      if (KL) {
        const T x = d * inverse_t, y = (t[k] - t_max) * inverse_t;
        const T es = fast_exp(x), et = fast_exp(y);
        zs += es;
        zt += et;
        cross += et == 0 ? T(0) : et * (y - x);  // a class without teacher probability adds nothing
        gap += divergence_term(y - x, es, et);
        if (CE && N) p += power<N>(es);
      }
      if (CE && !(KL && N)) p += fast_exp(d);
    }
    total.p += p;
    total.s += zs;
    total.t += zt;
    total.cross += cross;
    total.gap += gap;
  }
  return total;
}

template <typename T, bool CE, bool KL>
Sums sums_at(int n, const T* s, const T* t, int64_t classes, T s_max, T t_max, T inverse_t) {
  switch (CE && KL ? n : 0) {
    case 1: return sums<T, 1, CE, KL>(s, t, classes, s_max, t_max, inverse_t);
    case 2: return sums<T, 2, CE, KL>(s, t, classes, s_max, t_max, inverse_t);
    case 3: return sums<T, 3, CE, KL>(s, t, classes, s_max, t_max, inverse_t);
    case 4: return sums<T, 4, CE, KL>(s, t, classes, s_max, t_max, inverse_t);
    default: return sums<T, 0, CE, KL>(s, t, classes, s_max, t_max, inverse_t);
  }
}

// KL = m + log(Z_s / Z_t), m = cross / Z_t, and Z_s / Z_t = 1 + gap / Z_t - m: where the networks are close, that second
// form keeps the digits that the logarithm of a quotient near 1 has lost.
inline double divergence(const Sums& z) {
  const double m = z.cross / z.t, gap = z.gap / z.t;
  if (m < 0.5 && m > -0.5 && gap < 0.5) return m + std::log1p(gap - m);
  return m + std::log(z.s / z.t);
}

// z / T - max of a row, with the labelled classes at -inf: what the other classes' softmax is made of
template <typename T>
T rest_of(const T* z, int64_t n, T max, T inverse_t, const Labels& l, T* out) {
#pragma omp simd
  for (int64_t k = 0; k < n; ++k) out[k] = (z[k] - max) * inverse_t;
  out[l.a] = out[l.b] = -HUGE_VALF;
  const T top = largest(out, n);
  return top == -HUGE_VALF ? T(0) : top;
}

// log of the other classes' probability: log1p of the labelled mass where that is small, else their log-sum
inline double log_rest(double mass, double rest_max, double rest_z, double log_z) {
  return mass < 0.5 ? std::log1p(-mass) : rest_max + std::log(rest_z) - log_z;
}

template <typename T>
double row_forward(const SoftmaxKlForward& x, int64_t row, T* buffer) {
  const int64_t n = x.classes;
  const T* s = load<T>(x.student_type, x.student, row * x.student_stride, n, buffer);
  const T* t = load<T>(x.teacher_type, x.teacher, row * x.teacher_stride, n, buffer + n);
  const T inverse_t = static_cast<T>(1 / x.temperature);
  const bool ce = x.ce != 0, soft = x.soft();
  T s_max = largest(s, n), t_max = soft ? largest(t, n) : T(0);
  const int power = integer_temperature(x.temperature);
  const Sums z = ce && soft ? sums_at<T, true, true>(power, s, t, n, s_max, t_max, inverse_t)
                 : soft     ? sums_at<T, false, true>(0, s, t, n, s_max, t_max, inverse_t)
                            : sums_at<T, true, false>(0, s, t, n, s_max, t_max, inverse_t);
  const double log_p = ce ? std::log(z.p) : 0, log_s = soft ? std::log(z.s) : 0, log_t = soft ? std::log(z.t) : 0;
  Labels l;
  if (x.target) {
    l = read_labels<T>(x, row);
    if (!l.keep || !l.valid) {  // nothing may be read at such a label
      if (x.stats)
        for (int64_t i = 0; i < x.stats_count(); ++i) static_cast<T*>(x.stats)[i * x.rows + row] = 0;
      return l.keep ? std::nan("") : 0;
    }
  }
  double result = 0;
  if (ce && x.dense) {
    const T* y = load<T>(x.dense_type, x.dense, row * x.dense_stride, n, buffer + 2 * n);
    double sum = 0;
    for (int64_t begin = 0; begin < n; begin += kChunk) {
      T part = 0;
#pragma omp simd reduction(+ : part)
      for (int64_t k = begin; k < min(n, begin + kChunk); ++k)
        part += y[k] == 0 ? T(0) : y[k] * (s[k] - s_max - static_cast<T>(log_p));
      sum += part;
    }
    result -= x.ce * sum;
  } else if (ce && x.target) {
    double sum = weighted(l.weight_a, double(s[l.a] - s_max) - log_p);
    if (l.mixed) sum += weighted(l.weight_b, double(s[l.b] - s_max) - log_p);
    result -= x.ce * sum;
  }
  if (x.kl != 0) result += x.kl * divergence(z);

  T rest_s_max = 0, rest_t_max = 0;
  Sums rest;
  if (x.decoupled()) {
    T *rs = buffer + 2 * n, *rt = buffer + 3 * n;
    // log Z is NaN if anything in the row is, or infinite: it must not hide behind the other classes
    rest_s_max = rest_of(s, n, s_max, inverse_t, l, rs) + static_cast<T>(log_s * 0);
    rest_t_max = rest_of(t, n, t_max, inverse_t, l, rt) + static_cast<T>(log_t * 0);
    result += (log_s + log_t) * 0;
    rest = sums<T, 0, false, true>(rs, rt, n, rest_s_max, rest_t_max, T(1));
    if (x.non_target_kl != 0 && rest.t != 0) result += x.non_target_kl * (rest.s == 0 ? rest.cross : divergence(rest));
    if (x.target_kl != 0) {
      double mass_s = 0, mass_t = 0, target_kl = 0;
      for (int i = 0; i < (l.a == l.b ? 1 : 2); ++i) {
        const int64_t k = i ? l.b : l.a;
        const double log_qs = double(s[k] - s_max) / x.temperature - log_s;
        const double log_qt = double(t[k] - t_max) / x.temperature - log_t;
        mass_s += std::exp(log_qs);
        mass_t += std::exp(log_qt);
        target_kl += weighted(std::exp(log_qt), log_qt - log_qs);
      }
      const double log_ss = log_rest(mass_s, rest_s_max, rest.s, log_s);
      const double log_st = log_rest(mass_t, rest_t_max, rest.t, log_t);
      result += x.target_kl * (target_kl + weighted(std::exp(log_st), log_st - log_ss));
    }
  }
  if (x.stats) {
    T* stats = static_cast<T*>(x.stats) + row;
    const double values[9] = {double(s_max),      double(t_max),      log_p,           log_s,           log_t,
                              double(rest_s_max), double(rest_t_max), std::log(rest.s), std::log(rest.t)};
    for (int64_t i = 0; i < x.stats_count(); ++i) stats[i * x.rows] = static_cast<T>(values[i]);
  }
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
    count += !x.target || (x.target[row] != x.ignore_index &&
                           (!x.mixed || x.mixed[row] != x.ignore_index));
  }
  const double scale = x.reduction == Reduction::mean ? 1.0 / double(max<int64_t>(count, 1)) : 1;
  *static_cast<T*>(x.scale) = static_cast<T>(scale);
  T* loss = static_cast<T*>(x.loss);
  if (x.reduction != Reduction::none) *loss = static_cast<T>(sum * scale);
  else
    for (int64_t row = 0; row < x.rows; ++row) loss[row] = static_cast<T>(row_loss[row]);
}

// What a row's gradient is made of: g = c_soft (e_s - ratio e_t) + c_hard e_p
template <typename T>
struct Factors {
  T s_max, t_max, inverse_t, soft, ratio, hard;
};

// The ratio is exactly 1, and so the gradient 0, where both networks agree, whether or not the compiler fuses the product.
template <typename T, int N, bool CE, bool KL>
void gradient(const T* s, const T* t, int64_t n, const Factors<T>& f, T* out) {
  const Factors<T> c = f;
#pragma omp simd
  for (int64_t k = 0; k < n; ++k) {
    const T d = s[k] - c.s_max;
    T g = 0;
    if (KL) {
      const T es = fast_exp(d * c.inverse_t), et = fast_exp((t[k] - c.t_max) * c.inverse_t);
      g = c.soft * (es - c.ratio * et);
      if (CE && N) g += c.hard * power<N>(es);
    }
    if (CE && !(KL && N)) g += c.hard * fast_exp(d);
    out[k] = g;
  }
}

template <typename T, bool CE, bool KL>
void gradient_at(int n, const T* s, const T* t, int64_t classes, const Factors<T>& f, T* out) {
  switch (CE && KL ? n : 0) {
    case 1: return gradient<T, 1, CE, KL>(s, t, classes, f, out);
    case 2: return gradient<T, 2, CE, KL>(s, t, classes, f, out);
    case 3: return gradient<T, 3, CE, KL>(s, t, classes, f, out);
    case 4: return gradient<T, 4, CE, KL>(s, t, classes, f, out);
    default: return gradient<T, 0, CE, KL>(s, t, classes, f, out);
  }
}

// Adds the decoupled terms. At the labelled classes the loop's numbers mean nothing and are replaced.
template <typename T>
void rest_gradient(const SoftmaxKlBackward& x, int64_t row, const T* s, const T* t, const Factors<T>& f, double factor,
                   const Labels& l, T* out) {
  const T* stats = static_cast<const T*>(x.stats) + row;
  const int64_t n = x.classes;
  const double log_s = stats[3 * x.rows], log_t = stats[4 * x.rows];
  const T max_s = stats[5 * x.rows], max_t = stats[6 * x.rows];
  const double z_s = stats[7 * x.rows], z_t = stats[8 * x.rows];
  double qs[2] = {0, 0}, qt[2] = {0, 0};
  T before[2];
  const int64_t index[2] = {l.a, l.b};
  for (int i = 0; i < 2; ++i) {
    before[i] = out[index[i]];
    qs[i] = std::exp(double(s[index[i]] - f.s_max) / x.temperature - log_s);
    qt[i] = std::exp(double(t[index[i]] - f.t_max) / x.temperature - log_t);
  }
  const double mass_s = qs[0] + (l.a == l.b ? 0 : qs[1]), mass_t = qt[0] + (l.a == l.b ? 0 : qt[1]);
  // S_s - S_t from whichever side has the smaller numbers
  const double difference = mass_s < 0.5
                                ? mass_t - mass_s
                                : std::exp(double(max_s) + z_s - log_s) - std::exp(double(max_t) + z_t - log_t);
  const double scale = factor / x.temperature;
  const bool none_s = z_s == -HUGE_VAL, none_t = z_t == -HUGE_VAL;
  const T c_s = none_s ? T(0) : T(scale * (x.target_kl * difference + x.non_target_kl) * std::exp(-z_s));
  const T c_t = none_t ? T(0) : T(scale * x.non_target_kl * std::exp(-z_t));
  const T inverse_t = f.inverse_t, s_top = f.s_max, t_top = f.t_max;
#pragma omp simd
  for (int64_t k = 0; k < n; ++k)
    out[k] += c_s * fast_exp((s[k] - s_top) * inverse_t - max_s) - c_t * fast_exp((t[k] - t_top) * inverse_t - max_t);
  for (int i = 0; i < 2; ++i)
    out[index[i]] = static_cast<T>(before[i] + scale * x.target_kl * (qs[i] - qt[i]));
}

template <typename T>
void row_backward(const SoftmaxKlBackward& x, int64_t row, T* buffer) {
  const int64_t n = x.classes;
  T* out = destination<T>(x.student_type, x.out, row * n, buffer + 3 * n);
  Labels l;
  if (x.target) l = read_labels<T>(x, row);
  if (!l.keep || !l.valid) {
    for (int64_t k = 0; k < n; ++k) out[k] = l.keep ? static_cast<T>(NAN) : T(0);
    store<T>(x.student_type, x.out, row * n, n, out);
    return;
  }
  const T* s = load<T>(x.student_type, x.student, row * x.student_stride, n, buffer);
  const T* t = load<T>(x.teacher_type, x.teacher, row * x.teacher_stride, n, buffer + n);
  const T* stats = static_cast<const T*>(x.stats) + row;
  const double factor = double(static_cast<const T*>(x.grad)[row * x.grad_stride]) * *static_cast<const T*>(x.scale);
  const bool ce = x.ce != 0 && (x.target || x.dense), soft = x.kl != 0;
  const double log_p = stats[2 * x.rows], log_s = stats[3 * x.rows], log_t = stats[4 * x.rows];
  Factors<T> f;
  f.s_max = stats[0];
  f.t_max = stats[x.rows];
  f.inverse_t = static_cast<T>(1 / x.temperature);
  f.soft = static_cast<T>(x.kl / x.temperature * factor * std::exp(-log_s));
  f.ratio = static_cast<T>(std::exp(log_s - log_t));
  const T* y = nullptr;
  double y_sum = 1;
  if (ce && x.dense) {
    y = load<T>(x.dense_type, x.dense, row * x.dense_stride, n, buffer + 2 * n);
    y_sum = 0;
    for (int64_t k = 0; k < n; ++k) y_sum += y[k];
  }
  f.hard = static_cast<T>(x.ce * factor * y_sum * std::exp(-log_p));
  const int power = integer_temperature(x.temperature);
  if (ce && soft) gradient_at<T, true, true>(power, s, t, n, f, out);
  else if (soft) gradient_at<T, false, true>(0, s, t, n, f, out);
  else if (ce) gradient_at<T, true, false>(0, s, t, n, f, out);
  else
    for (int64_t k = 0; k < n; ++k) out[k] = 0;
  const double hard = x.ce * factor;
  if (y) {
#pragma omp simd
    for (int64_t k = 0; k < n; ++k) out[k] -= static_cast<T>(hard) * y[k];
  } else if (ce) {
    out[l.a] -= static_cast<T>(hard * l.weight_a);
    if (l.mixed) out[l.b] -= static_cast<T>(hard * l.weight_b);
  }
  if (x.decoupled()) rest_gradient(x, row, s, t, f, factor, l, out);
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
