// angular_margin on the CPU. A task is one layer of one sample: it reads each activation once, the rest is in its
// cache.
#include "angular_margin.h"

#include "angular_maps.h"

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

  static int64_t size(const AngularMargin& x) {  // for any layer
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
double compare(const AngularMarginForward& x, const AngularLayer& layer, const Maps<T>& maps) {
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
double sample_forward(const AngularMarginForward& x, const AngularLayer& layer, int64_t sample, const Margin<T>& margin,
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
  if (x.kappa) make_kappa(maps, n, norm, static_cast<T*>(x.kappa) + layer.kappa_offset + sample * n);
  return loss;
}

inline int64_t tasks(const AngularMargin& x) { return x.count * x.batch; }

// A task is one layer of one sample, the samples outermost: a thread's share has as much of every layer as the others'.
template <typename F>
void each_task(const AngularMargin& x, int64_t begin, int64_t end, const F& f) {
  for (int64_t task = begin; task < end; ++task) {
    const int64_t index = task % x.count;
    const AngularLayer& layer = x.layers[index];
    if (layer.height > 0 && layer.width > 0) f(layer, index, task / x.count);
  }
}

// The samples' losses [count, batch] summed over layers, over samples, over both or over neither
template <typename T>
void reduce(const AngularMarginForward& x, const double* losses) {
  const int64_t layers = x.per_layer ? x.count : 1, samples = x.per_sample ? x.batch : 1;
  Buffer<double> sums(layers * samples);
  double* sum = sums;
  for (int64_t i = 0; i < layers * samples; ++i) sum[i] = 0;
  for (int64_t i = 0; i < x.count; ++i)
    for (int64_t k = 0; k < x.batch; ++k)
      sum[(x.per_layer ? i : 0) * samples + (x.per_sample ? k : 0)] += losses[i * x.batch + k];
  for (int64_t i = 0; i < layers * samples; ++i) static_cast<T*>(x.loss)[i] = static_cast<T>(sum[i]);
}

template <typename T>
void forward(const AngularMarginForward& x, const Pool& pool) {
  const int64_t count = tasks(x);
  Buffer<double> losses(count);
  double* loss = losses;
  for (int64_t i = 0; i < count; ++i) loss[i] = 0;
  const Margin<T> margin(x.margin);
  parallel(pool, count, 1, [&](int64_t begin, int64_t end) {
    Buffer<T> scratch(Maps<T>::size(x));
    each_task(x, begin, end, [&](const AngularLayer& layer, int64_t index, int64_t sample) {
      loss[index * layer.batch + sample] = sample_forward<T>(x, layer, sample, margin, scratch);
    });
  });
  reduce<T>(x, loss);
}

template <typename T>
void sample_backward(const AngularMarginBackward& x, const AngularLayer& layer, int64_t index, int64_t sample,
                     T* scratch) {
  const int64_t n = layer.height * layer.width, channels = layer.student.channels;
  const T grad = static_cast<const T*>(x.grad)[index * x.layer_stride + sample * x.sample_stride];
  const T* kappa = static_cast<const T*>(x.kappa) + layer.kappa_offset + sample * n;
  T* factor = scratch;
  for (int64_t k = 0; k < n; ++k) factor[k] = kappa[k] * grad;
  const bool last = layer.student.channels_last;
  const int64_t rows = last ? n : channels, width = last ? channels : n;
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t at = (sample * rows + i) * width;
    const T* a = load<T>(layer.student.type, layer.student.data, at, width, scratch + n);
    T* out = destination<T>(layer.student.type, layer.out, at, scratch + n + width);
    if (last) {
      const T f = factor[i];
#pragma omp simd
      for (int64_t k = 0; k < width; ++k) out[k] = f * a[k];
    } else {
#pragma omp simd
      for (int64_t k = 0; k < width; ++k) out[k] = factor[k] * a[k];
    }
    store<T>(layer.student.type, layer.out, at, width, out);
  }
}

template <typename T>
void backward(const AngularMarginBackward& x, const Pool& pool) {
  int64_t size = 0;
  for (int64_t i = 0; i < x.count; ++i) {
    const int64_t n = x.layers[i].height * x.layers[i].width;
    size = max(size, n + 2 * max(n, x.layers[i].student.channels));
  }
  parallel(pool, tasks(x), 1, [&](int64_t begin, int64_t end) {
    Buffer<T> scratch(size);
    each_task(x, begin, end, [&](const AngularLayer& layer, int64_t index, int64_t sample) {
      sample_backward<T>(x, layer, index, sample, scratch);
    });
  });
}

}  // namespace

}  // namespace KD_ISA

template <>
void compute<Isa::KD_ISA>(const AngularMarginForward& x, const Pool& pool) {
  x.fp64 ? KD_ISA::forward<double>(x, pool) : KD_ISA::forward<float>(x, pool);
}

template <>
void compute<Isa::KD_ISA>(const AngularMarginBackward& x, const Pool& pool) {
  x.fp64 ? KD_ISA::backward<double>(x, pool) : KD_ISA::backward<float>(x, pool);
}

}  // namespace kd
