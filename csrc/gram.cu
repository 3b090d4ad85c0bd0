// gram on CUDA. The Gram matrices of a training batch are few output tiles from many columns, so the columns are split:
//   product     a block per (matrix, 64 x 64 tile, split): partial inner products, of a symmetric matrix the lower half
//   row         a block per row: sums the splits, normalises, forms the loss and H
//   symmetrise  H + H^T
//   sum         the rows' losses in a fixed order
//   weighted    backward: W Q in 64 x 64 tiles, for all layers in one launch
#include "cosine.cuh"
#include "products.cuh"

namespace kd {
namespace cuda {
namespace {

// ---- Gram matrices ----

// What the products of the Gram matrices leave: T [matrices, splits, batch, batch], the lower half of each.
struct Partial {
  int64_t matrices, size;
  int splits;
  Partial(const Rows* features, int64_t count, int64_t batch) : matrices(count), size(batch * batch) {
    int64_t tiles = 0, width = 1;
    for (int64_t i = 0; i < count; ++i) {
      tiles += tiles_of({features[i], features[i], true, 0});
      width = max(width, features[i].width);
    }
    splits = splits_for(tiles, width);
  }
  int64_t numbers() const { return matrices * splits * size; }
};

template <typename T>
void start_grams(const Rows* features, const Partial& layout, T* partial, cudaStream_t stream) {
  for (int64_t begin = 0; begin < layout.matrices; begin += kTables) {
    ProductTable table{};
    table.splits = layout.splits;
    table.count = static_cast<int>(min(kTables, layout.matrices - begin));
    for (int i = 0; i < table.count; ++i) {
      const Rows& q = features[begin + i];
      table.items[i] = {q, q, true, (begin + i) * layout.splits * layout.size};
    }
    start_products(table, partial, stream);
  }
}

// Row i of one matrix, by a block: the splits summed. The lower half is all there is.
template <typename T>
__device__ void gram_row(const T* partial, int64_t n, int splits, int64_t i, T* k) {
  for (int64_t j = threadIdx.x; j < n; j += blockDim.x)
    k[j] = static_cast<T>(product_at(partial, n * n, splits, j <= i ? i * n + j : j * n + i));
}

// A block per (matrix, row).
template <typename T>
__global__ void gram_kernel(const T* partial, int64_t n, int splits, T* grams) {
  const int64_t matrix = blockIdx.x / n, i = blockIdx.x % n;
  gram_row(partial + matrix * splits * n * n, n, splits, i, grams + (matrix * n + i) * n);
}

template <typename T>
void grams(const Grams& x, cudaStream_t stream) {
  const Partial layout(x.features, x.count, x.batch);
  if (x.count * x.batch == 0) return;
  T* partial = static_cast<T*>(x.workspace);
  start_grams(x.features, layout, partial, stream);
  gram_kernel<T>
      <<<x.count * x.batch, kRowThreads, 0, stream>>>(partial, x.batch, layout.splits, static_cast<T*>(x.grams));
  check_launch("gram");
}

// ---- similarity-preserving loss ----

struct SpConstants {
  double scales[kTables];  // of this launch's layers
  SpOptions options;       // its own scales are on the host
  int64_t first_layer, layers, batch;
  int splits;
};

// ||K_i||, by way of K / max |K|: squares of large features overflow
template <typename T>
__device__ double row_norm(const T* k, int64_t n, bool l1, double* shared) {
  double top = 0, sum = 0;
  for (int64_t j = threadIdx.x; j < n; j += blockDim.x) top = Max()(top, fabs(double(k[j])));
  top = reduce_block(top, shared, 0.0, Max());
  if (top == 0) top = 1;
  for (int64_t j = threadIdx.x; j < n; j += blockDim.x) {
    const double v = fabs(double(k[j]));
    sum += l1 ? v : v / top * (v / top);
  }
  sum = reduce_block(sum, shared, 0.0, Add());
  return l1 ? sum : sqrt(sum) * top;
}

// A block per (layer, row). Every column belongs to one thread throughout. `partial` is null where K is there already.
template <typename T>
__global__ void sp_row_kernel(const __grid_constant__ SpConstants c, const T* partial, T* grams, T* h, double* losses) {
  __shared__ double shared[32];
  const int64_t n = c.batch, size = n * n, i = blockIdx.x % n;
  const int64_t layer = c.first_layer + blockIdx.x / n, teacher = c.layers + layer;
  const double scale = c.scales[blockIdx.x / n];
  T *k_s = grams + layer * size + i * n, *k_t = grams + teacher * size + i * n;
  if (partial) {
    gram_row(partial + layer * c.splits * size, n, c.splits, i, k_s);
    gram_row(partial + teacher * c.splits * size, n, c.splits, i, k_t);
  }
  const RowNorm s(row_norm(k_s, n, c.options.l1, shared), c.options.eps);
  const RowNorm t(row_norm(k_t, n, c.options.l1, shared), c.options.eps);
  double loss = 0, inner = 0;
  for (int64_t j = threadIdx.x; j < n; j += blockDim.x) {
    const double g = k_s[j] / s.divisor, difference = g - k_t[j] / t.divisor;
    loss += difference * difference;
    inner += 2 * scale * difference * g;
  }
  loss = reduce_block(loss, shared, 0.0, Add());
  inner = reduce_block(inner, shared, 0.0, Add());
  if (threadIdx.x == 0) losses[layer * n + i] = scale * loss;
  if (!h) return;
  const ThroughRowNorm through(s, inner, c.options);
  for (int64_t j = threadIdx.x; j < n; j += blockDim.x) {
    const double r = 2 * scale * (k_s[j] / s.divisor - k_t[j] / t.divisor);
    h[layer * size + i * n + j] = static_cast<T>(through(r, k_s[j]));
  }
}

template <typename T>
__global__ void sp_symmetrise_kernel(const T* h, int64_t n, int64_t total, T* gradient_matrix) {
  const int64_t at = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (at >= total) return;
  const int64_t layer = at / (n * n), i = at / n % n, j = at % n;
  gradient_matrix[at] = h[at] + h[layer * n * n + j * n + i];
}

// A block per number of the loss: the sum of `count` rows' losses.
template <typename T>
__global__ void sp_sum_kernel(const double* losses, int64_t count, T* out) {
  __shared__ double shared[32];
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) sum += losses[blockIdx.x * count + i];
  sum = reduce_block(sum, shared, 0.0, Add());
  if (threadIdx.x == 0) out[blockIdx.x] = static_cast<T>(sum);
}

// The second half's scratch: double losses [layers, batch], T H [layers, batch, batch].
inline int64_t loss_bytes(const SpLoss& x) {
  return 8 * x.layers * x.batch + x.layers * x.batch * x.batch * (x.fp64 ? 8 : 4);
}

// From the raw K, or from the partial products of it: then K is written to `grams`.
template <typename T>
void start_loss(const SpLoss& x, const T* partial, int splits, T* grams, void* scratch, cudaStream_t stream) {
  double* losses = static_cast<double*>(scratch);
  const int64_t rows = x.layers * x.batch;
  T* h = x.gradient_matrix ? reinterpret_cast<T*>(losses + rows) : nullptr;
  if (x.batch > 0)
    for (int64_t begin = 0; begin < x.layers; begin += kTables) {
      SpConstants c{{}, x, begin, x.layers, x.batch, splits};
      const int64_t count = min(kTables, x.layers - begin);
      for (int64_t i = 0; i < count; ++i) c.scales[i] = x.scales[begin + i];
      sp_row_kernel<T><<<count * x.batch, kRowThreads, 0, stream>>>(c, partial, grams, h, losses);
      check_launch("gram row");
    }
  if (h && rows > 0) {
    const int64_t total = rows * x.batch;
    sp_symmetrise_kernel<T>
        <<<ceil_div(total, kThreads), kThreads, 0, stream>>>(h, x.batch, total, static_cast<T*>(x.gradient_matrix));
    check_launch("gram gradient matrix");
  }
  if (x.per_layer && x.layers == 0) return;
  sp_sum_kernel<T><<<x.per_layer ? x.layers : 1, kThreads, 0, stream>>>(losses, x.per_layer ? x.batch : rows,
                                                                        static_cast<T*>(x.loss));
  check_launch("gram sum");
}

// The workspace: what start_loss needs, K [2 layers, batch, batch], the partial products.
template <typename T>
void sp_forward(const SpForward& x, cudaStream_t stream) {
  const Partial layout(x.features, 2 * x.layers, x.batch);
  T* grams = reinterpret_cast<T*>(static_cast<char*>(x.workspace) + loss_bytes(x));
  T* partial = grams + 2 * x.layers * x.batch * x.batch;
  start_grams(x.features, layout, partial, stream);
  start_loss<T>(x, partial, layout.splits, grams, x.workspace, stream);
}

template <typename T>
void sp_from_grams(const SpFromGrams& x, cudaStream_t stream) {
  T* grams = static_cast<T*>(const_cast<void*>(x.grams));  // not written to, as nothing partial is given
  start_loss<T>(x, nullptr, 0, grams, x.workspace, stream);
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
    start_weighted(table, stream);
  }
}

}  // namespace

