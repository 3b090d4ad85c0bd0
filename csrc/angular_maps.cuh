// What angular_margin.cu does on the small maps of a sample, by the threads of a block.
#pragma once

#include "energy.cuh"

namespace kd {
namespace cuda {
namespace {

constexpr int kMaps = 9;  // numbers per pixel in the workspace: r and three maps of both networks, h

struct Constants {
  double margin, sharpness, local_weight;
};

// The maps of one sample in the scratch memory; student first. Every pixel belongs to one thread throughout, so that
// nothing but the sums needs a barrier.
template <typename T>
struct Maps {
  T *r[2], *g[2], *u[2], *w[2], *h;
  int64_t pixels;
  __device__ Maps(const Scratch& scratch, int64_t offset, int64_t pixels)
      : h(scratch.map<T>(8) + offset), pixels(pixels) {
    for (int i = 0; i < 2; ++i) {
      r[i] = scratch.map<T>(i) + offset;
      g[i] = scratch.map<T>(2 + 3 * i) + offset;
      u[i] = scratch.map<T>(3 + 3 * i) + offset;
      w[i] = scratch.map<T>(4 + 3 * i) + offset;
    }
  }
  __device__ const T* branch(int network, int i) const {
    return i == 0 ? g[network] : i == 1 ? u[network] : w[network];
  }
};

template <typename T>
__device__ void make_maps(const Constants& c, const Maps<T>& maps, int network, double norm) {
  const T s = static_cast<T>(c.sharpness), m = static_cast<T>(c.margin);
  const T length = static_cast<T>(norm) + T(kEnergyEps);
  const T* r = maps.r[network];
  for (int64_t n = threadIdx.x; n < maps.pixels; n += blockDim.x) {
    // 1 - q without its rounding: never 0
    const T w = static_cast<T>((norm - r[n] + kEnergyEps) / (norm + kEnergyEps));
    const T u = cos(m * acos(clamp_cosine(r[n] / length)));
    maps.w[network][n] = w;
    maps.u[network][n] = u;
    maps.g[network][n] = angular_log(s, w, u);
  }
}

// The student's dG/dq, du/dq or dw/dq at a pixel.
template <typename T>
__device__ T slope(const Constants& c, const Maps<T>& maps, int branch, int64_t n, double norm) {
  if (branch == 2) return -1;
  const T m = static_cast<T>(c.margin), q = maps.r[0][n] / (static_cast<T>(norm) + T(kEnergyEps));
  const T theta = acos(clamp_cosine(q));
  const T du = q > T(1 - kClamp) ? T(0) : m * sin(m * theta) / sin(theta);
  return branch == 1 ? du : angular_log_slope(static_cast<T>(c.sharpness), maps.w[0][n], maps.u[0][n], du);
}

// One branch of one region: returns the squared distance of the unit vectors, times `factor`, and adds to h if wanted.
template <typename T>
__device__ double compare(const Constants& c, const MapLayer& layer, const Maps<T>& maps, const Region& region,
                          int branch, double factor, double norm, bool gradient, double* shared) {
  const T *vs = maps.branch(0, branch), *vt = maps.branch(1, branch);
  double norm_s = 0, norm_t = 0, e = 0;
  for (int64_t n = threadIdx.x; n < maps.pixels; n += blockDim.x) {
    if (!region.has(n / layer.width, n % layer.width)) continue;
    norm_s += double(vs[n]) * double(vs[n]);
    norm_t += double(vt[n]) * double(vt[n]);
  }
  norm_s = sqrt(reduce_block(norm_s, shared, 0.0, Add()));
  norm_t = sqrt(reduce_block(norm_t, shared, 0.0, Add()));
  const T length_s = static_cast<T>(unit_length(norm_s)), length_t = static_cast<T>(unit_length(norm_t));
  for (int64_t n = threadIdx.x; n < maps.pixels; n += blockDim.x) {
    if (!region.has(n / layer.width, n % layer.width)) continue;
    const T d = vs[n] / length_s - vt[n] / length_t;
    e += double(d) * double(d);
  }
  e = reduce_block(e, shared, 0.0, Add());
  if (!gradient) return factor * e;
  const T along = static_cast<T>(along_unit(e, norm_s, norm_t)), scale = static_cast<T>(2 * factor / length_s);
  for (int64_t n = threadIdx.x; n < maps.pixels; n += blockDim.x) {
    if (!region.has(n / layer.width, n % layer.width)) continue;
    const T x = vs[n] / length_s, d = x - vt[n] / length_t;
    maps.h[n] += (d - along * x) * scale * slope(c, maps, branch, n, norm);
  }
  return factor * e;
}

// h through q = r / (R + eps) and r: dloss/dA[c, n] = kappa[n] A[c, n]
template <typename T>
__device__ void make_kappa(const Maps<T>& maps, double norm, double* shared, T* kappa) {
  const T* r = maps.r[0];
  const T length = static_cast<T>(norm) + T(kEnergyEps);
  double inner = 0;
  for (int64_t n = threadIdx.x; n < maps.pixels; n += blockDim.x) inner += double(maps.h[n]) * double(r[n] / length);
  inner = reduce_block(inner, shared, 0.0, Add());
  // r / R is 1 where one pixel has all the energy, and nothing may be left of it there; 0 on a dead map
  const double along = norm > 0 ? inner : 0, by = norm > 0 ? norm : 1;
  for (int64_t n = threadIdx.x; n < maps.pixels; n += blockDim.x)
    kappa[n] = static_cast<T>(2 * (maps.h[n] - along * (r[n] / by)) / length);
}

}  // namespace
}  // namespace cuda
}  // namespace kd
