// angular_margin on the CPU: one task per sample, which reads each activation once and does the rest in its cache.
#include "angular_margin.h"

#include "cpu.h"

namespace kd {
namespace KD_ISA {
namespace {

constexpr double kEnergyEps = 1e-6, kClamp = 1e-7, kPi = 3.14159265358979323846;
constexpr int kTerms = 14;
constexpr int64_t kPixels = 2048;  // whose energies stay in the first cache while the channels go by

template <typename T>
inline T clamp(T q) {  // NaN stays NaN
  const T low = T(-1 + kClamp), high = T(1 - kClamp);
  return q < low ? low : q > high ? high : q;
}

// u(q) = cos(m acos q) and du/dq = m sin(m theta) / sin theta.
template <typename T>
class Margin {
 public:
  explicit Margin(double m) : m_(m) {}
  T u(T q) const { return std::cos(m_ * std::acos(clamp(q))); }
  T slope(T q) const {
    const T theta = std::acos(clamp(q));
    return std::fabs(q) > T(1 - kClamp) ? T(0) : m_ * std::sin(m_ * theta) / std::sin(theta);
  }

 private:
  T m_;
};

// For q in [0, 1] both are analytic: the nearest singularity is at q = -1, so that a polynomial in x = 2 q - 1 converges like
// 5.8^-n, and 14 terms are exact to fp32. It vectorises, which acos, cos and sin do not.
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
  inline float u(float q) const { return horner(u_, clamp(q)); }
  inline float slope(float q) const { return q > float(1 - kClamp) ? 0.0f : horner(slope_, q); }

