// Losses of squared distances, for relation.cpp.
#pragma once

#include "pairs.h"
#include "relation.h"

namespace kd {
namespace KD_ISA {
namespace {

// dloss/dQ = W Q from dloss/dD, D_ij = |q_i - q_j|^2: pairs count twice, and a row is drawn along every difference
inline void through_distances(const Pool& pool, int64_t n, const double* d, double* w) {
  over_symmetrised(pool, n, d, [&](int64_t i, double* both) {
    both[i] = 0;
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < n; ++j) {
      w[i * n + j] = -2 * both[j];
      sum += 2 * both[j];
    }
    w[i * n + i] = sum;
  });
}

// Distances as the losses use them: 0 on the diagonal, elsewhere at least eps, and their roots unless squared
inline void lengths(const Pool& pool, int64_t n, const double* squares, double eps, bool squared, double* out) {
  over_rows(pool, n, 8 * n, [&](int64_t i) {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) {
      const double x = squares[i * n + j] < eps ? eps : squares[i * n + j];  // NaN stays NaN
      out[i * n + j] = squared ? x : std::sqrt(x);
    }
    out[i * n + i] = 0 * squares[i * n + i];
  });
}

// d(length)/d(square); what is clamped is a constant
inline double slope(double square, double length, double eps, bool squared) {
  return square < eps ? 0 : squared ? 1 : 0.5 / length;
}

// The derivative of the smooth L1 of x, whose value is g (x - g / 2)
inline double smooth_l1_slope(double x) { return x < -1 ? -1 : x > 1 ? 1 : x; }

// ---- RKD ----

// Distances over their mean: returns the loss and adds dloss/dD to d
double rkd_distances(const Rkd& x, const double* squares, double* d, const Pool& pool) {
  const int64_t n = x.batch;
  Buffer<double> buffer(2 * n * n + 2 * n);
  double *s = buffer, *t = s + n * n, *row_losses = t + n * n, *row_inner = row_losses + n;
  lengths(pool, n, squares, x.eps, x.squared, s);
  lengths(pool, n, squares + n * n, x.eps, x.squared, t);
  const double pairs = double(n) * double(n - 1), sum_s = total(s, n * n), over_s = pairs / sum_s;
  const double ratio = sum_s / total(t, n * n);  // 1 for equal networks, whose differences are then exactly 0
  over_rows(pool, n, 8 * n, [&](int64_t i) {
    double loss = 0, inner = 0;
#pragma omp simd reduction(+ : loss, inner)
    for (int64_t j = i * n; j < i * n + n; ++j) {
      const double difference = (s[j] - t[j] * ratio) * over_s, g = smooth_l1_slope(difference);
      loss += g * (difference - 0.5 * g);
      inner += g * s[j];
    }
    row_losses[i] = loss;
    row_inner[i] = inner;
  });
  const double weight = x.distance_weight * x.scale;
  if (d) {
    const double through_mean = total(row_inner, n) * over_s * over_s / pairs;
    over_rows(pool, n, 8 * n, [&](int64_t i) {
#pragma omp simd
      for (int64_t j = i * n; j < i * n + n; ++j) {
        const double g = smooth_l1_slope((s[j] - t[j] * ratio) * over_s) * over_s - through_mean;
        d[j] = weight * g * slope(squares[j], s[j], x.eps, x.squared);
      }
    });
  }
  return weight * total(row_losses, n);
}

constexpr double kUnitSquare = 1e-24;  // rows closer than 1e-12 have no direction

// The angles at every row i between the directions to row j and to all rows k, for one j:
// A = (D_ij + D_ik - D_jk) / (2 |ij| |ik|). Returns the loss's part and writes row j of dloss/dD. The angles are stored
// first: fused with the subtraction, equal ones would differ by a rounding. `angles` has room for 2 n.
template <bool GRAD>
double rkd_angle_row(int64_t n, int64_t j, const double* d_s, const double* d_t, const double* r_s, const double* r_t,
                     double* angles, double* d) {
  double loss = 0, *angle = angles, *angle_t = angles + n;
  const double *j_s = d_s + j * n, *j_t = d_t + j * n;
  for (int64_t i = 0; i < n; ++i) {
    const double *i_s = d_s + i * n, *i_t = d_t + i * n, *over_s = r_s + i * n, *over_t = r_t + i * n;
    const double a_s = 0.5 * over_s[j], a_t = 0.5 * over_t[j], ij_s = i_s[j], ij_t = i_t[j];
    double along = 0;
#pragma omp simd
    for (int64_t k = 0; k < n; ++k) {
      angle[k] = a_s * (ij_s + i_s[k] - j_s[k]) * over_s[k];
      angle_t[k] = a_t * (ij_t + i_t[k] - j_t[k]) * over_t[k];
    }
#pragma omp simd reduction(+ : loss, along)
    for (int64_t k = 0; k < n; ++k) {
      const double difference = angle[k] - angle_t[k], g = smooth_l1_slope(difference);
      loss += g * (difference - 0.5 * g);
      if (GRAD) {
        const double through = g * over_s[k];
        along += through - 2 * a_s * g * angle[k];
        d[k] -= a_s * through;
      }
    }
    if (GRAD) d[n + i] += 2 * a_s * along;
  }
  return loss;
}

double rkd_angles(const Rkd& x, const double* squares, double* d, const Pool& pool) {
  const int64_t n = x.batch;
  Buffer<double> buffer(2 * n * n + n);
  double *inverse = buffer, *row_losses = inverse + 2 * n * n;
  over_rows(pool, 2 * n, 16 * n, [&](int64_t i) {
#pragma omp simd
    for (int64_t j = i * n; j < i * n + n; ++j) inverse[j] = squares[j] < kUnitSquare ? 0 : 1 / std::sqrt(squares[j]);
  });
  const double weight = x.angle_weight * x.angle_scale;
  const double *d_t = squares + n * n, *r_t = inverse + n * n;
  over_rows(pool, n, 20 * n * n, [&](int64_t j) {
    Buffer<double> row(2 * n), angles(2 * n);  // by D_jk, and by D_ij
    if (!d) {
      row_losses[j] = rkd_angle_row<false>(n, j, squares, d_t, inverse, r_t, angles, nullptr);
      return;
    }
    for (int64_t k = 0; k < 2 * n; ++k) row[k] = 0;
    row_losses[j] = rkd_angle_row<true>(n, j, squares, d_t, inverse, r_t, angles, row);
    for (int64_t k = 0; k < n; ++k) d[j * n + k] += weight * (row[k] + row[n + k]);
  });
  return weight * total(row_losses, n);
}

void rkd(const Rkd& x, const Pool& pool) {
  const int64_t n = x.batch;
  const double* squares = static_cast<const double*>(x.measures);
  double *loss = static_cast<double*>(x.loss), *w = static_cast<double*>(x.gradient_matrix);
  Buffer<double> gradient(w ? n * n : 0);
  double* d = w ? static_cast<double*>(gradient) : nullptr;
  for (int64_t i = 0; d && i < n * n; ++i) d[i] = 0;
  *loss = n == 1 ? 0 * squares[0] : 0;  // NaN shows
  if (n > 1 && x.distance_weight != 0) *loss += rkd_distances(x, squares, d, pool);
  if (n > 1 && x.angle_weight != 0) *loss += rkd_angles(x, squares, d, pool);
  if (w) through_distances(pool, n, d, w);
}

// ---- IRG ----

struct Top {
  double value, count;
};

// The largest number and how many there are of it; NaN if there is one
inline Top top_of(const double* x, int64_t n) {
  double top = 0, sum = 0, count = 0;
#pragma omp simd reduction(max : top) reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) {
    top = x[i] > top ? x[i] : top;
    sum += 0 * x[i];
  }
#pragma omp simd reduction(+ : count)
  for (int64_t i = 0; i < n; ++i) count += x[i] == top ? 1.0 : 0.0;
  return {top + sum, count};
}

