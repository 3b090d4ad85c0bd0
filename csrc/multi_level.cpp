// multi_level on the CPU: elementwise work in one pass over the rows before PyTorch's products, and one behind them.
#include "multi_level.h"

#include "cpu.h"
#include "softmax_kl_row.h"

namespace kd {
namespace KD_ISA {
namespace {

constexpr int64_t kSmall = 1 << 14;  // logits that are not worth a second thread

// Exponentials of both rows into `a` and `b`, and their sums
template <typename T>
Sums exponentials(const T* s, const T* t, int64_t n, T inverse_t, T* a, T* b) {
  const T s_max = largest(s, n), t_max = largest(t, n);
  Sums total;
  for (int64_t begin = 0; begin < n; begin += kChunk) {
    const int64_t end = min(n, begin + kChunk);
    T zs = 0, zt = 0, cross = 0, gap = 0;
#pragma omp simd reduction(+ : zs, zt, cross, gap)
    for (int64_t k = begin; k < end; ++k) {
      const T x = (s[k] - s_max) * inverse_t, y = (t[k] - t_max) * inverse_t;
      const T es = fast_exp(x), et = fast_exp(y);
      a[k] = es;
      b[k] = et;
      zs += es;
      zt += et;
      cross += et == 0 ? T(0) : et * (y - x);  // a class without teacher probability adds nothing
      gap += divergence_term(y - x, es, et);
    }
    total.s += zs;
    total.t += zt;
    total.cross += cross;
    total.gap += gap;
  }
  return total;
}

template <typename T>
double row_forward(const MultiLevelRows& x, int64_t row, T* buffer) {
  const int64_t n = x.classes;
  const T* s = load<T>(x.student_type, x.student, row * x.student_stride, n, buffer);
  const T* t = load<T>(x.teacher_type, x.teacher, row * x.teacher_stride, n, buffer + n);
  T *a = static_cast<T*>(x.q_s) + row * n, *d = static_cast<T*>(x.difference) + row * n;
  T* middle = static_cast<T*>(x.middle) + row * n;
  const Sums sums = exponentials(s, t, n, static_cast<T>(1 / x.temperature), a, d);
  const T of_s = static_cast<T>(1 / sums.s), of_t = static_cast<T>(1 / sums.t);
#pragma omp simd
  for (int64_t k = 0; k < n; ++k) {
    a[k] *= of_s;
    d[k] *= of_t;
  }
  // a loop of its own: in one with the last, the difference would be fused with the product, and not 0 for equal
  // networks
#pragma omp simd
  for (int64_t k = 0; k < n; ++k) {
    const T difference = d[k] - a[k];
    d[k] = difference;
    middle[k] = a[k] + T(0.5) * difference;
  }
  return divergence(sums, log_ratio(sums));
}

template <typename T>
void forward(const MultiLevelRows& x, const Pool& pool) {
  Buffer<double> rows(x.rows);
  double* of_row = rows;
  parallel(pool, x.rows, kSmall / (x.classes + 1), [&](int64_t begin, int64_t end) {
    Buffer<T> buffer(2 * x.classes);
    for (int64_t row = begin; row < end; ++row) of_row[row] = row_forward<T>(x, row, buffer);
  });
  double sum = 0;
  for (int64_t row = 0; row < x.rows; ++row) sum += of_row[row];
  *static_cast<T*>(x.divergence) = static_cast<T>(sum);
}

template <typename T>
T upstream(T batch, const T* by_batch, T of_class, const T* by_class, int64_t k) {
  return (by_batch ? batch * by_batch[k] : T(0)) + (by_class ? of_class * by_class[k] : T(0));
}

template <typename T>
void row_gradient(const MultiLevelGradient& x, int64_t row) {
  const int64_t n = x.classes;
  const auto of_row = [&](const void* m) { return m ? static_cast<const T*>(m) + row * n : nullptr; };
  const T *q = of_row(x.q_s), *d = of_row(x.difference), *by_batch = of_row(x.by_batch), *by_class = of_row(x.by_class);
  const T kd = static_cast<T>(x.kd), batch = static_cast<T>(x.batch), of_class = static_cast<T>(x.of_class);
  T* out = static_cast<T*>(x.out) + row * n;
  double inner = 0;
  for (int64_t begin = 0; begin < n; begin += kChunk) {
    const int64_t end = min(n, begin + kChunk);
    T part = 0;
#pragma omp simd reduction(+ : part)
    for (int64_t k = begin; k < end; ++k) part += q[k] * upstream(batch, by_batch, of_class, by_class, k);
    inner += part;
  }
  const T along = static_cast<T>(inner);
#pragma omp simd
  for (int64_t k = 0; k < n; ++k)
    out[k] += kd * d[k] + q[k] * (upstream(batch, by_batch, of_class, by_class, k) - along);
}

template <typename T>
void gradient(const MultiLevelGradient& x, const Pool& pool) {
  parallel(pool, x.rows, kSmall / (x.classes + 1), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) row_gradient<T>(x, row);
  });
}

}  // namespace
}  // namespace KD_ISA

template <>
void compute<Isa::KD_ISA>(const MultiLevelRows& x, const Pool& pool) {
  x.fp64 ? KD_ISA::forward<double>(x, pool) : KD_ISA::forward<float>(x, pool);
}

template <>
void compute<Isa::KD_ISA>(const MultiLevelGradient& x, const Pool& pool) {
  x.fp64 ? KD_ISA::gradient<double>(x, pool) : KD_ISA::gradient<float>(x, pool);
}

}  // namespace kd
