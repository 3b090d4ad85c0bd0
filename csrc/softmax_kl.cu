// softmax_kl on CUDA. A row belongs to one warp (narrow rows, four to a block) or to one block; its two passes read the logits
// from memory once and from the cache once. A last small kernel sums the rows in a fixed order.
#include "cuda.h"
#include "device.cuh"

namespace kd {
namespace cuda {
namespace {

constexpr int kWarpRow = 2048;  // classes up to which one warp takes a row
constexpr int kWarpThreads = 128, kBlockThreads = 256, kSumThreads = 1024;

// The threads that share a row.
template <typename T, bool WARP>
struct Team {
  int64_t row;
  int rank, size;
  double* shared;
  __device__ explicit Team(double* s)
      : row(WARP ? int64_t(blockIdx.x) * (kWarpThreads / 32) + threadIdx.x / 32 : int64_t(blockIdx.x)),
        rank(WARP ? threadIdx.x % 32 : threadIdx.x),
        size(WARP ? 32 : kBlockThreads),
        shared(s) {}
  __device__ double sum(double x) const { return WARP ? reduce_lanes(x, 32, Add()) : reduce_block(x, shared, 0.0, Add()); }
  __device__ T max(T x) const {
    return WARP ? reduce_lanes(x, 32, Max())
                : static_cast<T>(reduce_block(static_cast<double>(x), shared, -infinity<double>(), Max()));
  }
};

struct Labels {
  int64_t a, b;
  double weight_a, weight_b;
  bool keep, valid, mixed;
  __device__ bool has(int64_t k) const { return k == a || k == b; }
};

template <typename T>
__device__ Labels read_labels(const SoftmaxKl& x, int64_t row) {
  Labels l{-1, -1, 1, 0, true, true, false};
  if (!x.target) return l;
  l.a = x.target[row];
  l.mixed = x.mixed != nullptr;
  l.b = l.mixed ? x.mixed[row] : l.a;
  l.keep = l.a != x.ignore_index && l.b != x.ignore_index;
  l.valid = l.a >= 0 && l.a < x.classes && l.b >= 0 && l.b < x.classes;
  if (x.lam) {
    l.weight_a = static_cast<double>(load<T>(x.lam_type, x.lam, row * x.lam_stride));
    l.weight_b = 1 - l.weight_a;
  }
  return l;
}

// One network's logits of one row.
template <typename T>
struct Logits {
  const void* data;
  DType type;
  int64_t first;
  __device__ T operator[](int64_t k) const { return load<T>(type, data, first + k); }
};

template <typename T>
__device__ Logits<T> student_of(const SoftmaxKl& x, int64_t row) {
  return {x.student, x.student_type, row * x.student_stride};
}
template <typename T>
__device__ Logits<T> teacher_of(const SoftmaxKl& x, int64_t row) {
  return {x.teacher, x.teacher_type, row * x.teacher_stride};
}

__device__ inline double weighted(double weight, double value) { return weight == 0 ? 0 : weight * value; }

template <typename T>
__device__ inline T whole_power(T x, int n) {  // x^n, n in 1..4
  const T square = x * x;
  return n == 1 ? x : n == 2 ? square : n == 3 ? square * x : square * square;
}

__device__ inline int integer_temperature(double t) { return t == 1 || t == 2 || t == 3 || t == 4 ? static_cast<int>(t) : 0; }

struct Sums {
  double p, s, t, cross, gap;  // as on the CPU
};

__device__ inline double divergence(const Sums& z) {
  const double m = z.cross / z.t, gap = z.gap / z.t;
  if (m < 0.5 && m > -0.5 && gap < 0.5) return m + log1p(gap - m);
  return m + log(z.s / z.t);
}

template <typename T, bool WARP>
__device__ double row_forward(const SoftmaxKlForward& x, const Team<T, WARP>& team) {
  const int64_t n = x.classes, row = team.row;
  const Labels l = read_labels<T>(x, row);
  T* stats = x.stats ? static_cast<T*>(x.stats) + row : nullptr;
  const int count = x.stats_count();
  if (!l.keep || !l.valid) {
    if (stats && team.rank < count) stats[team.rank * x.rows] = 0;
    return l.keep ? not_a_number<double>() : 0;
  }
  const Logits<T> s = student_of<T>(x, row), t = teacher_of<T>(x, row);
  const bool ce = x.ce != 0, soft = x.soft();
  T s_max = -infinity<T>(), t_max = -infinity<T>();
  for (int64_t k = team.rank; k < n; k += team.size) {
    s_max = Max()(s_max, s[k]);
    if (soft) t_max = Max()(t_max, t[k]);
  }
  s_max = team.max(s_max);
  t_max = soft ? team.max(t_max) : T(0);

  const T inverse_t = static_cast<T>(1 / x.temperature);
  const int power = integer_temperature(x.temperature);
  Sums z{0, 0, 0, 0, 0};
  T rest_s_max = -infinity<T>(), rest_t_max = -infinity<T>();
  for (int64_t k = team.rank; k < n; k += team.size) {
    const T d = s[k] - s_max;
    T es = 0;
    if (soft) {
      const T a = d * inverse_t, b = (t[k] - t_max) * inverse_t;
      es = exp(a);
      const T et = exp(b);
      z.s += es;
      z.t += et;
      z.cross += et == 0 ? T(0) : et * (b - a);
      z.gap += divergence_term(b - a, es, et);
      if (!l.has(k)) {
        rest_s_max = Max()(rest_s_max, a);
        rest_t_max = Max()(rest_t_max, b);
      }
    }
    if (ce) z.p += soft && power ? whole_power(es, power) : exp(d);
  }
  if (ce) z.p = team.sum(z.p);
  if (soft) {
    z.s = team.sum(z.s);
    z.t = team.sum(z.t);
    z.cross = team.sum(z.cross);
    z.gap = team.sum(z.gap);
  }
  const double log_p = ce ? log(z.p) : 0, log_s = soft ? log(z.s) : 0, log_t = soft ? log(z.t) : 0;
  double result = 0;
  if (ce && x.dense) {
    double sum = 0;
    for (int64_t k = team.rank; k < n; k += team.size)
      sum += weighted(load<T>(x.dense_type, x.dense, row * x.dense_stride + k), double(s[k] - s_max) - log_p);
    result -= x.ce * team.sum(sum);
  } else if (ce && x.target) {
    double sum = weighted(l.weight_a, double(s[l.a] - s_max) - log_p);
    if (l.mixed) sum += weighted(l.weight_b, double(s[l.b] - s_max) - log_p);
    result -= x.ce * sum;
  }
  if (x.kl != 0) result += x.kl * divergence(z);

  Sums rest{0, 0, 0, 0, 0};
  if (x.decoupled()) {
    rest_s_max = team.max(rest_s_max);
    rest_t_max = team.max(rest_t_max);
    if (rest_s_max == -infinity<T>()) rest_s_max = 0;  // no other class: its mass is exp(-inf) = 0
    if (rest_t_max == -infinity<T>()) rest_t_max = 0;
    // log Z is NaN if anything in the row is, or infinite: it must not hide behind the other classes
    rest_s_max += static_cast<T>(log_s * 0);
    rest_t_max += static_cast<T>(log_t * 0);
    result += (log_s + log_t) * 0;
    for (int64_t k = team.rank; k < n; k += team.size) {
      if (l.has(k)) continue;
      const T a = (s[k] - s_max) * inverse_t - rest_s_max, b = (t[k] - t_max) * inverse_t - rest_t_max;
      const T es = exp(a), et = exp(b);
      rest.s += es;
      rest.t += et;
      rest.cross += et == 0 ? T(0) : et * (b - a);
      rest.gap += divergence_term(b - a, es, et);
    }
    rest.s = team.sum(rest.s);
    rest.t = team.sum(rest.t);
    rest.cross = team.sum(rest.cross);
    rest.gap = team.sum(rest.gap);
    if (x.non_target_kl != 0 && rest.t != 0) result += x.non_target_kl * (rest.s == 0 ? rest.cross : divergence(rest));
    if (x.target_kl != 0) {
      double mass_s = 0, mass_t = 0, target_kl = 0;
      for (int i = 0; i < (l.a == l.b ? 1 : 2); ++i) {
        const int64_t k = i ? l.b : l.a;
        const double log_qs = double(s[k] - s_max) / x.temperature - log_s;
        const double log_qt = double(t[k] - t_max) / x.temperature - log_t;
        mass_s += exp(log_qs);
        mass_t += exp(log_qt);
        target_kl += weighted(exp(log_qt), log_qt - log_qs);
      }
      // log of the other classes' probability: log1p of the labelled mass where that is small, else their log-sum
      const double log_ss = mass_s < 0.5 ? log1p(-mass_s) : double(rest_s_max) + log(rest.s) - log_s;
      const double log_st = mass_t < 0.5 ? log1p(-mass_t) : double(rest_t_max) + log(rest.t) - log_t;
      result += x.target_kl * (target_kl + weighted(exp(log_st), log_st - log_ss));
    }
  }
  if (stats && team.rank == 0) {
    stats[0] = s_max;
    stats[x.rows] = t_max;
    stats[2 * x.rows] = static_cast<T>(log_p);
    stats[3 * x.rows] = static_cast<T>(log_s);
    stats[4 * x.rows] = static_cast<T>(log_t);
    if (count == 9) {
      stats[5 * x.rows] = rest_s_max;
      stats[6 * x.rows] = rest_t_max;
      stats[7 * x.rows] = static_cast<T>(log(rest.s));
      stats[8 * x.rows] = static_cast<T>(log(rest.t));
    }
  }
  return result;
}

template <typename T, bool WARP>
__global__ void forward_kernel(const __grid_constant__ SoftmaxKlForward x) {
  __shared__ double shared[32];
  const Team<T, WARP> team(shared);
  if (team.row >= x.rows) return;
  const double loss = row_forward(x, team);
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
    count += !x.target || (x.target[row] != x.ignore_index &&
                           (!x.mixed || x.mixed[row] != x.ignore_index));
  }
  sum = reduce_block(sum, shared, 0.0, Add());
  count = reduce_block(count, shared, 0.0, Add());
  if (threadIdx.x) return;
  const double scale = x.reduction == Reduction::mean ? 1 / (count > 1 ? count : 1) : 1;
  *static_cast<T*>(x.scale) = static_cast<T>(scale);
  if (x.reduction != Reduction::none) *static_cast<T*>(x.loss) = static_cast<T>(sum * scale);
}

template <typename T, bool WARP>
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
  const T* stats = static_cast<const T*>(x.stats) + row;
  const T s_max = stats[0], t_max = stats[x.rows];
  const double log_p = stats[2 * x.rows], log_s = stats[3 * x.rows], log_t = stats[4 * x.rows];
  const double factor = double(static_cast<const T*>(x.grad)[row * x.grad_stride]) * *static_cast<const T*>(x.scale);
  const bool ce = x.ce != 0 && (x.target || x.dense), soft = x.kl != 0, decoupled = x.decoupled();
  const double scale = factor / x.temperature;
  double y_sum = 1;
  if (ce && x.dense) {
    y_sum = 0;
    for (int64_t k = team.rank; k < n; k += team.size)
      y_sum += load<T>(x.dense_type, x.dense, row * x.dense_stride + k);
    y_sum = team.sum(y_sum);
  }
  const T c_hard = static_cast<T>(x.ce * factor * y_sum * exp(-log_p)), c_label = static_cast<T>(x.ce * factor);
  const T c_soft = static_cast<T>(x.kl * scale * exp(-log_s)), ratio = static_cast<T>(exp(log_s - log_t));
  const T inverse_t = static_cast<T>(1 / x.temperature);
  const int power = integer_temperature(x.temperature);

