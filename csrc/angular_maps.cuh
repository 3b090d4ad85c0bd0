// What angular_margin.cu does on the small maps of a sample, by the threads of a block.
//
// A pixel is one thread's throughout, so that only sums need barriers. With quadrants each warp has pixels of one of
// them, every fourth warp of the same: what a thread sums is its quadrant's, and the quadrants are the whole map.
#pragma once

#include "angular_polynomial.h"
#include "energy_maps.cuh"

namespace kd {
namespace cuda {
namespace {

constexpr int kMaps = 6;      // numbers per pixel: r, u and G of both networks
constexpr int kBranches = 3;  // G, u, w
constexpr int kRegions = 5;
constexpr int kWarps = kMostThreads / 32;

template <typename T>
struct Constants {
  AngularPolynomial<T, sizeof(T) == 4 ? 14 : 24> polynomial;
  T sharpness;
  double local_weight;
  explicit Constants(const AngularMarginForward& x)
      : polynomial(x.margin), sharpness(static_cast<T>(x.sharpness)), local_weight(x.local_weight) {}
};

template <typename T, int kTerms>
__device__ inline T horner(const T (&c)[kTerms], T q) {
  const T x = 2 * q - 1;
  T p = c[kTerms - 1];
#pragma unroll
  for (int i = kTerms - 2; i >= 0; --i) p = p * x + c[i];
  return p;
}

// Which pixels of a region are this thread's.
class Pixels {
 public:
  __device__ Pixels(const Region& a, int width, int member, int team)
      : member_(member), team_(team), count_(static_cast<int>(a.height * a.width)), width_(static_cast<int>(a.width)) {
    const int by = max(width_, 1);
    first_column_ = member % by;
    first_ = (static_cast<int>(a.top) + member / by) * width + static_cast<int>(a.left) + first_column_;
    step_column_ = team % by;
    step_ = team / by * width + step_column_;
    next_row_ = width - width_;
  }
  template <typename F>
  __device__ void each(const F& f) const {
    int n = first_, column = first_column_;
    for (int i = member_; i < count_; i += team_) {
      f(n);
      n += step_;
      column += step_column_;
      if (column >= width_) {
        column -= width_;
        n += next_row_;
      }
    }
  }

 private:
  int member_, team_, count_, width_, first_column_, first_, step_column_, step_, next_row_;
};

// Of one region and branch: the unit vectors are v / length, and dloss/dv is scale (D - along x)
template <typename T>
struct Unit {
  Divisor<T> length_s, length_t;
  T along, scale;
};

// What the threads of a block tell each other.
template <typename T>
struct Board {
  double block_sums[2 * 32];
  T warp_sums[kWarps][2 * kBranches];
  Unit<T> units[kRegions][kBranches];
  double losses[kRegions * kBranches];
};

// A network's maps of one sample: r and what is made of it. w is made from r whenever it is needed.
template <typename T>
struct Map {
  T *r, *u, *g;
  T value, rest, inverse;  // of R + eps, and 1 / (R + eps)
  __device__ void set(const Norm<T>& norm) {
    value = norm.value;
    rest = norm.rest + T(kEnergyEps);
    inverse = T(1) / (value + rest);
  }
  __device__ T q(T energy) const { return energy * inverse; }
  __device__ T w(T energy) const { return ((value - energy) + rest) * inverse; }  // 1 - q without its rounding
};

template <typename T>
class AngularSample {
 public:
  __device__ AngularSample(const Sample& at, const Constants<T>& constants, T* maps, Board<T>& board)
      : at_(at),
        constants_(constants),
        board_(board),
        local_(constants.local_weight != 0),
        quadrant_(local_ ? 1 + threadIdx.x / 32 % 4 : 0),
        pixels_(region(quadrant_, at.layer.height, at.layer.width, constants.local_weight), at.layer.width,
                local_ ? threadIdx.x / 128 * 32 + threadIdx.x % 32 : threadIdx.x, blockDim.x / (local_ ? 4 : 1)) {
    for (int k = 0; k < 2; ++k) {
      maps_[k].r = maps + k * at.pixels;
      maps_[k].u = maps + (2 + k) * at.pixels;
      maps_[k].g = maps + (4 + k) * at.pixels;
    }
  }

  // r and R
  __device__ void energies(const T* sums) {
    double squares[2] = {};
    pixels_.each([&](int n) {
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const T r = energy_at(sums, at_, k, n);
        maps_[k].r[n] = r;
        squares[k] += double(r) * double(r);
      }
    });
    add_block(squares, board_.block_sums);
    norm_ = Norm<T>(squares[0]);
    maps_[0].set(norm_);
    maps_[1].set(Norm<T>(squares[1]));
  }

  // u and G, and the lengths of all maps
  __device__ void maps() {
    T squares[2 * kBranches] = {};
    pixels_.each([&](int n) {
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const Map<T>& of = maps_[k];
        const T r = of.r[n], w = of.w(r), q = clamp_cosine(of.q(r));
        const T u = horner(constants_.polynomial.v, q) * q + constants_.polynomial.at_0;
        const T g = angular_log(constants_.sharpness, w, u);
        of.u[n] = u;
        of.g[n] = g;
        squares[kBranches * k] += g * g;
        squares[kBranches * k + 1] += u * u;
        squares[kBranches * k + 2] += w * w;
      }
    });
    tell(squares);
    if (judges()) {
      norm_s_ = sqrt(told(branch()));
      norm_t_ = sqrt(told(kBranches + branch()));
      Unit<T>& unit = board_.units[judged()][branch()];
      unit.length_s = Divisor<T>(static_cast<T>(unit_length(norm_s_)));
      unit.length_t = Divisor<T>(static_cast<T>(unit_length(norm_t_)));
    }
    __syncthreads();
  }

