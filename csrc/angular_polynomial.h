// u(q) = cos(m acos q) and its slope du/dq = m sin(m theta) / sin theta as polynomials: u(q) = u(0) + q v(q), which has
// all its digits where q is small, as u(0) is 0 for m = 1 and a map of such u becomes a unit vector. For q in [0, 1] v
// and the slope are analytic: the nearest singularity is at q = -1, so that polynomials in x = 2 q - 1 converge like
// 5.8^-n. acos, cos and sin do not vectorise, and on GPUs take a multiple of the time.
#pragma once

#include "arithmetic.h"

namespace kd {
namespace KD_ISA {
namespace {

constexpr double kPi = 3.14159265358979323846;

// The coefficients of the powers of x, of polynomials through the values at the Chebyshev points. Exact to fp32 with 14
// terms, to fp64 with 24.
template <typename T, int kTerms>
struct AngularPolynomial {
  T at_0, v[kTerms], slope[kTerms];

  explicit AngularPolynomial(double m) : at_0(static_cast<T>(m == 1 ? 0 : std::cos(m * kPi / 2))) {
    double cosines[kPeriod], values[kTerms], slopes[kTerms];
    for (int i = 0; i < kPeriod; ++i) cosines[i] = std::cos(2 * kPi * i / kPeriod);
    for (int j = 0; j < kTerms; ++j) {
      const double q = (cosines[2 * j + 1] + 1) / 2, theta = std::acos(q);
      // (cos(m theta) - cos(m pi / 2)) / q without a difference
      values[j] = 2 * std::sin(m * (theta + kPi / 2) / 2) * std::sin(m * std::asin(q) / 2) / q;
      slopes[j] = m * std::sin(m * theta) / std::sin(theta);
    }
    interpolate(cosines, values, v);
    interpolate(cosines, slopes, slope);
  }

 private:
  static constexpr int kPeriod = 4 * kTerms;  // point j is cosines[2 j + 1]

  static void interpolate(const double* cosines, const double* values, T* out) {
    double polynomial[kTerms] = {1}, next[kTerms] = {0, 1};  // Chebyshev's k-th, and the one behind it
    double sum[kTerms] = {}, first = 0;
    for (int k = 0; k < kTerms; ++k) {
      double c = 0;
      for (int j = 0; j < kTerms; ++j) c += values[j] * cosines[k * (2 * j + 1) % kPeriod];
      c *= (k ? 2.0 : 1.0) / kTerms;
      first = k ? first : std::fabs(c);
      if (std::fabs(c) < 2e-16 * first) c = 0;  // rounding, which the powers' coefficients would multiply by 2^k
      for (int i = 0; i < kTerms; ++i) sum[i] += c * polynomial[i];
      for (int i = kTerms - 1; i >= 0; --i) {  // downwards: next[i - 1] is still the old one
        const double after = (i ? 2 * next[i - 1] : 0) - polynomial[i];
        polynomial[i] = next[i];
        next[i] = after;
      }
    }
    for (int i = 0; i < kTerms; ++i) out[i] = static_cast<T>(sum[i]);
  }
};

}  // namespace
}  // namespace KD_ISA
}  // namespace kd
