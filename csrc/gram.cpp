// gram on the CPU: products from matrix.h; everything on B x B matrices is done in double, since it costs next to nothing.
#include "gram.h"

#include "cpu.h"
#include "matrix.h"

namespace kd {
namespace KD_ISA {
namespace {

constexpr double kCosineEps = 1e-8;
constexpr int64_t kSmall = 1 << 17;  // simple operations that are not worth a second thread
constexpr int64_t kProducts = 1 << 22;  // the same for multiply-adds of a matrix product
constexpr int64_t kPartMemory = int64_t(1) << 26;  // bytes of partial Gram matrices at most

struct Normalised {
  double norm, divisor;
};

// ||K_i||, by way of K / max |K|: squares of large features overflow
inline Normalised row_norm(const double* k, int64_t n, bool l1, double eps) {
  double top = 0, sum = 0;
#pragma omp simd reduction(max : top)
  for (int64_t j = 0; j < n; ++j) top = std::fabs(k[j]) > top ? std::fabs(k[j]) : top;
  const double by = l1 || top == 0 ? 1 : 1 / top;  // NaN does not count in the maximum; it shows in the sum
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) sum += l1 ? std::fabs(k[j]) : (k[j] * by) * (k[j] * by);
  const double norm = l1 ? sum : std::sqrt(sum) / by;
  return {norm, norm < eps ? eps : norm};
}

// H_i of the specification: the row of the student's Gram matrix through its normalisation. Returns ||G_t - G_s||^2.
double sp_row(const SpGram& x, int64_t i, const double* k_s, const double* k_t, double* h) {
  const int64_t n = x.batch;
  const Normalised s = row_norm(k_s, n, x.l1, x.eps), t = row_norm(k_t, n, x.l1, x.eps);
  double loss = 0, inner = 0;
#pragma omp simd reduction(+ : loss, inner)
  for (int64_t j = 0; j < n; ++j) {
    const double g = k_s[j] / s.divisor, difference = g - k_t[j] / t.divisor;
    loss += difference * difference;
    inner += 2 * x.scale * difference * g;
    if (h) h[i * n + j] = 2 * x.scale * difference;
  }
  if (!h) return loss;
  if (s.norm < x.eps) inner = 0;  // below eps the norm is a constant
  const bool dead = s.norm == 0 && !x.zero_row_grad;  // an all-zero row has no direction to normalise
  for (int64_t j = 0; j < n; ++j) {
    const double direction = x.l1 ? (k_s[j] > 0) - (k_s[j] < 0) : k_s[j] / s.divisor;
    h[i * n + j] = dead ? 0 : (h[i * n + j] - inner * direction) / s.divisor;
  }
  return loss;
}

// The number of parts that the columns are cut into: a function of the shapes and the thread count alone
inline int64_t column_parts(const SpGram& x, const Pool& pool, int64_t stride) {
  int64_t width = 1;
  for (int64_t i = 0; i < x.count; ++i) width = most(width, most(x.layers[i].student.width, x.layers[i].teacher.width));
  const int64_t wanted = (2 * pool.threads + x.count - 1) / x.count;
  const int64_t room = kPartMemory / (2 * x.count * stride * stride * 8 + 1);
  return most<int64_t>(1, least(least(wanted, room), (width + 255) / 256));
}

template <typename T>
void sp_forward_as(const SpGram& x, const Pool& pool) {
  const int64_t n = x.batch, stride = round_up(n, kTile), size = stride * stride, matrices = 2 * x.count;
  double total = 0;
  if (n > 0) {
    const int64_t parts = column_parts(x, pool, stride);
    Buffer<double> partial(matrices * parts * size), h(x.weights ? x.count * n * n : 0), losses(x.count * n);
    double *k = partial, *h_data = h, *loss = losses;
    parallel(pool, matrices * parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t matrix = task % matrices, part = task / matrices;  // every thread gets some of every matrix
        const SpLayer& layer = x.layers[matrix / 2];
        const Rows& q = matrix % 2 ? layer.teacher : layer.student;
        const int64_t step = round_up((q.width + parts - 1) / parts, 64);
        inner_products<T>(q, 0, n, q, true, least(q.width, part * step), least(q.width, (part + 1) * step),
                          k + (matrix * parts + part) * size, stride);
      }
    });
    parallel(pool, matrices * n, kSmall / (n * parts), [&](int64_t begin, int64_t end) {  // sum the parts and mirror
      for (int64_t task = begin; task < end; ++task) {
        const int64_t i = task % n;
        double* to = k + task / n * parts * size;
        for (int64_t j = 0; j <= i; ++j) {
          double sum = 0;
          for (int64_t part = 0; part < parts; ++part) sum += to[part * size + i * stride + j];
          to[i * stride + j] = to[j * stride + i] = sum;
        }
      }
    });
    parallel(pool, x.count * n, kSmall / (8 * n), [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t layer = task / n, i = task % n;
        const double *k_s = k + 2 * layer * parts * size + i * stride, *k_t = k_s + parts * size;
        loss[task] = sp_row(x, i, k_s, k_t, x.weights ? h_data + layer * n * n : nullptr);
      }
    });
    for (int64_t i = 0; i < x.count * n; ++i) total += loss[i];
    if (x.weights) {
      T* w = static_cast<T*>(x.weights);
      parallel(pool, x.count * n, kSmall / (2 * n), [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
          const double* from = h_data + task / n * n * n;
          for (int64_t i = task % n, j = 0; j < n; ++j) w[task * n + j] = static_cast<T>(from[i * n + j] + from[j * n + i]);
        }
      });
    }
  }
  *static_cast<T*>(x.loss) = static_cast<T>(x.scale * total);
}

