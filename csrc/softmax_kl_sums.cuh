// What softmax_kl sums over a row in one sweep on CUDA, without knowing the row's maxima beforehand.
//
// Each thread counts exponents from logits of its own: the maxima of what it had seen when a power of two last grew
// past kSlack. At the end all are made to count from the row's maxima. With d = log(e_t / e_s) of a class, whose sums
// keep their digits where the networks are close, counting from elsewhere replaces d by d + c in every class, and
//
//   f(d) = d + exp(-d) - 1:   f(d + c) = exp(-c) f(d) - d (exp(-c) - 1) + f(c)
//
// where nothing cancels either: no thread's maxima are further from each other than the networks are.
#pragma once

#include "softmax_kl_row.cuh"

namespace kd {
namespace cuda {
namespace {

constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;
constexpr float kSlack = 32;                  // 2^32 in a sum of fp32 overflows nowhere and costs no digits
constexpr double kFar = 16384, kMost = 1e30;  // 2^-kFar is 0 in every format, kMost times 0 too

// Exponentials as powers of two: e^(z / T) = 2^(z s), or z t for the teacher, and e^z = 2^(z one), or e^(z / T) to the
// power n
template <typename T>
struct Exponent {
  T s, t, one = T(kLog2E), largest_s, largest_t;
  int n;
  bool ce, soft;

  __device__ Exponent(const SoftmaxKl& x, const RowStats<T>& r)
      : s(static_cast<T>(r.s.inverse_t * kLog2E)),
        t(static_cast<T>(r.t.inverse_t * kLog2E)),
        largest_s(fmax(s, one)),
        largest_t(fmax(t, one)),
        n(x.soft() ? integer_temperature(x) : 0),
        ce(x.ce != 0),
        soft(x.soft()) {}
};

// e_t (d + exp(-d) - 1), given e_s = e_t exp(-d)
__device__ inline float gap_term(float d, float es, float et) {
  float series = -1.996183e-4f;  // the Taylor series, its next two powers spread over these within 1e-8
  series = series * d + 1.3981895e-3f;
  series = series * d - 8.3331826e-3f;
  series = series * d + 4.16657948e-2f;
  series = series * d - 1.666666713e-1f;
  series = series * d + 0.5f;
  return fabsf(d) < 0.5f ? et * (d * d) * series : et * (d - 1) + es;
}
__device__ inline double gap_term(double d, double es, double et) { return divergence_term(d, es, et); }

// exp(x) - 1 of x <= 0, and -1 of NaN
__device__ inline float minus_1_of(float x) {
  float series = 1.996183e-4f;  // as above
  series = series * x + 1.3981895e-3f;
  series = series * x + 8.3331826e-3f;
  series = series * x + 4.16657948e-2f;
  series = series * x + 1.666666713e-1f;
  series = series * x + 0.5f;
  x = x > -87.0f ? x : -87.0f;
  return x > -0.5f ? x * x * series + x : exp2_of(x * float(kLog2E)) - 1;
}
__device__ inline double minus_1_of(double x) { return unit_expm1(x); }

// parted() by powers of two
template <typename T>
__device__ Parted<T> parted_by_2(T log_s, T log_t, T d) {
  const T larger = exp2_of(fmax(log_s, log_t) * T(kLog2E)), lost = larger * minus_1_of(-fabs(d));
  return {d > 0 ? lost : -lost, d > 0 ? larger + lost : larger};
}

// Sums over a part of a row's classes.
template <typename T>
struct Running {
  T s_max = -infinity<T>(), t_max = -infinity<T>();  // of these classes
  T s_from = kLowest, t_from = kLowest;              // what exponents count from, never below all that counts
  T p = 0, s = 0, t = 0, cross = 0, gap = 0;         // as in Sums

  static constexpr T kLowest = T(-3e38);

  template <int N>
  __device__ void add(const Exponent<T>& e, const T (&zs)[N], const T (&zt)[N]) {
#pragma unroll
    for (int j = 0; j < N; ++j) s_max = fmax(s_max, zs[j]);
#pragma unroll
    for (int j = 0; j < N; ++j) t_max = fmax(t_max, zt[j]);
    if ((s_max - s_from) * e.largest_s > kSlack || (t_max - t_from) * e.largest_t > kSlack) count_from(e, s_max, t_max);
    T es[N], new_s = 0, new_t = 0, new_cross = 0, new_gap = 0;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const T a = (zs[j] - s_from) * e.s, b = (zt[j] - t_from) * e.t, et = exp2_of(b);
      es[j] = exp2_of(a);
      const T d = et == 0 ? T(1) : (b - a) * T(kLn2);  // a class without teacher probability adds nothing
      new_s += es[j];
      new_t += et;
      new_cross += et * d;
      new_gap += gap_term(d, es[j], et);
    }
    s += new_s;
    t += new_t;
    cross += new_cross;
    gap += new_gap;
    if (e.ce) add_hard(e, zs, es);
  }