void irg(const Irg& x, const Pool& pool) {
  const int64_t n = x.batch;
  const double* squares = static_cast<const double*>(x.measures);
  double *loss = static_cast<double*>(x.loss), *w = static_cast<double*>(x.gradient_matrix);
  *loss = n == 1 ? 0 * squares[0] : 0;  // NaN shows
  Buffer<double> buffer(3 * n * n + 2 * n);
  double *s = buffer, *t = s + n * n, *d = t + n * n, *row_losses = d + n * n, *row_inner = row_losses + n;
  if (n < 2) {
    if (w && n) w[0] = 0;
    return;
  }
  lengths(pool, n, squares, x.eps, x.squared, s);
  lengths(pool, n, squares + n * n, x.eps, x.squared, t);
  const Top top_s = top_of(s, n * n), top_t = top_of(t, n * n);
  const double over_s = 1 / top_s.value, ratio = top_s.value / top_t.value;
  over_rows(pool, n, 8 * n, [&](int64_t i) {
    double sum = 0, inner = 0;
#pragma omp simd reduction(+ : sum, inner)
    for (int64_t j = i * n; j < i * n + n; ++j) {
      const double difference = (s[j] - t[j] * ratio) * over_s;
      sum += difference * difference;
      inner += 2 * difference * s[j];
    }
    row_losses[i] = sum;
    row_inner[i] = inner;
  });
  *loss = x.scale * total(row_losses, n);
  if (!w) return;
  const double through_top = total(row_inner, n) * over_s * over_s / top_s.count;
  over_rows(pool, n, 8 * n, [&](int64_t i) {
#pragma omp simd
    for (int64_t j = i * n; j < i * n + n; ++j) {
      const double g = 2 * ((s[j] - t[j] * ratio) * over_s) * over_s - (s[j] == top_s.value ? through_top : 0);
      d[j] = x.scale * g * slope(squares[j], s[j], x.eps, x.squared);
    }
  });
  through_distances(pool, n, d, w);
}

}  // namespace
}  // namespace KD_ISA
}  // namespace kd