// out = finish(W Q) for all columns, in parallel
template <typename T, typename F>
void weighted_rows(const Pool& pool, const T* packed_w, int64_t count, const Rows& q, const F& finish) {
  const int64_t slice = weighted_slice(q.count + count), tasks = (q.width + slice - 1) / slice;
  parallel(pool, tasks, kProducts / (q.count * count * slice + 1), [&](int64_t begin, int64_t end) {
    Buffer<T> scratch(weighted_scratch<T>(count, q.count, slice));
    for (int64_t task = begin; task < end; ++task)
      weighted_sum<T>(packed_w, count, q, task * slice, least(slice, q.width - task * slice), scratch, finish);
  });
}

template <typename T>
void sp_backward_as(const SpGram& x, const Pool& pool) {
  const int64_t n = x.batch;
  Buffer<T> packed(round_up(n, kTall) * n);
  const T grad = *static_cast<const T*>(x.grad);
  for (int64_t i = 0; i < x.count; ++i) {
    const SpLayer& layer = x.layers[i];
    const T* w = static_cast<const T*>(x.weights) + i * n * n;
    pack_weights<T>(n, n, [&](int64_t r, int64_t k) { return w[r * n + k] * grad; }, packed);
    weighted_rows<T>(pool, packed, n, layer.student, [&](int64_t row, int64_t column, int64_t width, const T* values) {
      store<T>(layer.student.type, layer.out, row * layer.student.width + column, width, values);
    });
  }
}

template <typename T>
void inverse_norms(const Rows& q, const Pool& pool, T* out) {
  parallel(pool, q.count, kSmall / (q.width + 1), [&](int64_t begin, int64_t end) {
    Buffer<T> buffer(q.width);
    for (int64_t i = begin; i < end; ++i) {
      const T* x = load<T>(q.type, q.data, i * q.stride, q.width, buffer);
      double sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t k = 0; k < q.width; ++k) sum += double(x[k]) * double(x[k]);
      const double norm = std::sqrt(sum);
      out[i] = static_cast<T>(1 / (norm < kCosineEps ? kCosineEps : norm));
    }
  });
}

