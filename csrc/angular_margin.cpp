// angular_margin on the CPU. A task is one layer of one sample: it reads each activation once, the rest is in its
// cache.
#include "angular_margin.h"

#include "angular_maps.h"
#include "energy_maps.h"

namespace kd {
namespace KD_ISA {
namespace {

// The maps of one sample, each of `pixels` numbers
template <typename T>
struct Maps {
  static constexpr int kCount = 14;
  T *r, *q;                           // of one network after the other; the student's stay
  T *student[3], *teacher[3];         // G, u, w
  T* slope[3];                        // of the student's by q
  T *h, *unit, *difference, *buffer;  // h: the loss's gradient by q; buffer: energy()'s

  Maps(T* data, int64_t pixels) {
    const auto next = [&] {
      T* map = data;
      data += pixels;
      return map;
    };
    r = next(), q = next();
    for (T*& map : student) map = next();
    for (T*& map : teacher) map = next();
    for (T*& map : slope) map = next();
    h = next(), unit = next(), difference = next();
    buffer = data;
  }

  static int64_t size(const AngularMarginForward& x) {  // for any layer
    int64_t size = 0;
    for (int64_t i = 0; i < x.count; ++i)
      size = max(size, kCount * x.layers[i].height * x.layers[i].width + energy_buffer(x.layers[i]));
    return size;
  }
};

// q and G, u, w from r; returns R.
template <typename T>
T make_maps(const T* r, int64_t n, const Margin<T>& margin, T sharpness, T* q, T* const* maps) {
  const T norm = energy_norm(r, n), length = norm + T(kEnergyEps);
  const Margin<T> m = margin;
  T *g = maps[0], *u = maps[1], *w = maps[2];
#pragma omp simd
  for (int64_t k = 0; k < n; ++k) {
    q[k] = r[k] / length;
    w[k] = (norm - r[k] + T(kEnergyEps)) / length;  // 1 - q without its rounding: never 0
    u[k] = m.u(q[k]);
    g[k] = angular_log(sharpness, w[k], u[k]);
  }
  return norm;
}

template <typename T>
void make_slopes(const Maps<T>& maps, int64_t n, const Margin<T>& margin, T sharpness) {
  const Margin<T> m = margin;
  const T *q = maps.q, *u = maps.student[1], *w = maps.student[2];
  T *dg = maps.slope[0], *du = maps.slope[1], *dw = maps.slope[2];
#pragma omp simd
  for (int64_t k = 0; k < n; ++k) {
    du[k] = m.slope(q[k]);
    dw[k] = -1;
    dg[k] = angular_log_slope(sharpness, w[k], u[k], du[k]);
  }
}

// A region as runs of pixels that lie one behind the other.
struct Runs {
  int64_t first, count, length, stride;
  Runs(const Region& a, int64_t width)
      : first(a.top * width + a.left),
        count(a.width == width ? 1 : a.height),
        length(a.width == width ? a.height * width : a.width),
        stride(width) {}
  int64_t operator[](int64_t i) const { return first + i * stride; }
};

// One branch (G, u or w) over a region: returns ||x - y||^2 of its unit vectors, and adds the gradient to h unless that
// is null. A function of its own: inlined into its caller, the short loops of quadrants made the whole of a small map a
// tenth slower.
template <typename T>
__attribute__((noinline)) double compare_branch(const T* vs, const T* vt, const T* slope, const Runs& region, double c,
                                                T* unit, T* difference, T* h) {
  const Runs runs = region;
  const int64_t n = runs.length;
  double norm_s = 0, norm_t = 0, e = 0;
  for (int64_t i = 0; i < runs.count; ++i) {
    norm_s += sum_of_products(vs + runs[i], vs + runs[i], n);
    norm_t += sum_of_products(vt + runs[i], vt + runs[i], n);
  }
  norm_s = std::sqrt(norm_s);
  norm_t = std::sqrt(norm_t);
  const T length_s = static_cast<T>(unit_length(norm_s)), length_t = static_cast<T>(unit_length(norm_t));
  for (int64_t i = 0; i < runs.count; ++i) {
    const T *s = vs + runs[i], *t = vt + runs[i];
    T *x = unit + i * n, *d = difference + i * n;
#pragma omp simd
    for (int64_t k = 0; k < n; ++k) {
      x[k] = s[k] / length_s;
      d[k] = x[k] - t[k] / length_t;
    }
    e += sum_of_products(d, d, n);
  }
  if (!h) return e;
  const T along = static_cast<T>(along_unit(e, norm_s, norm_t)), factor = static_cast<T>(2 * c / length_s);
  for (int64_t i = 0; i < runs.count; ++i) {
    const T *x = unit + i * n, *d = difference + i * n, *by_q = slope + runs[i];
    T* out = h + runs[i];
#pragma omp simd
    for (int64_t k = 0; k < n; ++k) out[k] += (d[k] - along * x[k]) * factor * by_q[k];
  }
  return e;
}

// The sample's loss; adds to h if a gradient is wanted.
template <typename T>
double compare(const AngularMarginForward& x, const MapLayer& layer, const Maps<T>& maps) {
  double loss = 0;
  for (int i = 0; i < regions(x.local_weight); ++i) {
    const Region a = region(i, layer.height, layer.width, x.local_weight);
    const Runs runs(a, layer.width);
    const double c = region_factor(layer.factor, a);
    double e = 0;
    for (int v = 0; v < 3; ++v)
      e += compare_branch(maps.student[v], maps.teacher[v], maps.slope[v], runs, c, maps.unit, maps.difference,
                          x.kappa ? maps.h : nullptr);
    loss += c * e;
  }
  return loss;
}

// h through q = r / (R + eps) and r: dloss/dA[c, n] = kappa[n] A[c, n]
template <typename T>
void make_kappa(const Maps<T>& maps, int64_t n, T norm, T* kappa) {
  const T *h = maps.h, *r = maps.r;
  const double inner = sum_of_products(h, maps.q, n);
  // r / R is 1 where one pixel has all the energy, and nothing may be left of it there; 0 on a dead map
  const T along = norm > 0 ? static_cast<T>(inner) : T(0), by = norm > 0 ? norm : T(1);
  const T length = norm + T(kEnergyEps);
#pragma omp simd
  for (int64_t k = 0; k < n; ++k) kappa[k] = 2 * (h[k] - along * (r[k] / by)) / length;
}

template <typename T>
double sample_forward(const AngularMarginForward& x, const MapLayer& layer, int64_t sample, const Margin<T>& margin,
                      T* scratch) {
  const int64_t n = layer.height * layer.width;
  const T sharpness = static_cast<T>(x.sharpness);
  const Maps<T> maps(scratch, n);
  energy(layer.teacher, sample, n, maps.r, maps.buffer);
  make_maps(maps.r, n, margin, sharpness, maps.q, maps.teacher);
  energy(layer.student, sample, n, maps.r, maps.buffer);
  const T norm = make_maps(maps.r, n, margin, sharpness, maps.q, maps.student);
  if (x.kappa) {
    make_slopes(maps, n, margin, sharpness);
    for (int64_t k = 0; k < n; ++k) maps.h[k] = 0;
  }
  const double loss = compare(x, layer, maps);
  if (x.kappa) make_kappa(maps, n, norm, static_cast<T*>(x.kappa) + layer.offset + sample * n);
  return loss;
}

template <typename T>
void forward(const AngularMarginForward& x, const Pool& pool) {
  const Margin<T> margin(x.margin);
  map_loss<T>(x, pool, Maps<T>::size(x), [&](const MapLayer& layer, int64_t sample, T* scratch) {
    return sample_forward<T>(x, layer, sample, margin, scratch);
  });
}

}  // namespace
}  // namespace KD_ISA

template <>
void compute<Isa::KD_ISA>(const AngularMarginForward& x, const Pool& pool) {
  x.fp64 ? KD_ISA::forward<double>(x, pool) : KD_ISA::forward<float>(x, pool);
}

}  // namespace kd
