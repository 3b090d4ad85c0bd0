// softmax_kl on CUDA. A row belongs to one warp (narrow rows, four to a block) or to one block; its two passes read the
// logits from memory once and from the cache once. A last small kernel sums the rows in a fixed order. Kernels with
// PLAIN know that the divergence is the forward KL of logits as they are, which takes no further passes.
#include "cuda.h"
#include "softmax_kl_passes.cuh"

namespace kd {
namespace cuda {
namespace {

template <typename T, bool WARP>
__device__ double dense_cross_entropy(const SoftmaxKl& x, const Team<T, WARP>& team, const Logits<T>& s,
                                      const RowStats<T>& r) {
  double sum = 0;
  for (int64_t k = team.rank; k < x.classes; k += team.size)
    sum += weighted(dense_target<T>(x, team.row, k), double(s[k] - r.s.max) - r.log_p);
  return -team.sum(sum);
}

template <typename T, bool WARP>
__device__ double sum_of_logits(const SoftmaxKl& x, const Team<T, WARP>& team, const Logits<T>& s,
                                const RowStats<T>& r) {
  double sum = 0;
  for (int64_t k = team.rank; k < x.classes; k += team.size) sum += double(s[k] - r.s.max);
  return team.sum(sum);
}

// Without other classes their mass is exp(-inf) = 0. log Z is NaN if anything in the row is, or infinite: it must not
// hide behind the non-target classes.
template <typename T>
__device__ void settle_non_target_max(Softmax<T>& q) {
  if (q.non_target_max == -infinity<T>()) q.non_target_max = 0;
  q.non_target_max += static_cast<T>(q.log_z * 0);
}

// The decoupled terms, and the non-target part of `r`.
template <typename T, bool WARP>
__device__ double decoupled_terms(const SoftmaxKl& x, const Team<T, WARP>& team, const Logits<T>& s, const Logits<T>& t,
                                  const Labels& l, RowStats<T>& r) {
  settle_non_target_max(r.s);
  settle_non_target_max(r.t);
  const T inverse_s = static_cast<T>(r.s.inverse_t), inverse_t = static_cast<T>(r.t.inverse_t);
  Sums z;
  for (int64_t k = team.rank; k < x.classes; k += team.size) {
    if (l.has(k)) continue;
    const T a = (s[k] - r.s.max) * inverse_s - r.s.non_target_max,
            b = (t[k] - r.t.max) * inverse_t - r.t.non_target_max;
    add_class(a, b, T(exp(a)), T(exp(b)), z);
  }
  add_threads(team, z);
  r.s.non_target_log_z = log(z.s);
  r.t.non_target_log_z = log(z.t);
  double result = (r.s.log_z + r.t.log_z) * 0;  // NaN and infinity show here too
  if (x.non_target_kl != 0) result += x.non_target_kl * non_target_divergence(z);
  if (x.target_kl != 0) result += x.target_kl * target_divergence(l, s, t, r);
  return result;
}

// The gradient of the terms with a teacher by the student's logit of class k, or by the standardised one; es is left
// for CE.
template <bool PLAIN, typename T>
__device__ T soft_gradient(const SoftmaxKl& x, int64_t k, T s, T t, const Labels& l, const RowStats<T>& r,
                           const Factors<T>& f, T& es) {
  const T a = (s - f.s_max) * f.inverse_s, b = (t - f.t_max) * f.inverse_t;
  T g = 0;
  if (x.kl != 0) {
    es = exp(a);
    if (PLAIN || x.divergence == Divergence::forward) {
      g = f.soft * (es - f.ratio * T(exp(b)));
    } else {
      const T h = class_slope(x.divergence, LogRatio<T>(r)(s, t), Shares<T>(x));
      g = of_student(f.soft * es, h - r.slope);
    }
  }
  if (!x.decoupled()) return g;
  if (l.has(k)) return static_cast<T>(g + (k == l.a ? f.target_a : f.target_b));
  return g + f.non_target_s * T(exp(a - f.non_target_s_max)) - f.non_target_t * T(exp(b - f.non_target_t_max));
}

// <dL/dz', z'>, whose share the gradient loses on its way from the standardised logits z'
template <typename T, bool WARP>
__device__ double along_logits(const SoftmaxKl& x, const Team<T, WARP>& team, const Logits<T>& s, const Logits<T>& t,
                               const Labels& l, const RowStats<T>& r) {
  Factors<T> f = gradient_factors(x, r, 1.0, 0.0);
  if (x.decoupled()) add_decoupled(x, l, s, t, r, 1.0, f);
  double sum = 0;
  for (int64_t k = team.rank; k < x.classes; k += team.size) {
    T es = 0;
    const T g = soft_gradient<false>(x, k, s[k], t[k], l, r, f, es);
    sum += double(g) * double((s[k] - r.s.max) * r.s.inverse_std - r.mean);
  }
  return team.sum(sum);
}

template <bool PLAIN, typename T, bool WARP>
__device__ double row_forward(const SoftmaxKlForward& x, const Team<T, WARP>& team) {
  const Labels l = read_labels<T>(x, team.row);
  RowStats<T> r;
  double result = 0;
  if (!l.keep || !l.valid) {
    result = l.keep ? not_a_number<double>() : 0;
  } else {
    const Logits<T> s = student_of<T>(x, team.row), t = teacher_of<T>(x, team.row);
    row_maxima(x, team, s, t, r);
    Spread of_s, of_t;
    if (!PLAIN && x.standardize && x.soft()) {
      of_s = spread(x, team, s, r.s.max);
      of_t = spread(x, team, t, r.t.max);
    }
    r.standardise(x, of_s, of_t);
    const Sums z = row_sums(x, team, s, t, l, r);
    if (x.ce != 0) {
      const double ce = x.dense ? dense_cross_entropy(x, team, s, r) : cross_entropy(l, s, r);
      result += x.ce * (x.smoothing == 0 ? ce : smoothed(x, ce, sum_of_logits(x, team, s, r), r.log_p));
    }
    if (x.kl != 0) {
      const bool forward_kl = PLAIN || x.divergence == Divergence::forward;
      result += x.kl * (forward_kl ? divergence(z, r.log_ratio) : sum_parts(x, team, s, t, r));
    }
    if (x.decoupled()) result += decoupled_terms(x, team, s, t, l, r);
    if (!PLAIN && x.standardize && x.soft() && x.stats) r.lose(along_logits(x, team, s, t, l, r), x.classes);
  }
  if (team.rank == 0) save_stats(x, team.row, r);
  return result;
}

template <typename T, bool WARP, bool PLAIN>
__global__ void forward_kernel(const __grid_constant__ SoftmaxKlForward x) {
  __shared__ double shared[32];
  const Team<T, WARP> team(shared);
  if (team.row >= x.rows) return;
  const double loss = row_forward<PLAIN>(x, team);
  if (team.rank) return;
  if (x.reduction == Reduction::none) static_cast<T*>(x.loss)[team.row] = static_cast<T>(loss);
  else static_cast<double*>(x.workspace)[team.row] = loss;
}

// One block: the sum of the rows, and the scale from the number of rows that count.
template <typename T>
__global__ void finish_kernel(const __grid_constant__ SoftmaxKlForward x) {
  __shared__ double shared[32];
  double sum = 0, count = 0;
  for (int64_t row = threadIdx.x; row < x.rows; row += blockDim.x) {
    if (x.reduction != Reduction::none) sum += static_cast<const double*>(x.workspace)[row];
    count += is_kept(x, row);
  }
  sum = reduce_block(sum, shared, 0.0, Add());
  count = reduce_block(count, shared, 0.0, Add());
  if (threadIdx.x) return;
  const double scale = x.reduction == Reduction::mean ? 1 / (count > 1 ? count : 1) : 1;
  *static_cast<T*>(x.scale) = static_cast<T>(scale);
  if (x.reduction != Reduction::none) *static_cast<T*>(x.loss) = static_cast<T>(sum * scale);
}

// The gradient by the student's logit of class k.
template <bool PLAIN, typename T>
__device__ T class_gradient(const SoftmaxKlBackward& x, int64_t row, int64_t k, T s, T t, const Labels& l,
                            const RowStats<T>& r, const Factors<T>& f) {
  const bool ce = x.ce != 0 && (x.target || x.dense);
  const int n = x.kl != 0 ? integer_temperature(x) : 0;
  const T d = s - f.s_max;
  T es = 0, g = soft_gradient<PLAIN>(x, k, s, t, l, r, f, es);
  if (!PLAIN && x.standardize) g = f.through_standard(g, d);
  if (ce) {
    g += f.hard * (n ? power(es, n) : T(exp(d))) - f.uniform;
    if (x.dense) g -= f.label * dense_target<T>(x, row, k);
    if (k == l.a) g -= f.label * static_cast<T>(l.weight_a);
    if (l.mixed && k == l.b) g -= f.label * static_cast<T>(l.weight_b);
  }
  return g;
}

template <typename T, bool WARP, bool PLAIN>
__global__ void backward_kernel(const __grid_constant__ SoftmaxKlBackward x) {
  __shared__ double shared[32];
  const Team<T, WARP> team(shared);
  if (team.row >= x.rows) return;
  const int64_t n = x.classes, row = team.row, out = row * n;
  const Labels l = read_labels<T>(x, row);
  if (!l.keep || !l.valid) {
    const T value = l.keep ? not_a_number<T>() : T(0);
    for (int64_t k = team.rank; k < n; k += team.size) store<T>(x.student_type, x.out, out + k, value);
    return;
  }
  const Logits<T> s = student_of<T>(x, row), t = teacher_of<T>(x, row);
  const RowStats<T> r = read_stats<T>(x, row);
  const double upstream = double(static_cast<const T*>(x.grad)[row * x.grad_stride]) * *static_cast<const T*>(x.scale);
  double y_sum = 1;
  if (x.ce != 0 && x.dense) {
    y_sum = 0;
    for (int64_t k = team.rank; k < n; k += team.size) y_sum += dense_target<T>(x, row, k);
    y_sum = team.sum(y_sum);
  }
  Factors<T> f = gradient_factors(x, r, upstream, y_sum);
  if (x.decoupled()) add_decoupled(x, l, s, t, r, upstream, f);
  const bool teacher = x.soft();
  if (x.decoupled() && x.out == x.student) team.wait();  // until all have read the labels' logits
  for (int64_t k = team.rank; k < n; k += team.size) {
    const T g = class_gradient<PLAIN>(x, row, k, s[k], teacher ? t[k] : T(0), l, r, f);
    store<T>(x.student_type, x.out, out + k, g);
  }
}

template <typename T, bool PLAIN>
void forward_rows(const SoftmaxKlForward& x, cudaStream_t stream) {
  if (x.classes <= kWarpRow)
    forward_kernel<T, true, PLAIN><<<ceil_div(x.rows, kWarpThreads / 32), kWarpThreads, 0, stream>>>(x);
  else forward_kernel<T, false, PLAIN><<<x.rows, kBlockThreads, 0, stream>>>(x);
  check_launch("softmax_kl forward");
}

template <typename T>
void forward(const SoftmaxKlForward& x, cudaStream_t stream) {
  if (x.rows > 0) x.plain() ? forward_rows<T, true>(x, stream) : forward_rows<T, false>(x, stream);
  finish_kernel<T><<<1, kSumThreads, 0, stream>>>(x);
  check_launch("softmax_kl sum");
}

template <typename T, bool PLAIN>
void backward_rows(const SoftmaxKlBackward& x, cudaStream_t stream) {
  if (x.classes <= kWarpRow)
    backward_kernel<T, true, PLAIN><<<ceil_div(x.rows, kWarpThreads / 32), kWarpThreads, 0, stream>>>(x);
  else backward_kernel<T, false, PLAIN><<<x.rows, kBlockThreads, 0, stream>>>(x);
  check_launch("softmax_kl backward");
}

template <typename T>
void backward(const SoftmaxKlBackward& x, cudaStream_t stream) {
  if (x.rows > 0) x.plain() ? backward_rows<T, true>(x, stream) : backward_rows<T, false>(x, stream);
}

}  // namespace

int64_t workspace(const SoftmaxKlForward& x) { return 8 * x.rows; }

void compute(const SoftmaxKlForward& x, const Launch& launch) {
  x.fp64 ? forward<double>(x, launch.stream()) : forward<float>(x, launch.stream());
}

void compute(const SoftmaxKlBackward& x, const Launch& launch) {
  x.fp64 ? backward<double>(x, launch.stream()) : backward<float>(x, launch.stream());
}

}  // namespace cuda
}  // namespace kd
