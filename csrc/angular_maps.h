// The angular map of angular_margin.cpp as a polynomial.
#pragma once

#include "cpu.h"

namespace kd {
namespace KD_ISA {
namespace {

constexpr double kPi = 3.14159265358979323846;
constexpr int kTerms = 14;

// u(q) = cos(m acos q) and du/dq = m sin(m theta) / sin theta.
template <typename T>
class Margin {
 public:
  explicit Margin(double m) : m_(m) {}
  T u(T q) const { return std::cos(m_ * std::acos(clamp_cosine(q))); }
  T slope(T q) const {
    const T theta = std::acos(clamp_cosine(q));
    return std::fabs(q) > T(1 - kClamp) ? T(0) : m_ * std::sin(m_ * theta) / std::sin(theta);
  }

 private:
  T m_;
};

// For q in [0, 1] both are analytic: the nearest singularity is at q = -1, so that a polynomial in x = 2 q - 1
// converges like 5.8^-n, and 14 terms are exact to fp32. It vectorises, which acos, cos and sin do not.
template <>
class Margin<float> {
 public:
  explicit Margin(double m) {
    double u[kTerms], slope[kTerms];
    for (int j = 0; j < kTerms; ++j) {
      const double theta = std::acos((std::cos(kPi * (j + 0.5) / kTerms) + 1) / 2);
      u[j] = std::cos(m * theta);
      slope[j] = m * std::sin(m * theta) / std::sin(theta);
    }
    interpolate(u, u_);
    interpolate(slope, slope_);
  }
  inline float u(float q) const { return horner(u_, clamp_cosine(q)); }
  inline float slope(float q) const { return q > float(1 - kClamp) ? 0.0f : horner(slope_, q); }

 private:
  // the coefficients of the powers of x of the polynomial through values at the Chebyshev points
  static void interpolate(const double* values, float* out) {
    double polynomial[kTerms] = {1}, next[kTerms] = {0, 1};  // Chebyshev's k-th, and the one behind it
    double sum[kTerms] = {};
    for (int k = 0; k < kTerms; ++k) {
      double c = 0;
      for (int j = 0; j < kTerms; ++j) c += values[j] * std::cos(kPi * k * (j + 0.5) / kTerms);
      c *= (k ? 2.0 : 1.0) / kTerms;
      for (int i = 0; i < kTerms; ++i) sum[i] += c * polynomial[i];
      for (int i = kTerms - 1; i >= 0; --i) {  // downwards: next[i - 1] is still the old one
        const double after = (i ? 2 * next[i - 1] : 0) - polynomial[i];
        polynomial[i] = next[i];
        next[i] = after;
      }
    }
    for (int i = 0; i < kTerms; ++i) out[i] = static_cast<float>(sum[i]);
  }
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
  float u_[kTerms], slope_[kTerms];
};

}  // namespace
}  // namespace KD_ISA
}  // namespace kd
