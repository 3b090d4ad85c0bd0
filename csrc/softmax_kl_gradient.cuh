// The gradient of softmax_kl on CUDA: from the saved statistics each class's needs its own two logits alone, so one
// sweep reads them and writes it.
#pragma once

#include "softmax_kl_sweeps.cuh"

namespace kd {
namespace cuda {
namespace {

// CE's part at class k; es is e^(s / T), if there is one.
template <typename T>
__device__ T hard_gradient(const Factors<T>& f, const Exponent<T>& e, T s, T es) {
  return f.hard * (e.n ? power(es, e.n) : exp2_of((s - f.s_max) * e.one)) - f.uniform;
}

// What CE takes from the gradient at the labels
template <typename T>
struct LabelShares {
  int a, b;
  T of_a, of_b;
  __device__ LabelShares(const Labels& l, const Factors<T>& f)
      : a(static_cast<int>(l.a)),
        b(static_cast<int>(l.b)),
        of_a(f.label * static_cast<T>(l.weight_a)),
        of_b(l.mixed ? f.label * static_cast<T>(l.weight_b) : T(0)) {}
  __device__ T operator()(int k) const { return (k == a ? of_a : T(0)) + (k == b ? of_b : T(0)); }
};

// The forward KL, DECOUPLED terms and CE with labels: a pack at a time
template <bool DECOUPLED, typename R, typename T>
__device__ void write_packs(const SoftmaxKlBackward& x, R& row, const Labels& l, const RowStats<T>& r,
                            const Factors<T>& f) {
  constexpr int N = R::count;
  const Exponent<T> e(x, r);
  const LogRatio<T> log_ratio = r.class_log_ratio(), non_target_log_ratio = non_target_class_log_ratio(r, f);
  const LabelShares<T> of_labels(l, f);
  const Line out_row = gradient_of(x, row.team.row);
  const bool kl = x.kl != 0, decoupled = DECOUPLED && x.decoupled(), ce = e.ce && x.target;
  row.each_pack([&](int v, const uint4& student, const uint4& teacher) {
    T s[N], t[N], es[N], g[N] = {};
    R::Format::split(student, s);
    R::Format::split(teacher, t);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      if (kl) {
        const Parted<T> q = parted_by_2(f.student(s[j]), f.teacher(t[j]), log_ratio(s[j], t[j]));
        es[j] = q.student;
        g[j] = f.soft * q.difference;
      } else {
        es[j] = exp2_of((s[j] - f.s_max) * e.s);
      }
    }
    const bool labelled = v == row.label_a || v == row.label_b;
    if (decoupled) {
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const int k = row.layout.index(v, j);
        g[j] += labelled && l.has(k) ? static_cast<T>(k == l.a ? f.target_a : f.target_b)
                                     : non_target_gradient(f, non_target_log_ratio, s[j], t[j]);
      }
    }
    if (ce) {
#pragma unroll
      for (int j = 0; j < N; ++j) g[j] += hard_gradient(f, e, s[j], es[j]);
      if (labelled)
#pragma unroll
        for (int j = 0; j < N; ++j) g[j] -= of_labels(row.layout.index(v, j));
    }
    row.layout.store(out_row, v, R::Format::join(g));
  });
}

// All else, class by class. The packs of a gradient fill up from behind.
template <typename R, typename T>
__device__ void write_classes(const SoftmaxKlBackward& x, R& row, const Labels& l, const RowStats<T>& r,
                              const Factors<T>& f) {
  using Format = typename R::Format;
  const Exponent<T> e(x, r);
  const LabelShares<T> of_labels(l, f);
  const Line out_row = gradient_of(x, row.team.row);
  const SoftGradient<T> soft(x, l, r, f);
  const bool ce = e.ce && (x.target || x.dense), with_teacher = x.soft();
  row.each_pack([&](int v, uint4 student, uint4 teacher) {
    uint4 out = {};
#pragma unroll 1
    for (int j = 0; j < R::count; ++j) {
      const T s = Format::pop(student), t = Format::pop(teacher);
      const int k = row.layout.index(v, j);
      T g = with_teacher ? soft(k, s, t) : T(0);
      if (x.standardize) g = f.through_standard(g, s - f.s_max);
      if (ce) {
        g += f.hard * exp2_of((s - f.s_max) * e.one) - f.uniform;
        if (x.dense && k >= 0 && k < row.layout.classes) g -= f.label * dense_target<T>(x, row.team.row, k);
        g -= of_labels(k);
      }
      Format::push(out, g);
    }
    row.layout.store(out_row, v, out);
  });
}

// What is written of a row that does not count, or whose label is none
template <typename R, typename T>
__device__ void fill(const SoftmaxKlBackward& x, const R& row, T value) {
  const Line out_row = gradient_of(x, row.team.row);
  uint4 out = {};
  for (int j = 0; j < R::count; ++j) R::Format::push(out, value);
  for (int v = row.team.rank; v < row.layout.packs(); v += row.team.size) row.layout.store(out_row, v, out);
}

template <typename R>
__device__ double sum_of_target(const SoftmaxKl& x, const R& row) {
  typename R::T sum = 0;
  for (int64_t k = row.team.rank; k < x.classes; k += row.team.size)
    sum += dense_target<typename R::T>(x, row.team.row, k);
  return row.team.sum(sum);
}

}  // namespace
}  // namespace cuda
}  // namespace kd