  // The sample's loss, in thread 0
  __device__ double loss() {
    T gaps[2 * kBranches] = {};  // of the whole map, of the quadrant
    pixels_.each([&](int n) {
      T v[2][kBranches];
      values(n, v);
#pragma unroll
      for (int b = 0; b < kBranches; ++b) {
        const T d = difference(board_.units[0][b], v[0][b], v[1][b]);
        gaps[b] += d * d;
        if (!local_) continue;
        const T own = difference(board_.units[quadrant_][b], v[0][b], v[1][b]);
        gaps[kBranches + b] += own * own;
      }
    });
    tell(gaps);
    if (judges()) {
      const double e = told(judged() ? kBranches + branch() : branch());
      const Region a = region(judged(), at_.layer.height, at_.layer.width, constants_.local_weight);
      const double factor = region_factor(at_.layer.factor, a);
      Unit<T>& unit = board_.units[judged()][branch()];
      unit.along = static_cast<T>(along_unit(e, norm_s_, norm_t_));
      unit.scale = static_cast<T>(2 * factor / unit_length(norm_s_));
      board_.losses[threadIdx.x] = factor * e;
    }
    __syncthreads();
    double sum = 0;
    if (threadIdx.x == 0 && at_.pixels)
      for (int i = 0; i < regions(constants_.local_weight) * kBranches; ++i) sum += board_.losses[i];
    return sum;
  }

  // h = dloss/dq, and through q = r / (R + eps) and r: dloss/dA[c, n] = kappa[n] A[c, n]
  __device__ void gradient(T* kappa) {
    T* h = maps_[1].r;  // the teacher's is not needed again
    T inner = 0;
    pixels_.each([&](int n) {
      T v[2][kBranches], slope[kBranches];
      values(n, v);
      const T q = slopes(n, v[0], slope);
      T sum = 0;
#pragma unroll
      for (int b = 0; b < kBranches; ++b) {
        T dv = pull(board_.units[0][b], v[0][b], v[1][b]);
        if (local_) dv += pull(board_.units[quadrant_][b], v[0][b], v[1][b]);
        sum += dv * slope[b];
      }
      h[n] = sum;
      inner += sum * q;
    });
    double total[1] = {inner};
    add_block(total, board_.block_sums);
    // r / R is 1 where one pixel has all the energy, and nothing may be left of it there. On a map that is as good as
    // dead <h, q> is nothing beside h, and 1 / R would overflow
    const bool alive = !(norm_.value < T(1e-30));
    const T along = alive ? static_cast<T>(total[0]) : T(0), scale = 2 * maps_[0].inverse;
    const Divisor<T> norm(alive ? norm_.value : T(1));
    pixels_.each([&](int n) { kappa[n] = (h[n] - along * norm.divide(maps_[0].r[n])) * scale; });
  }

 private:
  // Each of the first threads judges one branch of one region.
  __device__ bool judges() const { return threadIdx.x < regions(constants_.local_weight) * kBranches; }
  __device__ int judged() const { return threadIdx.x / kBranches; }
  __device__ int branch() const { return threadIdx.x % kBranches; }

  __device__ void tell(const T (&x)[2 * kBranches]) {
    for (int k = 0; k < 2 * kBranches; ++k) {
      const T sum = reduce_lanes(x[k], 32, Add());
      if (threadIdx.x % 32 == 0) board_.warp_sums[threadIdx.x / 32][k] = sum;
    }
    __syncthreads();
  }
  __device__ double told(int k) const {  // of the region that this thread judges
    const int first = judged() ? judged() - 1 : 0, step = judged() ? 4 : 1;
    double sum = 0;
    for (int warp = first; warp < int(blockDim.x / 32); warp += step) sum += board_.warp_sums[warp][k];
    return sum;
  }

  __device__ void values(int n, T (&v)[2][kBranches]) const {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      v[k][0] = maps_[k].g[n];
      v[k][1] = maps_[k].u[n];
      v[k][2] = maps_[k].w(maps_[k].r[n]);
    }
  }
  __device__ static T difference(const Unit<T>& unit, T s, T t) {
    return unit.length_s.divide(s) - unit.length_t.divide(t);
  }
  __device__ static T pull(const Unit<T>& unit, T s, T t) {
    const T x = unit.length_s.divide(s), d = x - unit.length_t.divide(t);
    return (d - unit.along * x) * unit.scale;
  }
  // The student's dG/dq, du/dq, dw/dq; returns q
  __device__ T slopes(int n, const T (&v)[kBranches], T (&slope)[kBranches]) const {
    const T q = maps_[0].q(maps_[0].r[n]);
    slope[1] = q > T(1 - kClamp) ? T(0) : horner(constants_.polynomial.slope, q);
    slope[0] = angular_log_slope(constants_.sharpness, v[2], v[1], slope[1]);
    slope[2] = -1;
    return q;
  }

  const Sample& at_;
  const Constants<T>& constants_;
  Board<T>& board_;
  const bool local_;
  const int quadrant_;
  const Pixels pixels_;
  Map<T> maps_[2];
  Norm<T> norm_{0};
  double norm_s_ = 0, norm_t_ = 0;  // of the branch that this thread judges
};

}  // namespace
}  // namespace cuda
}  // namespace kd
