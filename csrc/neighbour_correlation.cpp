// neighbour_correlation on the CPU, one row after the other: the differences of the rows before are kept, so that a
// thread reads every number once.
#include "neighbour_correlation.h"

#include "cpu.h"

namespace kd {
namespace KD_ISA {
namespace {

constexpr int64_t kSmall = 1 << 15;  // numbers that are not worth a second thread

// Rows of s - t, made one after the other in a ring of COUNT.
template <typename T, int COUNT>
class Differences {
 public:
  explicit Differences(const LogitPair& x) : x_(x), buffer_((COUNT + 2) * x.classes) {}

  T* at(int64_t row) const { return buffer_ + (row + COUNT) % COUNT * x_.classes; }
  const T* student(int64_t row) const {
    return load<T>(x_.student_type, x_.student, row * x_.student_stride, x_.classes, buffer_ + COUNT * x_.classes);
  }
  const T* teacher(int64_t row) const {
    return load<T>(x_.teacher_type, x_.teacher, row * x_.teacher_stride, x_.classes,
                   buffer_ + (COUNT + 1) * x_.classes);
  }

  // The row's; zeros before the first row and behind the last
  void make(int64_t row) const {
    const int64_t n = x_.classes;
    T* d = at(row);
    if (row < 0 || row >= x_.rows) {
      std::memset(d, 0, static_cast<size_t>(n) * sizeof(T));
      return;
    }
    const T *s = student(row), *t = teacher(row);
#pragma omp simd
    for (int64_t k = 0; k < n; ++k) d[k] = s[k] - t[k];
  }

 private:
  const LogitPair& x_;
  Buffer<T> buffer_;
};

// <|a|, |s - t|>, and d = s - t
template <typename T>
double product(const T* a, const T* s, const T* t, int64_t n, T* d) {
  double sum = 0;
  for (int64_t begin = 0; begin < n; begin += kChunk) {
    const int64_t end = min(n, begin + kChunk);
    T part = 0;
#pragma omp simd reduction(+ : part)
    for (int64_t k = begin; k < end; ++k) {
      d[k] = s[k] - t[k];
      part += std::fabs(a[k]) * std::fabs(d[k]);
    }
    sum += part;
  }
  return sum;
}

inline double pairs(const LogitPair& x) { return double(max<int64_t>(x.rows - 1, 1)); }

template <typename T>
void forward(const NeighbourForward& x, const Pool& pool) {
  const int64_t count = max<int64_t>(x.rows - 1, 0);
  Buffer<double> products(count);
  double *row_products = products, sum = 0;
  parallel(pool, count, kSmall / (x.classes + 1), [&](int64_t begin, int64_t end) {
    const Differences<T, 2> rows(x);
    rows.make(begin);
    for (int64_t i = begin; i < end; ++i)
      row_products[i] = product(rows.at(i), rows.student(i + 1), rows.teacher(i + 1), x.classes, rows.at(i + 1));
  });
  for (int64_t i = 0; i < count; ++i) sum += row_products[i];
  *static_cast<T*>(x.loss) = static_cast<T>(sum / pairs(x));
}

// out = factor sign(b) (|a| + |c|), the slope of |0| and |NaN| being 0
template <typename T>
void gradient(const T* a, const T* b, const T* c, int64_t n, T factor, T* out) {
#pragma omp simd
  for (int64_t k = 0; k < n; ++k) {
    const T sides = factor * (std::fabs(a[k]) + std::fabs(c[k]));
    out[k] = (b[k] > 0 ? T(1) : b[k] < 0 ? T(-1) : T(0)) * sides;
  }
}

template <typename T>
void backward(const NeighbourBackward& x, const Pool& pool) {
  const int64_t n = x.classes;
  const T factor = static_cast<T>(double(*static_cast<const T*>(x.grad)) / pairs(x));
  parallel(pool, x.rows, kSmall / (n + 1), [&](int64_t begin, int64_t end) {
    const Differences<T, 3> rows(x);
    Buffer<T> converted(n);
    rows.make(begin - 1);
    rows.make(begin);
    for (int64_t i = begin; i < end; ++i) {
      rows.make(i + 1);
      T* out = destination<T>(x.student_type, x.out, i * n, converted);
      gradient(rows.at(i - 1), rows.at(i), rows.at(i + 1), n, factor, out);
      store<T>(x.student_type, x.out, i * n, n, out);
    }
  });
}

}  // namespace
}  // namespace KD_ISA

template <>
void compute<Isa::KD_ISA>(const NeighbourForward& x, const Pool& pool) {
  x.fp64 ? KD_ISA::forward<double>(x, pool) : KD_ISA::forward<float>(x, pool);
}

template <>
void compute<Isa::KD_ISA>(const NeighbourBackward& x, const Pool& pool) {
  x.fp64 ? KD_ISA::backward<double>(x, pool) : KD_ISA::backward<float>(x, pool);
}

}  // namespace kd