template <typename T>
void cosine_forward_as(const Cosine& x, const Pool& pool) {
  const int64_t n = x.a.count, m = x.b.count, stride = round_up(m, kTile);
  T *inverse_a = static_cast<T*>(x.inverse_a), *inverse_b = static_cast<T*>(x.inverse_b);
  T* similarity = static_cast<T*>(x.similarity);
  inverse_norms(x.a, pool, inverse_a);
  inverse_norms(x.b, pool, inverse_b);
  if (m == 0) return;
  const int64_t threads = n * m * x.a.width < 2 * kProducts ? 1 : pool.threads;
  const int64_t step = round_up((n + threads - 1) / threads, kTile);
  parallel(pool, step ? (n + step - 1) / step : 0, 1, [&](int64_t begin, int64_t end) {
    Buffer<double> products(step * stride);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task * step, count = least(step, n - first);
      inner_products<T>(x.a, first, count, x.b, false, 0, x.a.width, products, stride);
      for (int64_t i = 0; i < count; ++i)
        for (int64_t j = 0; j < m; ++j)
          similarity[(first + i) * m + j] =
              static_cast<T>(products[i * stride + j] * double(inverse_a[first + i]) * double(inverse_b[j]));
    }
  });
}

// One side of the backward pass: out_i = inverse_i (sum_k W_ik q_k - inner_i inverse_i x_i)
template <typename T, typename F>
void cosine_side(const Pool& pool, const F& weight, const Rows& q, const Rows& x, const T* inverse, const double* inner,
                 void* out) {
  Buffer<T> packed(round_up(x.count, kTall) * q.count);
  pack_weights<T>(x.count, q.count, weight, packed);
  const T* w = packed;
  weighted_rows<T>(pool, w, x.count, q, [&](int64_t row, int64_t column, int64_t width, T* values) {
    T buffer[512];  // weighted_slice() is no more
    const T* own = load<T>(x.type, x.data, row * x.stride + column, width, buffer);
    // below the eps the norm is a constant, so nothing is projected out
    const T i = inverse[row], along = i >= T(1 / kCosineEps) ? T(0) : static_cast<T>(inner[row]) * i;
#pragma omp simd
    for (int64_t k = 0; k < width; ++k) values[k] = (values[k] - along * own[k]) * i;
    store<T>(x.type, out, row * x.width + column, width, values);
  });
}

template <typename T>
void cosine_backward_as(const Cosine& x, const Pool& pool) {
  const int64_t n = x.a.count, m = x.b.count;
  const T *grad = static_cast<const T*>(x.grad), *similarity = static_cast<const T*>(x.similarity);
  const T *inverse_a = static_cast<const T*>(x.inverse_a), *inverse_b = static_cast<const T*>(x.inverse_b);
  Buffer<double> inner(n + m);
  double *inner_a = inner, *inner_b = inner_a + n;
  for (int64_t i = 0; i < n + m; ++i) inner_a[i] = 0;
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < m; ++j) {
      const double product = double(grad[i * m + j]) * double(similarity[i * m + j]);
      inner_a[i] += product;
      inner_b[j] += product;
    }
  cosine_side<T>(
      pool, [&](int64_t i, int64_t j) { return grad[i * m + j] * inverse_b[j]; }, x.b, x.a, inverse_a, inner_a, x.grad_a);
  cosine_side<T>(
      pool, [&](int64_t j, int64_t i) { return grad[i * m + j] * inverse_a[i]; }, x.a, x.b, inverse_b, inner_b, x.grad_b);
}

}  // namespace

void sp_forward(const SpGram& x, bool fp64, const Pool& pool) {
  fp64 ? sp_forward_as<double>(x, pool) : sp_forward_as<float>(x, pool);
}

void sp_backward(const SpGram& x, bool fp64, const Pool& pool) {
  fp64 ? sp_backward_as<double>(x, pool) : sp_backward_as<float>(x, pool);
}

void cosine_forward(const Cosine& x, bool fp64, const Pool& pool) {
  fp64 ? cosine_forward_as<double>(x, pool) : cosine_forward_as<float>(x, pool);
}

void cosine_backward(const Cosine& x, bool fp64, const Pool& pool) {
  fp64 ? cosine_backward_as<double>(x, pool) : cosine_backward_as<float>(x, pool);
}

}  // namespace KD_ISA
}  // namespace kd
