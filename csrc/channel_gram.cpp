// channel_gram on the CPU.
#include "channel_gram.h"

#include "cpu.h"

namespace kd {
namespace KD_ISA {
namespace {

constexpr int64_t kSmall = 1 << 14;  // numbers that are not worth a second thread

// The sum of part(begin, end), which is in T, over the row
template <typename F>
double in_chunks(int64_t n, const F& part) {
  double sum = 0;
  for (int64_t begin = 0; begin < n; begin += kChunk) sum += part(begin, min(n, begin + kChunk));
  return sum;
}

template <typename T>
void ickd_row(const IckdRows& x, int64_t row) {
  const int64_t n = x.channels;
  const T *s = static_cast<const T*>(x.student) + row * n, *t = static_cast<const T*>(x.teacher) + row * n;
  double square_s = 0, square_t = 0;  // in double: squares of large features would overflow
#pragma omp simd reduction(+ : square_s, square_t)
  for (int64_t j = 0; j < n; ++j) {
    square_s += double(s[j]) * double(s[j]);
    square_t += double(t[j]) * double(t[j]);
  }
  const double norm_s = std::sqrt(square_s), norm_t = std::sqrt(square_t);
  const bool is_short = norm_s < x.eps;
  const double length_s = is_short ? x.eps : norm_s, length_t = norm_t < x.eps ? x.eps : norm_t;
  const T by_s = static_cast<T>(length_s), by_t = static_cast<T>(length_t);
  const double distance = in_chunks(n, [&](int64_t begin, int64_t end) {
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = begin; j < end; ++j) {
      const T d = s[j] / by_s - t[j] / by_t;  // divisions: fused with a product, equal rows would differ
      sum += d * d;
    }
    return sum;
  });
  // <G_s, 2 D> is |D|^2 for unit rows; a row under the eps is shorter than 1, and its norm is a constant
  const double unit_s = norm_s / length_s, unit_t = norm_t / length_t;
  const double inner = is_short ? 0 : distance + (unit_s * unit_s - unit_t * unit_t);
  const double c = 1 / double(n);
  static_cast<T*>(x.values)[row] = static_cast<T>(c * distance);
  x.of_student[row] = c * (2 - inner) / (length_s * length_s);
  x.of_teacher[row] = c * 2 / (length_s * length_t);
}

// H + H^T without a transposition, as both K are symmetric. In double: it is a small difference where the networks are
// close, and a factor may be out of the range of floats.
template <typename T>
void ickd_matrix_row(const IckdMatrix& x, int64_t row, double* h, double* of_teacher) {
  const int64_t n = x.channels, first = row / n * n;
  const double *a = x.of_student + first, *b = x.of_teacher + first;
  const double a_i = x.of_student[row], b_i = x.of_teacher[row];
  T* s = static_cast<T*>(x.student) + row * n;
  const T* t = static_cast<const T*>(x.teacher) + row * n;
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    h[j] = (a_i + a[j]) * s[j];
    of_teacher[j] = (b_i + b[j]) * t[j];
  }
  // a loop of its own: fused with a product, the difference of equal ones would not be 0
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) s[j] = static_cast<T>(x.factor * (h[j] - of_teacher[j]));
}

template <typename T>
void ickd_rows(const IckdRows& x, const Pool& pool) {
  parallel(pool, x.count * x.channels, kSmall / (x.channels + 1), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) ickd_row<T>(x, row);
  });
}

template <typename T>
void ickd_matrix(const IckdMatrix& x, const Pool& pool) {
  parallel(pool, x.count * x.channels, kSmall / (x.channels + 1), [&](int64_t begin, int64_t end) {
    Buffer<double> h(x.channels), of_teacher(x.channels);
    for (int64_t row = begin; row < end; ++row) ickd_matrix_row<T>(x, row, h, of_teacher);
  });
}

}  // namespace
}  // namespace KD_ISA

template <>
void compute<Isa::KD_ISA>(const IckdRows& x, const Pool& pool) {
  x.fp64 ? KD_ISA::ickd_rows<double>(x, pool) : KD_ISA::ickd_rows<float>(x, pool);
}

template <>
void compute<Isa::KD_ISA>(const IckdMatrix& x, const Pool& pool) {
  x.fp64 ? KD_ISA::ickd_matrix<double>(x, pool) : KD_ISA::ickd_matrix<float>(x, pool);
}

}  // namespace kd
