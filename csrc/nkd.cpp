// nkd on the CPU, one row at a time. The softmax over all classes is had from that over the non-target ones:
// p[target] = 1 / (1 + e^a), a = max + log Z of the others - z[target], and p[k] = (1 - p[target]) * k's share of them.
#include "nkd.h"

#include "cpu.h"

namespace kd {
namespace KD_ISA {
namespace {

constexpr int64_t kSmall = 1 << 15;  // logits that are not worth a second thread

template <typename T>
struct Row {
  const T *s, *t;
  T* spare;
  int64_t n, target;
  Row(const Nkd& x, int64_t row, T* buffer)
      : s(load<T>(x.student_type, x.student, row * x.student_stride, x.classes, buffer)),
        t(load<T>(x.teacher_type, x.teacher, row * x.teacher_stride, x.classes, buffer + x.classes)),
        spare(buffer + 2 * x.classes),
        n(x.classes),
        target(x.target[row]) {}

  // The target's logit: NaN where it is infinite, which the softmax cannot take either
  double at_target(const T* z) const { return z[target] == HUGE_VALF ? std::nan("") : double(z[target]); }
};

struct NkdSums {
  double s = 0, t = 0, cross = 0;  // Z of q_s and q_t, and the sum of e_t times s relative to its maximum, over T
  double p = 0, u = 0;             // Z of both at temperature 1
};

template <bool ONE, typename T>
void add_classes(const Row<T>& z, int64_t from, int64_t to, T s_max, T t_max, T inverse_t, NkdSums& total) {
  const T *s = z.s, *t = z.t;
  for (int64_t begin = from; begin < to; begin += kChunk) {
    const int64_t end = min(to, begin + kChunk);
    T zs = 0, zt = 0, cross = 0, p = 0, u = 0;
#pragma omp simd reduction(+ : zs, zt, cross, p, u)
    for (int64_t k = begin; k < end; ++k) {
      const T ds = s[k] - s_max, dt = t[k] - t_max;
      const T x = ONE ? ds : ds * inverse_t, y = ONE ? dt : dt * inverse_t;
      const T es = fast_exp(x), et = fast_exp(y);
      zs += es;
      zt += et;
      cross += et == 0 ? T(0) : et * x;  // a class without teacher probability adds nothing
      if (!ONE) p += fast_exp(ds);
      if (!ONE) u += fast_exp(dt);
    }
    total.s += zs;
    total.t += zt;
    total.cross += cross;
    total.p += ONE ? zs : p;
    total.u += ONE ? zt : u;
  }
}

// The largest logit but the target's; 0 where no other class has any probability
template <typename T>
T largest_non_target(const T* z, const Row<T>& r) {
  const T top = max(largest(z, r.target), largest(z + r.target + 1, r.n - r.target - 1));
  return top == -HUGE_VALF ? T(0) : top;
}

inline double softplus(double a) { return (a > 0 ? a : 0) + std::log1p(std::exp(a > 0 ? -a : a)); }
inline double sigmoid(double a) { return a > 0 ? 1 / (1 + std::exp(-a)) : std::exp(a) / (1 + std::exp(a)); }

// weight * value, where a weight of 0 means 0 even beside an infinity, but not beside NaN
inline double weighted(double weight, double value) { return weight == 0 && value == value ? 0 : weight * value; }

template <typename T>
double row_forward(const NkdForward& x, int64_t row, T* buffer) {
  const Row<T> z(x, row, buffer);
  const T s_max = largest_non_target(z.s, z), t_max = largest_non_target(z.t, z), inverse_t = T(1 / x.temperature);
  NkdSums sums;
  const auto add = [&](int64_t from, int64_t to) {
    if (x.temperature == 1) add_classes<true>(z, from, to, s_max, t_max, inverse_t, sums);
    else add_classes<false>(z, from, to, s_max, t_max, inverse_t, sums);
  };
  add(0, z.target);
  add(z.target + 1, z.n);
  const double log_s = std::log(sums.s), log_t = std::log(sums.t), log_p = std::log(sums.p);
  // how much likelier the others are than the target, as a logarithm
  const double against_s = double(s_max) + log_p - z.at_target(z.s);
  const double against_t = double(t_max) + std::log(sums.u) - z.at_target(z.t);
  const double weight = sigmoid(-against_t);
  if (x.stats) {
    T* to = static_cast<T*>(x.stats) + row;
    const double stats[kNkdStats] = {double(s_max), log_s, log_p, double(t_max), log_t, weight};
    for (int64_t i = 0; i < kNkdStats; ++i) to[i * x.rows] = static_cast<T>(stats[i]);
  }
  const double cross_entropy = sums.t == 0 ? 0 : sums.s == 0 ? HUGE_VAL : log_s - sums.cross / sums.t;
  return weighted(weight, softplus(against_s)) + x.gamma * x.temperature * x.temperature * cross_entropy;
}

bool is_kept(const Nkd& x, int64_t row) { return x.target[row] != x.ignore_index; }
bool is_valid(const Nkd& x, int64_t row) { return x.target[row] >= 0 && x.target[row] < x.classes; }

template <typename T>
void forward(const NkdForward& x, const Pool& pool) {
  Buffer<double> losses(x.rows + 1);
  double* row_loss = losses;
  parallel(pool, x.rows, kSmall / (x.classes + 1), [&](int64_t begin, int64_t end) {
    Buffer<T> buffer(2 * x.classes);
    for (int64_t row = begin; row < end; ++row)
      row_loss[row] = !is_kept(x, row) ? 0 : is_valid(x, row) ? row_forward<T>(x, row, buffer) : std::nan("");
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

template <typename T>
struct Factors {
  T s_max, t_max, inverse_t;
  T q_s, q_t, p;  // of the exponentials: the student's and the teacher's at T, and the student's at 1 where T is not 1
};

template <bool ONE, typename T>
void gradient(const Row<T>& z, const Factors<T>& f, T* out) {
  const T *s = z.s, *t = z.t;
  const Factors<T> c = f;
#pragma omp simd
  for (int64_t k = 0; k < z.n; ++k) {
    const T ds = s[k] - c.s_max, dt = t[k] - c.t_max;
    T g = c.q_s * fast_exp(ONE ? ds : ds * c.inverse_t) - c.q_t * fast_exp(ONE ? dt : dt * c.inverse_t);
    if (!ONE) g += c.p * fast_exp(ds);
    out[k] = g;
  }
}

// 1 / Z, and 0 where there is nothing
inline double inverse_z(double log_z) { return log_z == -HUGE_VAL ? 0 : std::exp(-log_z); }

template <typename T>
void row_gradient(const NkdBackward& x, int64_t row, T* buffer, T* out) {
  const Row<T> z(x, row, buffer);
  const T* from = static_cast<const T*>(x.stats) + row;
  const double log_s = from[x.rows], log_p = from[2 * x.rows], log_t = from[4 * x.rows], weight = from[5 * x.rows];
  const double upstream = double(static_cast<const T*>(x.grad)[row * x.grad_stride]) * *static_cast<const T*>(x.scale);
  // where the teacher gives the others nothing, their term is 0 whatever the student
  const double soft = log_t == -HUGE_VAL ? 0 : upstream * x.gamma * x.temperature;
  const double miss = sigmoid(double(from[0]) + log_p - z.at_target(z.s));  // 1 - p[target]
  const double hard = upstream * weight * miss;
  Factors<T> f{from[0], from[3 * x.rows], T(1 / x.temperature), 0, 0, 0};
  f.q_t = static_cast<T>(soft * inverse_z(log_t));
  if (x.temperature == 1) {
    f.q_s = static_cast<T>((soft + hard) * inverse_z(log_s));
    gradient<true>(z, f, out);
  } else {
    f.q_s = static_cast<T>(soft * inverse_z(log_s));
    f.p = static_cast<T>(hard * inverse_z(log_p));
    gradient<false>(z, f, out);
  }
  out[z.target] = static_cast<T>(-hard);
}

template <typename T>
void backward(const NkdBackward& x, const Pool& pool) {
  const int64_t n = x.classes;
  parallel(pool, x.rows, kSmall / (n + 1), [&](int64_t begin, int64_t end) {
    Buffer<T> buffer(3 * n);
    for (int64_t row = begin; row < end; ++row) {
      T* out = destination<T>(x.student_type, x.out, row * n, buffer + 2 * n);
      if (is_kept(x, row) && is_valid(x, row)) row_gradient(x, row, static_cast<T*>(buffer), out);
      else
        for (int64_t k = 0; k < n; ++k) out[k] = is_kept(x, row) ? static_cast<T>(NAN) : T(0);
      store<T>(x.student_type, x.out, row * n, n, out);
    }
  });
}

}  // namespace
}  // namespace KD_ISA

template <>
void compute<Isa::KD_ISA>(const NkdForward& x, const Pool& pool) {
  x.fp64 ? KD_ISA::forward<double>(x, pool) : KD_ISA::forward<float>(x, pool);
}

template <>
void compute<Isa::KD_ISA>(const NkdBackward& x, const Pool& pool) {
  x.fp64 ? KD_ISA::backward<double>(x, pool) : KD_ISA::backward<float>(x, pool);
}

}  // namespace kd