  // Afterwards `to` is what exponents count from, but finite.
  __device__ void count_from(const Exponent<T>& e, T to_s, T to_t) {
    to_s = fmax(to_s, kLowest);
    to_t = fmax(to_t, kLowest);
    const double down_s = double(s_from) - double(to_s), down_t = double(t_from) - double(to_t);
    const double x = down_s * e.s, y = down_t * e.t;
    const T of_s = exp2_of(T(fmax(x, -kFar))), of_t = exp2_of(T(fmax(y, -kFar)));
    const T by = T(fmin(fmax((y - x) * kLn2, -kMost), kMost));
    const T term = gap_term(by, of_s, of_t), slope = fabs(by) < T(0.5) ? term - of_t * by : of_s - of_t;
    const bool infinite = cross == infinity<T>();  // but for a class that has no teacher probability from here on
    gap = infinite ? (of_t == 0 ? of_s * s : cross) : of_s * gap - slope * cross + term * t;
    cross = infinite ? (of_t == 0 ? T(0) : cross) : of_t * (cross + by * t);
    p *= exp2_of(T(fmax(down_s * e.one, -kFar)));
    s *= of_s;
    t *= of_t;
    s_from = to_s;
    t_from = to_t;
  }

  // Over all threads of the team, counted from the maxima
  __device__ void gather(const Team& team, const Exponent<T>& e) {
    T most[2] = {s_max, t_max};
    team.max(most);
    s_max = most[0];
    t_max = most[1];
    count_from(e, s_max, t_max);
    double total[5];
    team.sum({p, s, t, cross, gap}, total);
    p = static_cast<T>(total[0]);
    s = static_cast<T>(total[1]);
    t = static_cast<T>(total[2]);
    cross = static_cast<T>(total[3]);
    gap = static_cast<T>(total[4]);
  }

  __device__ Sums sums() const {
    Sums z;
    z.p = p;
    z.s = s;
    z.t = t;
    z.cross = cross;
    z.gap = gap;
    return z;
  }

 private:
  template <int N>
  __device__ void add_hard(const Exponent<T>& e, const T (&zs)[N], const T (&es)[N]) {
    T sum = 0;
#pragma unroll
    for (int j = 0; j < N; ++j) sum += e.n ? power(es[j], e.n) : exp2_of((zs[j] - s_from) * e.one);
    p += sum;
  }
};

// The row's sums in one sweep, perhaps without the labelled classes
template <typename R, typename T>
__device__ Running<T> sum_row(R& row, const Exponent<T>& e, const Labels& l, bool without_labels) {
  Running<T> z;
  row.each_pack([&](int v, const uint4& a, const uint4& b) {
    T zs[R::count], zt[R::count];
    R::Format::split(a, zs);
    R::Format::split(b, zt);
    if (without_labels && (v == row.label_a || v == row.label_b)) {
#pragma unroll
      for (int j = 0; j < R::count; ++j)
        if (l.has(row.layout.index(v, j))) zs[j] = zt[j] = -infinity<T>();
    }
    z.add(e, zs, zt);
  });
  z.gather(row.team, e);
  return z;
}

template <typename T, typename Z>
__device__ double decoupled_terms(const SoftmaxKl& x, const Z& s, const Z& t, const Labels& l, const Running<T>& others,
                                  RowStats<T>& r) {
  r.set_non_target(others.s_max, others.t_max, others.sums());
  double result = (r.s.log_z + r.t.log_z) * 0;  // NaN and infinity show here too
  if (x.non_target_kl != 0) result += x.non_target_kl * non_target_divergence(others.sums());
  if (x.target_kl != 0) result += x.target_kl * target_divergence(l, s, t, r);
  return result;
}

// All terms that one sweep gives: CE with labels, the forward KL, and if DECOUPLED those terms. `r` has the scales and
// gets the rest. Of a row that does not count the numbers mean nothing.
template <bool DECOUPLED, typename R, typename T>
__device__ double terms_of_sums(const SoftmaxKl& x, R& row, const Labels& l, RowStats<T>& r) {
  const Exponent<T> e(x, r);
  const bool decoupled = DECOUPLED && x.decoupled();
  const Running<T> others = sum_row(row, e, l, decoupled);
  if (!row.counts()) return 0;
  const auto s = row.student(), t = row.teacher();
  Running<T> all = others;
  if (decoupled) {
    const T none = -infinity<T>();
    all.add(e, {s[l.a], l.two() ? s[l.b] : none}, {t[l.a], l.two() ? t[l.b] : none});
    all.count_from(e, all.s_max, all.t_max);
  }
  const Sums z = all.sums();
  r.s.max = all.s_max;
  r.t.max = x.soft() ? all.t_max : T(0);
  if (x.ce != 0) r.log_p = log(z.p);
  if (x.soft()) r.set_log_z(log(z.s), log_ratio(z));
  double result = x.ce != 0 && !x.dense && x.smoothing == 0 ? x.ce * cross_entropy(l, s, r) : 0;
  if (x.kl != 0 && x.divergence == Divergence::forward) result += x.kl * divergence(z, r.log_ratio);
  if (decoupled) result += decoupled_terms(x, s, t, l, others, r);
  return result;
}

}  // namespace
}  // namespace cuda
}  // namespace kd