  T rest_s_max = 0, rest_t_max = 0, c_rest_s = 0, c_rest_t = 0;
  if (decoupled) {
    rest_s_max = stats[5 * x.rows];
    rest_t_max = stats[6 * x.rows];
    const double z_s = stats[7 * x.rows], z_t = stats[8 * x.rows];
    double mass_s = 0, mass_t = 0;
    for (int i = 0; i < (l.a == l.b ? 1 : 2); ++i) {
      const int64_t k = i ? l.b : l.a;
      mass_s += exp(double(s[k] - s_max) / x.temperature - log_s);
      mass_t += exp(double(t[k] - t_max) / x.temperature - log_t);
    }
    // S_s - S_t from whichever side has the smaller numbers
    const double difference = mass_s < 0.5
                                  ? mass_t - mass_s
                                  : exp(double(rest_s_max) + z_s - log_s) - exp(double(rest_t_max) + z_t - log_t);
    if (z_s != -infinity<double>())
      c_rest_s = static_cast<T>(scale * (x.target_kl * difference + x.non_target_kl) * exp(-z_s));
    if (z_t != -infinity<double>()) c_rest_t = static_cast<T>(scale * x.non_target_kl * exp(-z_t));
  }
  for (int64_t k = team.rank; k < n; k += team.size) {
    const T d = s[k] - s_max, a = d * inverse_t, b = soft || decoupled ? (t[k] - t_max) * inverse_t : T(0);
    T g = 0, es = 0;
    if (soft) {
      es = exp(a);
      g = c_soft * (es - ratio * exp(b));
    }
    if (ce) {
      g += c_hard * (soft && power ? whole_power(es, power) : exp(d));
      if (x.dense) g -= c_label * load<T>(x.dense_type, x.dense, row * x.dense_stride + k);
      if (k == l.a) g -= c_label * static_cast<T>(l.weight_a);
      if (l.mixed && k == l.b) g -= c_label * static_cast<T>(l.weight_b);
    }
    if (decoupled) {
      if (l.has(k)) {
        const double qs = exp(double(d) / x.temperature - log_s), qt = exp(double(t[k] - t_max) / x.temperature - log_t);
        g += static_cast<T>(scale * x.target_kl * (qs - qt));
      } else {
        g += c_rest_s * exp(a - rest_s_max) - c_rest_t * exp(b - rest_t_max);
      }
    }
    store<T>(x.student_type, x.out, out + k, g);
  }
}

template <typename T>
void forward(const SoftmaxKlForward& x, cudaStream_t stream) {
  if (x.rows > 0) {
    if (x.classes <= kWarpRow)
      forward_kernel<T, true><<<ceil_div(x.rows, kWarpThreads / 32), kWarpThreads, 0, stream>>>(x);
    else
      forward_kernel<T, false><<<x.rows, kBlockThreads, 0, stream>>>(x);
    check_launch("softmax_kl forward");
  }
  finish_kernel<T><<<1, kSumThreads, 0, stream>>>(x);
  check_launch("softmax_kl sum");
}

template <typename T>
void backward(const SoftmaxKlBackward& x, cudaStream_t stream) {
  if (x.rows == 0) return;
  if (x.classes <= kWarpRow)
    backward_kernel<T, true><<<ceil_div(x.rows, kWarpThreads / 32), kWarpThreads, 0, stream>>>(x);
  else
    backward_kernel<T, false><<<x.rows, kBlockThreads, 0, stream>>>(x);
  check_launch("softmax_kl backward");
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
