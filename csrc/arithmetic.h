// Scalar arithmetic, the same on the CPU and on CUDA: both compile these functions, each into a namespace of its own.
// That of softmax_kl is in softmax_kl_row.h.
#pragma once

#include <cmath>

#include "energy.h"
#include "gram.h"
#ifdef __CUDACC__
#include "device.cuh"
#else
#include "numbers.h"
#endif

namespace kd {
namespace KD_ISA {
namespace {

// On NaN both return a.
template <typename T>
KD_BOTH inline T min(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
KD_BOTH inline T max(T a, T b) {
  return a < b ? b : a;
}

KD_BOTH inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
KD_BOTH inline int64_t round_up(int64_t n, int64_t to) { return ceil_div(n, to) * to; }

// ---- gram ----

constexpr double kCosineEps = 1e-8;

// NaN stays NaN, and a row whose square overflowed has no direction either: 0 would be taken for one
KD_BOTH inline double inverse_norm(double square) {
  return square == HUGE_VAL ? double(NAN) : 1 / max(std::sqrt(square), kCosineEps);
}

// The part of a cosine's gradient along its own row. Below the eps the norm is a constant, so nothing is projected out.
template <typename T>
KD_BOTH inline T along_row(double inner, T inverse) {
  return inverse >= T(1 / kCosineEps) ? T(0) : static_cast<T>(inner) * inverse;
}

struct RowNorm {
  double norm, divisor;
  KD_BOTH RowNorm(double norm, double eps) : norm(norm), divisor(max(norm, eps)) {}
};

// The gradient of a student's row of K through the row's normalisation, number by number: r is the gradient at
// g = k / divisor, and inner = <r, g>.
struct ThroughRowNorm {
  double along, divisor;
  bool dead, l1;

  KD_BOTH ThroughRowNorm(const RowNorm& n, double inner, const SpOptions& options)
      : along(n.norm < options.eps ? 0 : inner),  // below eps the norm is a constant
        divisor(n.divisor),
        dead(n.norm == 0 && !options.zero_row_grad),  // an all-zero row has no direction to normalise
        l1(options.l1) {}

  KD_BOTH double operator()(double r, double k) const {
    const double direction = l1 ? (k > 0) - (k < 0) : k / divisor;
    return dead ? 0 : (r - along * direction) / divisor;
  }
};

// ---- energy ----

constexpr double kUnitEps = 1e-12;

// The slope of |x|; NaN stays NaN
template <typename T>
KD_BOTH inline T sign(T x) {
  return x > 0 ? T(1) : x < 0 ? T(-1) : x;
}

KD_BOTH inline double unit_length(double norm) { return max(norm, kUnitEps); }

// <x, D> of x = v_s / |v_s| and D = x - v_t / |v_t|, given e = |D|^2: e / 2 for unit vectors. Under the clamp of the
// norms (a dead map, or a region of one bright pixel) a vector is shorter than 1, and the student's norm is a constant.
KD_BOTH inline double along_unit(double e, double norm_s, double norm_t) {
  if (norm_s < kUnitEps) return 0;
  const double of_1 = norm_t < kUnitEps ? norm_t / kUnitEps : 1;
  return (e + 1 - of_1 * of_1) / 2;
}

// ---- angular_margin: r channel energy, R its norm, q = r / (R + eps), w = 1 - q, u = cos(m acos q) ----

constexpr double kEnergyEps = 1e-6, kClamp = 1e-7;

template <typename T>
KD_BOTH inline T clamp_cosine(T q) {  // NaN stays NaN
  const T low = T(-1 + kClamp), high = T(1 - kClamp);
  return q < low ? low : q > high ? high : q;
}

template <typename T>
KD_BOTH inline T softplus(T x) {  // linear where the rest is under its rounding; PyTorch's is above 20
  const T y = fast_exp(x < 0 ? x : -x);
  return x > T(sizeof(T) == 4 ? 20 : 40) ? x : (x > 0 ? x : T(0)) + unit_log1p(y);
}

template <typename T>
KD_BOTH inline T sigmoid(T x) {
  const T y = fast_exp(x < 0 ? x : -x);
  return (x < 0 ? y : T(1)) / (1 + y);
}

// G = -softplus(s (w - u)), and dG/dq, du being du/dq
template <typename T>
KD_BOTH inline T angular_log(T sharpness, T w, T u) {
  return -softplus(sharpness * (w - u));
}
template <typename T>
KD_BOTH inline T angular_log_slope(T sharpness, T w, T u, T du) {
  return sharpness * sigmoid(sharpness * (w - u)) * (du + 1);
}

// Region 0 is the whole map; 1 to 4 are its quadrants.
struct Region {
  int64_t top, left, height, width;
  double weight;
  KD_BOTH bool has(int64_t row, int64_t column) const {
    return row >= top && row < top + height && column >= left && column < left + width;
  }
};

KD_BOTH inline int regions(double local_weight) { return local_weight != 0 ? 5 : 1; }

KD_BOTH inline Region region(int i, int64_t height, int64_t width, double local_weight) {
  if (i == 0) return {0, 0, height, width, 1 - local_weight};
  const int64_t h = height / 2, w = width / 2;
  const bool below = i > 2, right = i % 2 == 0;
  return {below ? h : 0, right ? w : 0, below ? height - h : h, right ? width - w : w, local_weight / 4};
}

// A region's mean of squares, of one of three branches, times the layer's factor
KD_BOTH inline double region_factor(double factor, const Region& a) {
  return factor * a.weight / (3.0 * double(a.height * a.width));
}

}  // namespace
}  // namespace KD_ISA
}  // namespace kd
