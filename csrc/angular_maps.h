// The angular map of angular_margin.cpp.
#pragma once

#include "angular_polynomial.h"
#include "cpu.h"

namespace kd {
namespace KD_ISA {
namespace {

constexpr int kTerms = 14;

// u(q) = cos(m acos q) and du/dq = m sin(m theta) / sin theta.
template <typename T>
class Margin {
 public:
  explicit Margin(double m) : m_(m) {}
  T u(T q) const { return m_ == 1 ? clamp_cosine(q) : std::cos(m_ * std::acos(clamp_cosine(q))); }
  T slope(T q) const {
    const T theta = std::acos(clamp_cosine(q));
    return std::fabs(q) > T(1 - kClamp) ? T(0) : m_ * std::sin(m_ * theta) / std::sin(theta);
  }

 private:
  T m_;
};

template <>
class Margin<float> {
 public:
  explicit Margin(double m) : polynomial_(m) {}
  inline float u(float q) const {
    const float c = clamp_cosine(q);
    return KD_FMA(horner(polynomial_.v, c), c, polynomial_.at_0);
  }
  inline float slope(float q) const { return q > float(1 - kClamp) ? 0.0f : horner(polynomial_.slope, q); }

 private:
  static inline float horner(const float* c, float q) {
    const float x = KD_FMA(2.0f, q, -1.0f);
    float p = c[kTerms - 1];
    p = KD_FMA(p, x, c[12]);
    p = KD_FMA(p, x, c[11]);
    p = KD_FMA(p, x, c[10]);
    p = KD_FMA(p, x, c[9]);
    p = KD_FMA(p, x, c[8]);
    p = KD_FMA(p, x, c[7]);
    p = KD_FMA(p, x, c[6]);
    p = KD_FMA(p, x, c[5]);
    p = KD_FMA(p, x, c[4]);
    p = KD_FMA(p, x, c[3]);
    p = KD_FMA(p, x, c[2]);
    p = KD_FMA(p, x, c[1]);
    return KD_FMA(p, x, c[0]);
  }
  AngularPolynomial<float, kTerms> polynomial_;
};

}  // namespace
}  // namespace KD_ISA
}  // namespace kd
