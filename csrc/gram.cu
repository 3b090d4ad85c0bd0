// gram on CUDA, all layers in one launch per step. A block sees one part of the work; what needs all parts is done by
// the next launch, or by the block that comes last.
//   Grams   products (products.cuh): parts of Q Q^T;  sum: the parts added up
//   SP      products;  sp_loss (sp_loss.cuh): rows added up and normalised, the loss, the gradient matrix W
//           backward: weighted (weighted.cuh), W Q
//   cosine  pair (cosine.cuh): parts of A B^T and the rows' squares, the last block of a tile finishes it
//           backward: weighted, for both sides
#include <vector>

#include "cosine.cuh"
#include "sp_loss.cuh"

namespace kd {
namespace cuda {
namespace {

// ---- Gram matrices ----

// A block per row of the matrices of a launch: its parts, added up in their order
template <typename T>
struct GramTable {
  Parts<T> parts[kTables];
};

template <typename T>
__global__ void gram_sum_kernel(const __grid_constant__ GramTable<T> table, int64_t n, T* grams) {
  const Parts<T>& p = table.parts[blockIdx.x / n];
  const T* from = p.data + blockIdx.x % n * p.pitch;
  for (int64_t j = threadIdx.x; j < n; j += blockDim.x) {
    double sum = 0;
#pragma unroll 4
    for (int64_t s = 0; s < p.splits; ++s) sum += static_cast<double>(from[s * n * p.pitch + j]);
    grams[blockIdx.x * n + j] = static_cast<T>(sum);
  }
}

template <typename T>
void grams(const Grams& x, cudaStream_t stream) {
  if (x.count * x.batch == 0) return;
  const Partials layout(x.features, x.count, x.batch, x.fp64);
  std::vector<Parts<T>> parts(x.count);
  start_products(x.features, x.count, layout, static_cast<T*>(x.workspace), nullptr, 0, stream,
                 [&](int64_t i, const Parts<T>& p) { parts[i] = p; });
  for (int64_t begin = 0; begin < x.count; begin += kTables) {
    GramTable<T> table{};
    const int64_t count = min(kTables, x.count - begin);
    for (int64_t i = 0; i < count; ++i) table.parts[i] = parts[begin + i];
    gram_sum_kernel<T>
        <<<count * x.batch, 256, 0, stream>>>(table, x.batch, static_cast<T*>(x.grams) + begin * x.batch * x.batch);
    check_launch("gram sum");
  }
}

// ---- similarity-preserving loss ----

// Scratch memory of the loss: 8-byte losses of the rows and counters; T H [layers, batch, batch]
template <typename T>
struct LossScratch {
  int64_t rows, counts, words, numbers;
  explicit LossScratch(const SpLoss& x)
      : rows(x.layers * x.batch),
        counts(x.layers + 1),
        words(round_up(rows + counts, 2)),
        numbers(round_up(rows * x.batch, 4)) {}
  int64_t bytes() const { return 8 * words + numbers * int64_t(sizeof(T)); }
  double* losses(const SpLoss& x) const { return static_cast<double*>(x.workspace); }
  unsigned long long* counters(const SpLoss& x) const {
    return reinterpret_cast<unsigned long long*>(losses(x) + rows);
  }
  T* h(const SpLoss& x) const { return reinterpret_cast<T*>(losses(x) + words); }
};

// k(i): where K, or the parts of it, are of student i, and of teacher i - layers
template <typename T, typename K>
void start_loss(const SpLoss& x, const K& k, cudaStream_t stream) {
  if (x.layers * x.batch == 0) {
    check(cudaMemsetAsync(x.loss, 0, (x.per_layer ? x.layers : 1) * sizeof(T), stream), "gram loss");
    return;
  }
  const LossScratch<T> scratch(x);
  for (int64_t begin = 0; begin < x.layers; begin += kTables) {
    SpTable<T> table{};
    table.options = x;
    table.first_layer = begin;
    table.layers = x.layers;
    table.batch = x.batch;
    table.h = x.gradient_matrix ? scratch.h(x) : nullptr;
    table.gradient_matrix = static_cast<T*>(x.gradient_matrix);
    table.losses = scratch.losses(x);
    table.counters = scratch.counters(x);
    table.loss = static_cast<T*>(x.loss);
    const int64_t count = min(kTables, x.layers - begin);
    for (int64_t i = 0; i < count; ++i) {
      table.student[i] = k(begin + i);
      table.teacher[i] = k(x.layers + begin + i);
      table.scales[i] = x.scales[begin + i];
    }
    const int64_t groups = ceil_div(x.batch, rows_of_group(x.batch));
    sp_loss_kernel<T><<<count * groups, kRowThreads, 0, stream>>>(table);
    check_launch("gram loss");
  }
}

template <typename T>
void sp_forward(const SpForward& x, cudaStream_t stream) {
  const Partials layout(x.features, 2 * x.layers, x.batch, x.fp64);
  const LossScratch<T> scratch(x);
  std::vector<Parts<T>> parts(2 * x.layers);
  if (x.batch)
    start_products(x.features, 2 * x.layers, layout, scratch.h(x) + scratch.numbers, scratch.counters(x),
                   scratch.counts, stream, [&](int64_t i, const Parts<T>& p) { parts[i] = p; });
  start_loss<T>(x, [&](int64_t i) { return parts[i]; }, stream);
}

template <typename T>
void sp_from_grams(const SpFromGrams& x, cudaStream_t stream) {
  const LossScratch<T> scratch(x);
  check(cudaMemsetAsync(scratch.counters(x), 0, 8 * scratch.counts, stream), "gram counters");
  T* const grams = static_cast<T*>(const_cast<void*>(x.grams));  // of one part each, so that none is written to
  start_loss<T>(x, [&](int64_t i) { return Parts<T>{grams + i * x.batch * x.batch, x.batch, 1}; }, stream);
}

template <typename T>
void sp_backward(const SpBackward& x, cudaStream_t stream) {
  for (int64_t begin = 0; begin < x.layers; begin += kTables) {
    WeightedTable<T> table{};
    table.count = static_cast<int>(min(kTables, x.layers - begin));
    for (int i = 0; i < table.count; ++i) {
      const int64_t layer = begin + i;
      Weighted<T>& item = table.items[i];
      item.w = static_cast<const T*>(x.gradient_matrix) + layer * x.batch * x.batch;
      item.row_stride = x.batch;
      item.column_stride = 1;
      item.factor = static_cast<const T*>(x.grad) + layer * x.grad_stride;
      item.q = item.own = x.student[layer];
      item.out = x.out[layer];
    }
    weighted(table, stream);
  }
}

// ---- what the bindings call ----

// A call of f with a number of the call's precision
template <typename C, typename F>
auto in_precision(const C& x, const F& f) {
  return x.fp64 ? f(double()) : f(float());
}

}  // namespace

int64_t workspace(const Grams& x) { return Partials(x.features, x.count, x.batch, x.fp64).numbers * (x.fp64 ? 8 : 4); }

int64_t workspace(const SpForward& x) {
  const int64_t parts = Partials(x.features, 2 * x.layers, x.batch, x.fp64).numbers;
  return in_precision(x, [&](auto t) { return LossScratch<decltype(t)>(x).bytes() + parts * int64_t(sizeof(t)); });
}

int64_t workspace(const SpFromGrams& x) {
  return in_precision(x, [&](auto t) { return LossScratch<decltype(t)>(x).bytes(); });
}

int64_t workspace(const Products& x) { return PairLayout(x.a, x.b, x.fp64).bytes(x.fp64 ? 8 : 4); }

int64_t workspace(const CosineForward& x) { return PairLayout(x.a, x.b, x.fp64).bytes(x.fp64 ? 8 : 4); }

void compute(const Grams& x, const Launch& launch) {
  in_precision(x, [&](auto t) { grams<decltype(t)>(x, launch.stream()); });
}

void compute(const SpForward& x, const Launch& launch) {
  in_precision(x, [&](auto t) { sp_forward<decltype(t)>(x, launch.stream()); });
}

void compute(const SpFromGrams& x, const Launch& launch) {
  in_precision(x, [&](auto t) { sp_from_grams<decltype(t)>(x, launch.stream()); });
}

void compute(const SpBackward& x, const Launch& launch) {
  in_precision(x, [&](auto t) { sp_backward<decltype(t)>(x, launch.stream()); });
}

void compute(const Products& x, const Launch& launch) {
  in_precision(x, [&](auto t) {
    row_products<decltype(t)>(x.a, x.b, false, x.workspace, x.squares_a, x.squares_b, x.products, launch.stream());
  });
}

void compute(const CosineForward& x, const Launch& launch) {
  in_precision(x, [&](auto t) {
    row_products<decltype(t)>(x.a, x.b, true, x.workspace, x.inverse_a, x.inverse_b, x.similarity, launch.stream());
  });
}

void compute(const CosineBackward& x, const Launch& launch) {
  in_precision(x, [&](auto t) { cosine_backward<decltype(t)>(x, launch.stream()); });
}

}  // namespace cuda
}  // namespace kd