int64_t workspace(const Grams& x) { return Partial(x.features, x.count, x.batch).numbers() * (x.fp64 ? 8 : 4); }

int64_t workspace(const SpForward& x) {
  const Partial layout(x.features, 2 * x.layers, x.batch);
  return loss_bytes(x) + (layout.matrices * layout.size + layout.numbers()) * (x.fp64 ? 8 : 4);
}

int64_t workspace(const SpFromGrams& x) { return loss_bytes(x); }

int64_t workspace(const Products& x) {
  return int64_t(product_splits(x.a, x.b)) * x.a.count * x.b.count * (x.fp64 ? 8 : 4);
}

int64_t workspace(const CosineForward& x) {
  return int64_t(product_splits(x.a, x.b)) * x.a.count * x.b.count * (x.fp64 ? 8 : 4);
}

int64_t workspace(const CosineBackward& x) { return 8 * (x.a.count + x.b.count); }

void compute(const Grams& x, const Launch& launch) {
  x.fp64 ? grams<double>(x, launch.stream()) : grams<float>(x, launch.stream());
}

void compute(const SpForward& x, const Launch& launch) {
  x.fp64 ? sp_forward<double>(x, launch.stream()) : sp_forward<float>(x, launch.stream());
}

void compute(const SpFromGrams& x, const Launch& launch) {
  x.fp64 ? sp_from_grams<double>(x, launch.stream()) : sp_from_grams<float>(x, launch.stream());
}

void compute(const SpBackward& x, const Launch& launch) {
  x.fp64 ? sp_backward<double>(x, launch.stream()) : sp_backward<float>(x, launch.stream());
}

void compute(const Products& x, const Launch& launch) {
  x.fp64 ? products<double>(x, launch.stream()) : products<float>(x, launch.stream());
}

void compute(const CosineForward& x, const Launch& launch) {
  x.fp64 ? cosine_forward<double>(x, launch.stream()) : cosine_forward<float>(x, launch.stream());
}

void compute(const CosineBackward& x, const Launch& launch) {
  x.fp64 ? cosine_backward<double>(x, launch.stream()) : cosine_backward<float>(x, launch.stream());
}

}  // namespace cuda
}  // namespace kd
