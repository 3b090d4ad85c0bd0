// softmax_pearson on the CPU: rows first, which leaves both networks' probabilities a and b in memory; then columns, a
// stripe of them at a time.
#include "softmax_pearson.h"

#include "cpu.h"

namespace kd {
namespace KD_ISA {
namespace {

constexpr int64_t kSmall = 1 << 14;  // logits that are not worth a second thread
constexpr int64_t kStripe = 64;      // columns that one sweep takes: their part of all rows fits the second-level cache
constexpr int64_t kFlush = 128;      // rows that are summed in their own precision

// Sums over a row or a column of centred numbers, d = b - a
struct Centred {
  double aa = 0, ab = 0, bb = 0, ad = 0, dd = 0;
};

// With r = <a, b> / (|a| |b| + eps):  1 - r, and dr/da = on_b (b - near a) + on_a a. Where the two are close to each
// other their difference keeps the digits: |a|^2 |b|^2 - <a, b>^2 = |a|^2 |d|^2 - <a, d>^2.
struct Correlation {
  double loss, on_b, on_a, near;

  Correlation(const Centred& z, double eps) {
    const double norm_a = std::sqrt(z.aa), norm_b = std::sqrt(z.bb), norms = norm_a * norm_b, all = norms + eps;
    const bool close = 4 * z.dd < z.aa && norms > 0;  // b may be 0: what is far below it is lost in d
    const double gap = close ? max(z.aa * z.dd - z.ad * z.ad, 0.0) / (norms + z.ab) : norms - z.ab;
    const double along = norm_a == 0 ? 0 : (close ? z.ad : z.ab) / norm_a;
    loss = (gap + eps) / all;
    on_b = 1 / all;
    on_a = ((close ? eps : 0) - norm_b * along) / (all * all);
    near = close;
  }
};

// e^((z - max) / T) into `out`, and their sum
template <typename T>
double exponentials(const T* z, int64_t n, T inverse_t, T* out) {
  const T top = largest(z, n);
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += kChunk) {
    const int64_t end = min(n, begin + kChunk);
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t k = begin; k < end; ++k) sum += out[k] = fast_exp((z[k] - top) * inverse_t);
    total += sum;
  }
  return total;
}

template <typename T>
Centred normalise(T* a, T* b, int64_t n, T of_a, T of_b) {
  const T mean = T(1) / T(n);
  Centred total;
  for (int64_t begin = 0; begin < n; begin += kChunk) {
    const int64_t end = min(n, begin + kChunk);
    // a loop of its own: in one with the next, b - a would be fused with the product, and not 0 for equal networks
#pragma omp simd
    for (int64_t k = begin; k < end; ++k) {
      a[k] *= of_a;
      b[k] *= of_b;
    }
    T aa = 0, ab = 0, bb = 0, ad = 0, dd = 0;
#pragma omp simd reduction(+ : aa, ab, bb, ad, dd)
    for (int64_t k = begin; k < end; ++k) {
      const T x = a[k] - mean, y = b[k] - mean, d = b[k] - a[k];
      aa += x * x;
      ab += x * y;
      bb += y * y;
      ad += x * d;
      dd += d * d;
    }
    total.aa += aa;
    total.ab += ab;
    total.bb += bb;
    total.ad += ad;
    total.dd += dd;
  }
  return total;
}

// Both rows of probabilities, and 1 - r of them
template <typename T>
double row_forward(const SoftmaxPearsonForward& x, int64_t row, T* buffer) {
  const int64_t n = x.classes;
  const T* s = load<T>(x.student_type, x.student, row * x.student_stride, n, buffer);
  const T* t = load<T>(x.teacher_type, x.teacher, row * x.teacher_stride, n, buffer + n);
  T *a = static_cast<T*>(x.p_s) + row * n, *b = static_cast<T*>(x.p_t) + row * n;
  const T inverse_t = static_cast<T>(1 / x.temperature);
  const T z_s = static_cast<T>(exponentials(s, n, inverse_t, a)),
          z_t = static_cast<T>(exponentials(t, n, inverse_t, b));
  const Correlation c(normalise(a, b, n, 1 / z_s, 1 / z_t), x.eps);
  const double factor = -x.beta * x.temperature * x.temperature / double(x.rows);
  T* to = static_cast<T*>(x.row_factors) + row;
  to[0] = static_cast<T>(factor * c.on_b);
  to[x.rows] = static_cast<T>(factor * c.on_a);
  to[2 * x.rows] = static_cast<T>(c.near);
  return c.loss;
}

// Means of a, b and b - a. That of equal numbers is exactly their number.
template <typename T>
struct Means {
  T a[kStripe], b[kStripe], d[kStripe];