 private:
  // the coefficients of the powers of x of the polynomial through values at the Chebyshev points
  static void interpolate(const double* values, float* out) {
    double polynomial[kTerms] = {1}, next[kTerms] = {0, 1}, sum[kTerms] = {};  // Chebyshev's k-th, and the one behind it
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

inline double unit_log1p(double y) { return std::log1p(y); }

// log(1 + y) for y in [0, 1] to 1 ulp or so, as 2 atanh of (1 + y - a) / (1 + y + a) with a = 1, or 2 above sqrt 2
inline float unit_log1p(float y) {
  const bool high = y > 0.41421356f;
  const float top = high ? y - 1.0f : y, bottom = high ? y + 3.0f : y + 2.0f;
  const float z = top / bottom, w = z * z;
  float p = 0.1111111111f;
  p = KD_FMA(p, w, 0.1428571429f);
  p = KD_FMA(p, w, 0.2f);
  p = KD_FMA(p, w, 0.3333333333f);
  const float value = 2.0f * KD_FMA(p * w, z, z);
  return high ? value + 0.69314718056f : value;
}

template <typename T>
inline T softplus(T x) {  // linear above 20, as PyTorch's
  const T y = fast_exp(x < 0 ? x : -x);
  return x > 20 ? x : (x > 0 ? x : T(0)) + unit_log1p(y);
}

template <typename T>
inline T sigmoid(T x) {
  const T y = fast_exp(x < 0 ? x : -x);
  return (x < 0 ? y : T(1)) / (1 + y);
}

// r[n] = sum over channels of A[c, n]^2
template <typename T>
void energy(const Activation& a, int64_t sample, int64_t pixels, T* r, T* buffer) {
  const int64_t first = sample * a.channels * pixels;
  if (a.channels_last) {
    for (int64_t n = 0; n < pixels; ++n) {
      const T* x = load<T>(a.type, a.data, first + n * a.channels, a.channels, buffer);
      T sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t c = 0; c < a.channels; ++c) sum += x[c] * x[c];
      r[n] = sum;
    }
    return;
  }
  for (int64_t begin = 0; begin < pixels; begin += kPixels) {
    const int64_t n = min(kPixels, pixels - begin);
    T* out = r + begin;
    for (int64_t k = 0; k < n; ++k) out[k] = 0;
    int64_t c = 0;
    for (; c + 2 <= a.channels; c += 2) {
      const T* x = load<T>(a.type, a.data, first + c * pixels + begin, n, buffer);
      const T* y = load<T>(a.type, a.data, first + (c + 1) * pixels + begin, n, buffer + kPixels);
#pragma omp simd
      for (int64_t k = 0; k < n; ++k) out[k] += x[k] * x[k] + y[k] * y[k];
    }
    if (c < a.channels) {
      const T* x = load<T>(a.type, a.data, first + c * pixels + begin, n, buffer);
#pragma omp simd
      for (int64_t k = 0; k < n; ++k) out[k] += x[k] * x[k];
    }
  }
}

template <typename T>
double sum_of_products(const T* a, const T* b, int64_t n) {
  double sum = 0;
  for (int64_t begin = 0; begin < n; begin += kChunk) {
    T part = 0;
#pragma omp simd reduction(+ : part)
    for (int64_t k = begin; k < min(n, begin + kChunk); ++k) part += a[k] * b[k];
    sum += part;
  }
  return sum;
}

// R = ||r||, by way of r / max r: squares of large energies overflow. A single energy is its own norm, exactly.
template <typename T>
T energy_norm(const T* r, int64_t n) {
  T top = largest(r, n);
  if (top <= 0) return 0;
  double sum = 0;
  for (int64_t begin = 0; begin < n; begin += kChunk) {
    T part = 0;
#pragma omp simd reduction(+ : part)
    for (int64_t k = begin; k < min(n, begin + kChunk); ++k) part += (r[k] / top) * (r[k] / top);
    sum += part;
  }
  return static_cast<T>(std::sqrt(sum) * top);
}

struct Region {
  int64_t top, left, height, width;
  double weight;
};

// One branch (G, u or w) of one region: adds to h and returns ||x - y||^2.
template <typename T>
double branch(const T* vs, const T* vt, const T* slope, const Region& a, int64_t stride, double c, T* x, T* d, T* h) {
  const bool whole = a.width == stride;
  const int64_t rows = whole ? 1 : a.height, n = whole ? a.height * stride : a.width;
  const int64_t first = a.top * stride + a.left;
  double norm_s = 0, norm_t = 0, e = 0;
  for (int64_t i = 0; i < rows; ++i) {
    norm_s += sum_of_products(vs + first + i * stride, vs + first + i * stride, n);
    norm_t += sum_of_products(vt + first + i * stride, vt + first + i * stride, n);
  }
  const T length_s = static_cast<T>(std::sqrt(norm_s) < kUnitEps ? kUnitEps : std::sqrt(norm_s));
  const T length_t = static_cast<T>(std::sqrt(norm_t) < kUnitEps ? kUnitEps : std::sqrt(norm_t));
  for (int64_t i = 0; i < rows; ++i) {
    const T *s = vs + first + i * stride, *t = vt + first + i * stride;
    T *unit = x + i * n, *difference = d + i * n;
#pragma omp simd
    for (int64_t k = 0; k < n; ++k) {
      unit[k] = s[k] / length_s;
      difference[k] = unit[k] - t[k] / length_t;
    }
    e += sum_of_products(difference, difference, n);
  }
  if (h) {
    const T along = static_cast<T>(along_unit(e, std::sqrt(norm_s), std::sqrt(norm_t)));
    const T factor = static_cast<T>(2 * c / length_s);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t at = first + i * stride;
      const T *unit = x + i * n, *difference = d + i * n;
#pragma omp simd
      for (int64_t k = 0; k < n; ++k) h[at + k] += (difference[k] - along * unit[k]) * factor * slope[at + k];
    }
  }
  return e;
}

template <typename T>
double sample_forward(const AngularMarginForward& x, const AngularLayer& layer, int64_t sample, const Margin<T>& margin,
                      T* scratch) {
  const int64_t n = layer.height * layer.width;
  T* part[14];
  for (int i = 0; i < 14; ++i) part[i] = scratch + i * n;
  T *r = part[0], *q = part[1], *maps[2][3] = {{part[2], part[3], part[4]}, {part[5], part[6], part[7]}};
  T *slope[3] = {part[8], part[9], part[10]}, *h = part[11], *buffer = scratch + 14 * n;
  const T s = static_cast<T>(x.sharpness);
  T norm_student = 0;
  for (int network = 1; network >= 0; --network) {  // the student last: its r and q stay for the gradient
    energy(network ? layer.teacher : layer.student, sample, n, r, buffer);
    const T norm = energy_norm(r, n), length = norm + T(kEnergyEps);
    norm_student = norm;
    T *g = maps[network][0], *u = maps[network][1], *w = maps[network][2];
    const bool slopes = network == 0 && x.kappa;
    T *dg = slope[0], *du = slope[1], *dw = slope[2];
    const Margin<T> m = margin;
#pragma omp simd
    for (int64_t k = 0; k < n; ++k) {
      q[k] = r[k] / length;
      w[k] = (norm - r[k] + T(kEnergyEps)) / length;  // 1 - q without its rounding: never 0
      u[k] = m.u(q[k]);
      g[k] = -softplus(s * (w[k] - u[k]));
    }
    if (slopes) {
#pragma omp simd
      for (int64_t k = 0; k < n; ++k) {
        du[k] = m.slope(q[k]);
        dw[k] = -1;
        dg[k] = s * sigmoid(s * (w[k] - u[k])) * (du[k] + 1);
        h[k] = 0;
      }
    }
  }
  const int64_t hh = layer.height / 2, ww = layer.width / 2;
  const Region regions[5] = {{0, 0, layer.height, layer.width, 1 - x.local_weight},
                             {0, 0, hh, ww, x.local_weight / 4},
                             {0, ww, hh, layer.width - ww, x.local_weight / 4},
                             {hh, 0, layer.height - hh, ww, x.local_weight / 4},
                             {hh, ww, layer.height - hh, layer.width - ww, x.local_weight / 4}};
  double loss = 0;
  for (int i = 0; i < (x.local_weight != 0 ? 5 : 1); ++i) {
    const Region& a = regions[i];
    const double c = layer.factor * a.weight / (3.0 * double(a.height * a.width));
    double e = 0;
    for (int v = 0; v < 3; ++v)
      e += branch(maps[0][v], maps[1][v], slope[v], a, layer.width, c, part[12], part[13], x.kappa ? h : nullptr);
    loss += c * e;
  }
  if (x.kappa) {
    T* kappa = static_cast<T*>(x.kappa) + layer.kappa_offset + sample * n;
    const double inner = sum_of_products(h, q, n);
    // r / R is 1 where one pixel has all the energy, and nothing may be left of it there; 0 on a dead map
    const T along = norm_student > 0 ? static_cast<T>(inner) : T(0), by = norm_student > 0 ? norm_student : T(1);
    const T length = norm_student + T(kEnergyEps);
#pragma omp simd
    for (int64_t k = 0; k < n; ++k) kappa[k] = 2 * (h[k] - along * (r[k] / by)) / length;
  }
  return loss;
}

inline int64_t tasks(const AngularMargin& x) { return x.count * x.batch; }

inline int64_t scratch_size(const AngularMargin& x) {
  int64_t size = 0;
  for (int64_t i = 0; i < x.count; ++i) {
    const AngularLayer& l = x.layers[i];
    size = max(size, 14 * l.height * l.width + max<int64_t>(2 * kPixels, max(l.student.channels, l.teacher.channels)));
  }
  return size;
}

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
    Buffer<T> scratch(scratch_size(x));
    each_task(x, begin, end, [&](const AngularLayer& layer, int64_t index, int64_t sample) {
      loss[index * layer.batch + sample] = sample_forward<T>(x, layer, sample, margin, scratch);
    });
  });
  reduce<T>(x, loss);
}

template <typename T>
void sample_backward(const AngularMarginBackward& x, const AngularLayer& layer, int64_t index, int64_t sample, T* scratch) {
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
