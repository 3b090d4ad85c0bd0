// The CPU kernels in threads of std::thread, without torch: for ThreadSanitizer, which sees every access of two threads
// that nothing orders. However a call is cut into parts and whoever runs them, the result is the same to the last bit.
#include <cstdio>
#include <vector>

#include "angular_margin.h"
#include "energy.h"
#include "gram.h"
#include "multi_level.h"
#include "neighbour_correlation.h"
#include "nkd.h"
#include "relation.h"
#include "softmax_kl.h"
#include "softmax_pearson.h"
#include "threads.h"

namespace {

// ---- one function per op: forward and backward; S is the student's type ----

constexpr int64_t kRows = 37, kClasses = 700;

template <typename S, typename C>
void set_pair(C& x, const std::vector<S>& s, const std::vector<S>& t) {
  x.rows = kRows, x.classes = kClasses;
  x.student_type = x.teacher_type = kType<S>;
  x.student = s.data(), x.teacher = t.data();
  x.student_stride = x.teacher_stride = kClasses;
}

template <typename T, typename S>
void softmax_kl(const Pool& pool, Written<T>& out) {
  const auto s = wave<S>(kRows * kClasses, 0.1), t = wave<S>(kRows * kClasses, 0.7);
  const auto lam = wave<T>(kRows, 0.2);
  std::vector<int64_t> a(kRows), b(kRows);
  for (int64_t i = 0; i < kRows; ++i) a[i] = 7 * i % kClasses, b[i] = 11 * i % kClasses;
  for (const Divergence divergence : {Divergence::forward, Divergence::jsd})
    for (const bool standardize : {false, true}) {
      const SoftmaxKlOptions options{-100, 0.1, 0.3, 0.4, 1.0, 2.0, 4.0, Reduction::mean, divergence, 0.5, standardize};
      SoftmaxKlForward x{};
      static_cast<SoftmaxKlOptions&>(x) = options;
      set_pair(x, s, t);
      x.fp64 = sizeof(T) == 8;
      x.target = a.data(), x.mixed = b.data(), x.lam = lam.data();
      x.lam_type = kType<T>, x.lam_stride = 1;
      x.loss = out(1), x.stats = out(x.stats_count() * kRows), x.scale = out(1);
      compute<kIsa>(x, pool);
      SoftmaxKlBackward y{};
      static_cast<SoftmaxKl&>(y) = x;
      const T one = 1;
      y.grad = &one, y.stats = x.stats, y.scale = x.scale, y.out = out.template operator()<S>(kRows * kClasses);
      compute<kIsa>(y, pool);
    }
}

template <typename T, typename S>
void logit_rows(const Pool& pool, Written<T>& out) {
  const auto s = wave<S>(kRows * kClasses, 0.1), t = wave<S>(kRows * kClasses, 0.7);
  const auto by_batch = wave<T>(kRows * kClasses, 0.4), by_class = wave<T>(kRows * kClasses, 0.9);
  std::vector<int64_t> target(kRows);
  for (int64_t i = 0; i < kRows; ++i) target[i] = 5 * i % kClasses;
  const int64_t size = kRows * kClasses;
  const T one = 1;
  const bool fp64 = sizeof(T) == 8;

  NkdForward nkd{};
  set_pair(nkd, s, t);
  nkd.fp64 = fp64, nkd.target = target.data(), nkd.temperature = 2, nkd.gamma = 1.5, nkd.ignore_index = -100;
  nkd.reduction = Reduction::mean;
  nkd.loss = out(1), nkd.stats = out(kNkdStats * kRows), nkd.scale = out(1);
  compute<kIsa>(nkd, pool);
  NkdBackward nkd_back{};
  static_cast<Nkd&>(nkd_back) = nkd;
  nkd_back.grad = &one, nkd_back.stats = nkd.stats, nkd_back.scale = nkd.scale,
  nkd_back.out = out.template operator()<S>(size);
  compute<kIsa>(nkd_back, pool);

  NeighbourForward neighbour{};
  set_pair(neighbour, s, t);
  neighbour.fp64 = fp64, neighbour.loss = out(1);
  compute<kIsa>(neighbour, pool);
  NeighbourBackward neighbour_back{};
  static_cast<LogitPair&>(neighbour_back) = neighbour;
  neighbour_back.grad = &one, neighbour_back.out = out.template operator()<S>(size);
  compute<kIsa>(neighbour_back, pool);

  SoftmaxPearsonForward pearson{};
  set_pair(pearson, s, t);
  static_cast<SoftmaxPearsonOptions&>(pearson) = {2.0, 1.0, 0.5, 1e-8};
  pearson.fp64 = fp64, pearson.loss = out(1), pearson.p_s = out(size), pearson.p_t = out(size);
  pearson.row_factors = out(3 * kRows), pearson.column_factors = out(5 * kClasses);
  compute<kIsa>(pearson, pool);
  SoftmaxPearsonBackward pearson_back{};
  pearson_back.fp64 = fp64, pearson_back.rows = kRows, pearson_back.classes = kClasses, pearson_back.grad = &one;
  pearson_back.p_s = pearson.p_s, pearson_back.p_t = pearson.p_t, pearson_back.row_factors = pearson.row_factors;
  pearson_back.column_factors = pearson.column_factors, pearson_back.temperature = 2;
  pearson_back.out_type = kType<S>, pearson_back.out = out.template operator()<S>(size);
  compute<kIsa>(pearson_back, pool);

  MultiLevelRows rows{};
  set_pair(rows, s, t);
  rows.fp64 = fp64, rows.temperature = 3;
  rows.q_s = out(size), rows.difference = out(size), rows.middle = out(size), rows.divergence = out(1);
  compute<kIsa>(rows, pool);
  MultiLevelGradient gradient{};
  T* sum = out(size);
  for (int64_t i = 0; i < size; ++i) sum[i] = by_batch[i];
  gradient.fp64 = fp64, gradient.rows = kRows, gradient.classes = kClasses;
  gradient.q_s = rows.q_s, gradient.difference = rows.difference, gradient.by_batch = by_batch.data();
  gradient.by_class = by_class.data(), gradient.kd = 0.5, gradient.batch = 0.25, gradient.of_class = 2,
  gradient.out = sum;
  compute<kIsa>(gradient, pool);
}

template <typename T, typename S>
void gram(const Pool& pool, Written<T>& out) {
  constexpr int64_t kBatch = 33, kWide = 1100, kNarrow = 70;
  const auto wide = wave<S>(kBatch * kWide, 0.1), narrow = wave<S>(kBatch * kNarrow, 0.7);
  const Rows features[] = {{wide.data(), kType<S>, kBatch, kWide, kWide},
                           {narrow.data(), kType<S>, kBatch, kNarrow, kNarrow},
                           {narrow.data(), kType<S>, kBatch, kNarrow, kNarrow},
                           {wide.data(), kType<S>, kBatch, kWide, kWide}};
  const double scales[] = {1.0, 0.5};
  const T grads[] = {1, 2};
  SpForward x{};
  static_cast<SpOptions&>(x) = {false, scales, 1e-12, false, true};
  x.fp64 = sizeof(T) == 8, x.layers = 2, x.batch = kBatch, x.features = features;
  x.loss = out(2), x.gradient_matrix = out(2 * kBatch * kBatch);
  compute<kIsa>(x, pool);
  Grams k{};
  k.fp64 = x.fp64, k.features = features, k.count = 4, k.batch = kBatch, k.grams = out(4 * kBatch * kBatch);
  compute<kIsa>(k, pool);
  SpFromGrams from{};
  static_cast<SpLoss&>(from) = x;
  from.grams = k.grams, from.loss = out(2), from.gradient_matrix = out(2 * kBatch * kBatch);
  compute<kIsa>(from, pool);
  void* const gradients[] = {out.template operator()<S>(kBatch * kWide), out.template operator()<S>(kBatch * kNarrow)};
  SpBackward y{};
  y.fp64 = x.fp64, y.student = features, y.out = gradients, y.layers = 2, y.batch = kBatch;
  y.gradient_matrix = x.gradient_matrix, y.grad = grads, y.grad_stride = 1;
  compute<kIsa>(y, pool);
}

// So many products that rows are shared out
template <typename T, typename S>
void cosines(const Pool& pool, Written<T>& out) {
  constexpr int64_t n = 67, m = 61, d = 2100;
  const auto a = wave<S>(n * d, 0.1), b = wave<S>(m * d, 0.7);
  const auto grad = wave<T>(n * m, 0.3);
  CosineForward x{};
  x.fp64 = sizeof(T) == 8;
  x.a = {a.data(), kType<S>, n, d, d}, x.b = {b.data(), kType<S>, m, d, d};
  x.similarity = out(n * m), x.inverse_a = out(n), x.inverse_b = out(m);
  compute<kIsa>(x, pool);
  CosineBackward y{};
  y.fp64 = x.fp64, y.a = x.a, y.b = x.b, y.similarity = x.similarity, y.inverse_a = x.inverse_a;
  y.inverse_b = x.inverse_b, y.grad = grad.data();
  y.grad_a = out.template operator()<S>(n * d), y.grad_b = out.template operator()<S>(m * d);
  compute<kIsa>(y, pool);
  Products z{};
  z.fp64 = x.fp64, z.a = x.a, z.b = x.b, z.products = out(n * m), z.squares_a = out(n), z.squares_b = out(m);
  compute<kIsa>(z, pool);
}

template <typename T, typename S>
void relation(const Pool& pool, Written<T>& out) {
  constexpr int64_t n = 35, d = 1100;
  const auto s = wave<S>(n * d, 0.1), t = wave<S>(n * d, 0.7);
  const Rows features[] = {{s.data(), kType<S>, n, d, d}, {t.data(), kType<S>, n, d, d}};
  const auto doubles = [&](int64_t n) { return out.template operator()<double>(n); };
  Distances x{};
  x.fp64 = sizeof(T) == 8, x.features = features, x.count = 2, x.batch = n, x.distances = doubles(2 * n * n);
  compute<kIsa>(x, pool);
  const auto of = [&](auto loss, const void* measures, void* value, void* matrix) {
    loss.batch = n, loss.scale = 1.0 / (n * n), loss.measures = measures, loss.loss = value;
    loss.gradient_matrix = matrix;
    compute<kIsa>(loss, pool);
  };
  Rkd rkd{};
  rkd.fp64 = true, rkd.distance_weight = 25, rkd.angle_weight = 50, rkd.eps = 1e-12,
  rkd.angle_scale = 1.0 / (n * n * n);
  of(rkd, x.distances, doubles(1), doubles(n * n));
  Irg irg{};
  irg.fp64 = true, irg.eps = 1e-12;
  of(irg, x.distances, doubles(1), doubles(n * n));
  Grams k{};
  k.fp64 = x.fp64, k.features = features, k.count = 2, k.batch = n, k.grams = out(2 * n * n);
  compute<kIsa>(k, pool);
  Pkt pkt{};
  pkt.fp64 = x.fp64, pkt.eps = 1e-7;
  of(pkt, k.grams, out(1), out(n * n));
  const double coefficients[] = {0.5, 0.25, 0.125};
  Cc cc{};
  cc.fp64 = x.fp64, cc.coefficients = coefficients, cc.count = 3, cc.normalize = true;
  of(cc, k.grams, out(1), out(n * n));
}

template <typename T, typename S>
void maps(const Pool& pool, Written<T>& out) {
  constexpr int64_t kBatch = 3, kLayers = 2, c_s = 6, c_t = 5, height = 17, width = 19, pixels = height * width;
  const auto s = wave<S>(kBatch * c_s * pixels, 0.1), t = wave<S>(kBatch * c_t * pixels, 0.7);
  const auto grad = wave<T>(kLayers * kBatch, 0.3);
  std::vector<MapLayer> layers;
  for (int64_t i = 0; i < kLayers; ++i) {
    const bool last = i == 1;
    layers.push_back({{s.data(), kType<S>, c_s, last},
                      {t.data(), kType<S>, c_t, last},
                      kBatch,
                      height,
                      width,
                      0.5,
                      i * kBatch * pixels,
                      out.template operator()<S>(kBatch * c_s * pixels)});
  }
  const auto set = [&](MapLayers& x) {
    x.fp64 = sizeof(T) == 8, x.layers = layers.data(), x.count = kLayers, x.batch = kBatch;
  };
  Energies r{};
  set(r);
  r.r = out(kLayers * kBatch * pixels);
  compute<kIsa>(r, pool);
  AttentionForward attention{};
  set(attention);
  attention.per_layer = attention.per_sample = true;
  attention.loss = out(kLayers * kBatch), attention.kappa = out(kLayers * kBatch * pixels);
  compute<kIsa>(attention, pool);
  AngularMarginForward angular{};
  set(angular);
  angular.margin = 1.35, angular.sharpness = 64, angular.local_weight = 0.2;
  angular.loss = out(1), angular.kappa = out(kLayers * kBatch * pixels);
  compute<kIsa>(angular, pool);
  MapBackward back{};
  set(back);
  back.kappa = angular.kappa, back.grad = grad.data(), back.layer_stride = kBatch, back.sample_stride = 1;
  compute<kIsa>(back, pool);
}

template <typename T>
int check(const char* name, void (*op)(const Pool&, Written<T>&)) {
  int wrong = 0;
  for (const int threads : {1, 2, 3, 8}) {
    threads_now = threads;
    Written<T> expected, actual;
    op({alone, threads}, expected);
    op({scattered, threads}, actual);
    for (size_t i = 0; i < expected.all.size(); ++i) {
      const bool written = expected.all[i] != std::vector<char>(expected.all[i].size(), static_cast<char>(0xff));
      const bool same = expected.all[i] == actual.all[i];
      if (!same) std::printf("%s: output %zu of %d threads differs from that of one\n", name, i, threads);
      wrong += !written + !same;
    }
  }
  std::printf("%s %s\n", wrong ? "WRONG" : "right", name);
  return wrong;
}

}  // namespace

#define CHECK(op)                                          \
  wrong += check<float>(#op " fp32", op<float, float>);    \
  wrong += check<double>(#op " fp64", op<double, double>); \
  wrong += check<float>(#op " bf16", op<float, uint16_t>)

// With an argument: what two threads must not do, for whoever wants to see it found
int main(int count, char**) {
  int wrong = 0;
  if (count > 1) {
    threads_now = 2;
    scattered(2, 1, [](int64_t, int64_t, void* sum) { ++*static_cast<int*>(sum); }, &wrong);
    return 0;
  }
  CHECK(softmax_kl);
  CHECK(logit_rows);
  CHECK(gram);
  CHECK(cosines);
  CHECK(relation);
  CHECK(maps);
  return wrong != 0;
}