  Means(const T* p, const T* q, int64_t rows, int64_t n, int64_t width) {
    double sum_a[kStripe] = {}, sum_b[kStripe] = {}, sum_d[kStripe] = {};
    for (int64_t i = 0; i < rows; ++i, p += n, q += n)
#pragma omp simd
      for (int64_t k = 0; k < width; ++k) {
        sum_a[k] += p[k];
        sum_b[k] += q[k];
        sum_d[k] += q[k] - p[k];
      }
    for (int64_t k = 0; k < width; ++k) {
      a[k] = static_cast<T>(sum_a[k] / double(rows));
      b[k] = static_cast<T>(sum_b[k] / double(rows));
      d[k] = static_cast<T>(sum_d[k] / double(rows));
    }
  }
};

template <typename T>
void column_sums(const T* p, const T* q, int64_t rows, int64_t n, int64_t width, const Means<T>& mean, Centred* sums) {
  for (int64_t first = 0; first < rows; first += kFlush) {
    T aa[kStripe] = {}, ab[kStripe] = {}, bb[kStripe] = {}, ad[kStripe] = {}, dd[kStripe] = {};
    for (int64_t i = first; i < min(rows, first + kFlush); ++i, p += n, q += n)
#pragma omp simd
      for (int64_t k = 0; k < width; ++k) {
        const T x = p[k] - mean.a[k], y = q[k] - mean.b[k], d = q[k] - p[k] - mean.d[k];
        aa[k] += x * x;
        ab[k] += x * y;
        bb[k] += y * y;
        ad[k] += x * d;
        dd[k] += d * d;
      }
    for (int64_t k = 0; k < width; ++k) {
      sums[k].aa += aa[k];
      sums[k].ab += ab[k];
      sums[k].bb += bb[k];
      sums[k].ad += ad[k];
      sums[k].dd += dd[k];
    }
  }
}

// A stripe of columns: their part of column_factors, and 1 - r of each
template <typename T>
void stripe_forward(const SoftmaxPearsonForward& x, int64_t column, double* losses) {
  const int64_t n = x.classes, width = min(kStripe, n - column);
  const T *a = static_cast<const T*>(x.p_s) + column, *b = static_cast<const T*>(x.p_t) + column;
  const Means<T> mean(a, b, x.rows, n, width);
  Centred sums[kStripe];
  column_sums(a, b, x.rows, n, width, mean, sums);
  const double factor = -x.gamma * x.temperature * x.temperature / double(n);
  T* to = static_cast<T*>(x.column_factors) + column;
  for (int64_t k = 0; k < width; ++k) {
    const Correlation c(sums[k], x.eps);
    losses[column + k] = c.loss;
    to[k] = static_cast<T>(factor * c.on_b);
    to[n + k] = static_cast<T>(factor * c.on_a);
    to[2 * n + k] = static_cast<T>(c.near);
    to[3 * n + k] = c.near != 0 ? mean.d[k] : mean.b[k];
    to[4 * n + k] = mean.a[k];
  }
}

inline double mean(const double* x, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += x[i];
  return sum / double(max<int64_t>(n, 1));
}

template <typename T>
void forward(const SoftmaxPearsonForward& x, const Pool& pool) {
  const int64_t n = x.classes;
  Buffer<double> losses(x.rows + n);
  double *of_rows = losses, *of_columns = of_rows + x.rows;
  parallel(pool, x.rows, kSmall / (n + 1), [&](int64_t begin, int64_t end) {
    Buffer<T> buffer(2 * n);
    for (int64_t row = begin; row < end; ++row) of_rows[row] = row_forward<T>(x, row, buffer);
  });
  parallel(pool, x.rows ? ceil_div(n, kStripe) : 0, kSmall / (kStripe * x.rows + 1), [&](int64_t begin, int64_t end) {
    for (int64_t stripe = begin; stripe < end; ++stripe) stripe_forward<T>(x, stripe * kStripe, of_columns);
  });
  const double rows = x.rows ? x.beta * mean(of_rows, x.rows) : 0, columns = x.rows ? x.gamma * mean(of_columns, n) : 0;
  *static_cast<T*>(x.loss) = static_cast<T>(x.temperature * x.temperature * (rows + columns));
}

// dz = a (g - <a, g>) / T, g = dloss/da
template <typename T>
void row_backward(const SoftmaxPearsonBackward& x, int64_t row, T factor, T* out) {
  const int64_t n = x.classes;
  const T *a = static_cast<const T*>(x.p_s) + row * n, *b = static_cast<const T*>(x.p_t) + row * n;
  const T* of_row = static_cast<const T*>(x.row_factors) + row;
  const T row_b = of_row[0], row_a = of_row[x.rows], row_near = of_row[2 * x.rows], mean = T(1) / T(n);
  const T row_mean = (1 - row_near) * mean;
  const T* c = static_cast<const T*>(x.column_factors);
  const T *on_b = c, *on_a = c + n, *near = c + 2 * n, *mean_b = c + 3 * n, *mean_a = c + 4 * n;
  double inner = 0;
  for (int64_t begin = 0; begin < n; begin += kChunk) {
    const int64_t end = min(n, begin + kChunk);
    T part = 0;
#pragma omp simd reduction(+ : part)
    for (int64_t k = begin; k < end; ++k) {
      const T by_row = row_b * (b[k] - row_near * a[k] - row_mean) + row_a * (a[k] - mean);
      const T g = by_row + on_b[k] * (b[k] - near[k] * a[k] - mean_b[k]) + on_a[k] * (a[k] - mean_a[k]);
      out[k] = g;
      part += a[k] * g;
    }
    inner += part;
  }
  const T along = static_cast<T>(inner);
#pragma omp simd
  for (int64_t k = 0; k < n; ++k) out[k] = factor * a[k] * (out[k] - along);
}

template <typename T>
void backward(const SoftmaxPearsonBackward& x, const Pool& pool) {
  const int64_t n = x.classes;
  const T factor = static_cast<T>(double(*static_cast<const T*>(x.grad)) / x.temperature);
  parallel(pool, x.rows, kSmall / (n + 1), [&](int64_t begin, int64_t end) {
    Buffer<T> buffer(n);
    for (int64_t row = begin; row < end; ++row) {
      T* out = destination<T>(x.out_type, x.out, row * n, buffer);
      row_backward(x, row, factor, out);
      store<T>(x.out_type, x.out, row * n, n, out);
    }
  });
}

}  // namespace
}  // namespace KD_ISA

template <>
void compute<Isa::KD_ISA>(const SoftmaxPearsonForward& x, const Pool& pool) {
  x.fp64 ? KD_ISA::forward<double>(x, pool) : KD_ISA::forward<float>(x, pool);
}

template <>
void compute<Isa::KD_ISA>(const SoftmaxPearsonBackward& x, const Pool& pool) {
  x.fp64 ? KD_ISA::backward<double>(x, pool) : KD_ISA::backward<float>(x, pool);
}

}  // namespace kd
