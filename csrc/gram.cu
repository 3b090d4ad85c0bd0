// gram on CUDA. The Gram matrices of a training batch are few output tiles from many columns, so the columns are split:
//   product   a block per (matrix, 64 x 64 tile, split): partial inner products; only the lower half of a symmetric matrix
//   row       a block per row: sums the splits, normalises, forms the loss and H
//   symmetrise  H + H^T;  sum: the rows' losses in a fixed order
//   weighted  backward: W Q in 64 x 64 tiles, for all layers in one launch
#include "cuda.h"
#include "device.cuh"

namespace kd {
namespace cuda {
namespace {

constexpr int kTables = 16;                            // matrices or layers of a launch; their table is passed by value
constexpr int kTile = 64, kDepth = 16, kThreads = 256;  // each thread makes 4 x 4 of a tile's numbers
constexpr int kRowThreads = 128;
constexpr int kWantedBlocks = 1056;  // eight per multiprocessor of an H100: a constant, so that sums do not depend on the GPU

// ---- inner products of rows ----

struct Factors {
  Rows a, b;
  bool symmetric;
  int64_t partial;  // where the [splits, a.count, b.count] partial products start
};

struct ProductTable {
  Factors items[kTables];
  int64_t first_block[kTables + 1];
  int count, splits;
};

template <typename Table>
__device__ inline int item_of(const Table& table, int64_t block) {
  int i = 0;
  while (i + 1 < table.count && block >= table.first_block[i + 1]) ++i;
  return i;
}

__host__ __device__ inline int64_t tiles_of(const Factors& p) {
  const int64_t rows = ceil_div(p.a.count, kTile), columns = ceil_div(p.b.count, kTile);
  return p.symmetric ? rows * (rows + 1) / 2 : rows * columns;
}

template <typename T>
__device__ inline T element(const Rows& q, int64_t row, int64_t column, int64_t end) {
  return row < q.count && column < end ? load<T>(q.type, q.data, row * q.stride + column) : T(0);
}

template <typename T>
__global__ void __launch_bounds__(kThreads) product_kernel(const __grid_constant__ ProductTable table, T* partial) {
  __shared__ T tile_a[kDepth][kTile + 1], tile_b[kDepth][kTile + 1];
  const int i = item_of(table, blockIdx.x);
  const Factors& p = table.items[i];
  const int64_t block = blockIdx.x - table.first_block[i], split = block % table.splits;
  int64_t tile = block / table.splits, row = 0, column = 0;
  if (p.symmetric) {
    while (tile > row) tile -= ++row;  // row r of the lower triangle has r + 1 tiles
    column = tile;
  } else {
    const int64_t columns = ceil_div(p.b.count, kTile);
    row = tile / columns;
    column = tile % columns;
  }
  row *= kTile;
  column *= kTile;
  const int64_t step = ceil_div(ceil_div(p.a.width, table.splits), kDepth) * kDepth;
  const int64_t begin = split * step, end = min(p.a.width, begin + step);
  const int x = threadIdx.x % 16, y = threadIdx.x / 16;  // also the column and the row of what a thread reads
  T sum[4][4] = {};
  for (int64_t k = begin; k < end; k += kDepth) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      tile_a[x][y + 16 * r] = element<T>(p.a, row + y + 16 * r, k + x, end);
      tile_b[x][y + 16 * r] = element<T>(p.b, column + y + 16 * r, k + x, end);
    }
    __syncthreads();
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
      T a[4], b[4];
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        a[r] = tile_a[d][y + 16 * r];
        b[r] = tile_b[d][x + 16 * r];
      }
#pragma unroll
      for (int r = 0; r < 4; ++r)
#pragma unroll
        for (int c = 0; c < 4; ++c) sum[r][c] += a[r] * b[c];
    }
    __syncthreads();
  }
  T* out = partial + p.partial + split * p.a.count * p.b.count;
#pragma unroll
  for (int r = 0; r < 4; ++r)
#pragma unroll
    for (int c = 0; c < 4; ++c)
      if (row + y + 16 * r < p.a.count && column + x + 16 * c < p.b.count)
        out[(row + y + 16 * r) * p.b.count + column + x + 16 * c] = sum[r][c];
}

// How many parts the columns are cut into: enough blocks for a large GPU, of 128 columns at least, and of 4096 at most, as
// what two Grams differ by would drown in the rounding of longer fp32 sums.
inline int splits_for(int64_t tiles, int64_t width) {
  const int64_t wanted = ceil_div(kWantedBlocks, max(tiles, 1)), room = ceil_div(width, 128);
  return static_cast<int>(max(ceil_div(width, 4096), max(1, min(min(wanted, room), 64))));
}

template <typename T>
void start_products(ProductTable& table, T* partial, cudaStream_t stream) {
  for (int i = 0; i < table.count; ++i)
    table.first_block[i + 1] = table.first_block[i] + tiles_of(table.items[i]) * table.splits;
  if (table.first_block[table.count] == 0) return;
  product_kernel<T><<<table.first_block[table.count], kThreads, 0, stream>>>(table, partial);
  check_launch("gram product");
}

// Entry (i, j) of a product: its splits, summed.
template <typename T>
__device__ inline double product_at(const T* partial, int64_t size, int splits, int64_t at) {
  double sum = 0;
  for (int k = 0; k < splits; ++k) sum += static_cast<double>(partial[k * size + at]);
  return sum;
}

// ---- weighted sums of rows ----

// out_i = sum_k W_ik q_k; with `inverse`, out_i = inverse_i (that - inner_i inverse_i own_i)
template <typename T>
struct Weighted {
  const T* w;  // W_ik = w[i * row_stride + k * column_stride] (* column_scale[k]) (* *factor)
  int64_t row_stride, column_stride;
  const T *column_scale, *factor;
  Rows q, own;
  const T* inverse;
  const double* inner;
  void* out;  // dense rows of own's dtype
};

template <typename T>
struct WeightedTable {
  Weighted<T> items[kTables];
  int64_t first_block[kTables + 1];
  int count;
};

template <typename T>
__global__ void __launch_bounds__(kThreads) weighted_kernel(const __grid_constant__ WeightedTable<T> table) {
  __shared__ T tile_w[kDepth][kTile + 1], tile_q[kDepth][kTile];
  const int i = item_of(table, blockIdx.x);
  const Weighted<T>& p = table.items[i];
  const int64_t block = blockIdx.x - table.first_block[i], rows = ceil_div(p.own.count, kTile);
  const int64_t row = block % rows * kTile, column = block / rows * kTile;
  const int x = threadIdx.x % 16, y = threadIdx.x / 16;
  const T factor = p.factor ? *p.factor : T(1);
  T sum[4][4] = {};
  for (int64_t k = 0; k < p.q.count; k += kDepth) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int64_t at = row + y + 16 * r;
      T w = 0;
      if (at < p.own.count && k + x < p.q.count) {
        w = p.w[at * p.row_stride + (k + x) * p.column_stride] * factor;
        if (p.column_scale) w *= p.column_scale[k + x];
      }
      tile_w[x][y + 16 * r] = w;
      tile_q[y][x + 16 * r] = element<T>(p.q, k + y, column + x + 16 * r, p.q.width);
    }
    __syncthreads();
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
      T w[4], q[4];
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        w[r] = tile_w[d][y + 16 * r];
        q[r] = tile_q[d][x + 16 * r];
      }
#pragma unroll
      for (int r = 0; r < 4; ++r)
#pragma unroll
        for (int c = 0; c < 4; ++c) sum[r][c] += w[r] * q[c];
    }
    __syncthreads();
  }
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const int64_t at = row + y + 16 * r;
    if (at >= p.own.count) continue;
    T scale = 1, along = 0;
    if (p.inverse) {
      scale = p.inverse[at];
      // below the eps the norm is a constant, so nothing is projected out
      along = scale >= T(1e8) ? T(0) : static_cast<T>(p.inner[at]) * scale;
    }
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int64_t to = column + x + 16 * c;
      if (to >= p.own.width) continue;
      T value = sum[r][c];
      if (p.inverse) value = (value - along * load<T>(p.own.type, p.own.data, at * p.own.stride + to)) * scale;
      store<T>(p.own.type, p.out, at * p.own.width + to, value);
    }
  }
}

template <typename T>
void start_weighted(WeightedTable<T>& table, cudaStream_t stream) {
  for (int i = 0; i < table.count; ++i) {
    const Rows& own = table.items[i].own;
    table.first_block[i + 1] = table.first_block[i] + ceil_div(own.count, kTile) * ceil_div(own.width, kTile);
  }
  if (table.first_block[table.count] == 0) return;
  weighted_kernel<T><<<table.first_block[table.count], kThreads, 0, stream>>>(table);
  check_launch("gram weighted sum");
}

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
  gram_kernel<T><<<x.count * x.batch, kRowThreads, 0, stream>>>(partial, x.batch, layout.splits, static_cast<T*>(x.grams));
  check_launch("gram");
}

// ---- similarity-preserving loss ----

struct SpConstants {
  double scales[kTables];  // of this launch's layers
  int64_t first_layer, layers, batch;
  double eps;
  bool l1, zero_row_grad;
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
  const double norm_s = row_norm(k_s, n, c.l1, shared), norm_t = row_norm(k_t, n, c.l1, shared);
  const double by_s = norm_s < c.eps ? c.eps : norm_s, by_t = norm_t < c.eps ? c.eps : norm_t;
  double loss = 0, inner = 0;
  for (int64_t j = threadIdx.x; j < n; j += blockDim.x) {
    const double g = k_s[j] / by_s, difference = g - k_t[j] / by_t;
    loss += difference * difference;
    inner += 2 * scale * difference * g;
  }
  loss = reduce_block(loss, shared, 0.0, Add());
  inner = reduce_block(inner, shared, 0.0, Add());
  if (threadIdx.x == 0) losses[layer * n + i] = scale * loss;
  if (!h) return;
  if (norm_s < c.eps) inner = 0;                      // below eps the norm is a constant
  const bool dead = norm_s == 0 && !c.zero_row_grad;  // an all-zero row has no direction to normalise
  for (int64_t j = threadIdx.x; j < n; j += blockDim.x) {
    const double g = k_s[j] / by_s, r = 2 * scale * (g - k_t[j] / by_t);
    const double direction = c.l1 ? (k_s[j] > T(0)) - (k_s[j] < T(0)) : g;
    h[layer * size + i * n + j] = dead ? T(0) : static_cast<T>((r - inner * direction) / by_s);
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
      SpConstants c{{}, begin, x.layers, x.batch, x.eps, x.l1, x.zero_row_grad, splits};
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

// ---- products and cosines of rows ----

// A block per row of a, then of b: its squared norm, or 1 / max(|row|, 1e-8)
template <typename T>
__global__ void square_kernel(const Rows a, const Rows b, bool inverse, T* out_a, T* out_b) {
  __shared__ double shared[32];
  const bool second = blockIdx.x >= a.count;
  const Rows& q = second ? b : a;
  const int64_t i = second ? blockIdx.x - a.count : blockIdx.x;
  double sum = 0;
  for (int64_t k = threadIdx.x; k < q.width; k += blockDim.x) {
    const double v = static_cast<double>(load<T>(q.type, q.data, i * q.stride + k));
    sum += v * v;
  }
  sum = reduce_block(sum, shared, 0.0, Add());
  if (threadIdx.x) return;
  const double norm = sqrt(sum);
  (second ? out_b : out_a)[i] = static_cast<T>(inverse ? 1 / (norm < 1e-8 ? 1e-8 : norm) : sum);
}

// The splits summed, and times the inverse norms unless these are null
template <typename T>
__global__ void product_sum_kernel(const T* partial, int splits, int64_t n, int64_t m, const T* inverse_a,
                                   const T* inverse_b, T* out) {
  const int64_t at = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (at >= n * m) return;
  double value = product_at(partial, n * m, splits, at);
  if (inverse_a) value *= double(inverse_a[at / m]) * double(inverse_b[at % m]);
  out[at] = static_cast<T>(value);
}

inline int product_splits(const Rows& a, const Rows& b) { return splits_for(tiles_of({a, b, false, 0}), a.width); }

template <typename T>
void start_row_products(const Rows& a, const Rows& b, bool cosines, void* workspace, void* of_a, void* of_b, void* out,
                        cudaStream_t stream) {
  const int64_t n = a.count, m = b.count;
  if (n + m == 0) return;
  T *row_a = static_cast<T*>(of_a), *row_b = static_cast<T*>(of_b), *partial = static_cast<T*>(workspace);
  square_kernel<T><<<n + m, kRowThreads, 0, stream>>>(a, b, cosines, row_a, row_b);
  check_launch("gram squares");
  if (n * m == 0) return;
  ProductTable table{};
  table.count = 1;
  table.splits = product_splits(a, b);
  table.items[0] = {a, b, false, 0};
  start_products(table, partial, stream);
  product_sum_kernel<T><<<ceil_div(n * m, kThreads), kThreads, 0, stream>>>(
      partial, table.splits, n, m, cosines ? row_a : nullptr, cosines ? row_b : nullptr, static_cast<T*>(out));
  check_launch("gram product sum");
}

template <typename T>
void products(const Products& x, cudaStream_t stream) {
  start_row_products<T>(x.a, x.b, false, x.workspace, x.squares_a, x.squares_b, x.products, stream);
}

template <typename T>
void cosine_forward(const CosineForward& x, cudaStream_t stream) {
  start_row_products<T>(x.a, x.b, true, x.workspace, x.inverse_a, x.inverse_b, x.similarity, stream);
}

// A block per row, then per column, of dS * S: its sum
template <typename T>
__global__ void inner_kernel(const T* grad, const T* similarity, int64_t n, int64_t m, double* inner) {
  __shared__ double shared[32];
  const bool column = blockIdx.x >= n;
  const int64_t first = column ? blockIdx.x - n : blockIdx.x * m, step = column ? m : 1, count = column ? n : m;
  double sum = 0;
  for (int64_t k = threadIdx.x; k < count; k += blockDim.x)
    sum += double(grad[first + k * step]) * double(similarity[first + k * step]);
  sum = reduce_block(sum, shared, 0.0, Add());
  if (threadIdx.x == 0) inner[blockIdx.x] = sum;
}

template <typename T>
const T* numbers(const void* data) {
  return static_cast<const T*>(data);
}

template <typename T>
void cosine_backward(const CosineBackward& x, cudaStream_t stream) {
  const int64_t n = x.a.count, m = x.b.count;
  if (n + m == 0) return;
  double* inner = static_cast<double*>(x.workspace);
  inner_kernel<T><<<n + m, kRowThreads, 0, stream>>>(numbers<T>(x.grad), numbers<T>(x.similarity), n, m, inner);
  check_launch("cosine inner products");
  WeightedTable<T> table{};
  table.count = 2;
  table.items[0] = {numbers<T>(x.grad), m,   1,   numbers<T>(x.inverse_b), nullptr,
                    x.b,                x.a, numbers<T>(x.inverse_a), inner, x.grad_a};
  table.items[1] = {numbers<T>(x.grad), 1,   m,   numbers<T>(x.inverse_a), nullptr,
                    x.a,                x.b, numbers<T>(x.inverse_b), inner + n, x.grad_b};
  start_weighted(table, stream);
}

}  // namespace

int64_t workspace(const Grams& x) {
  return Partial(x.features, x.count, x.batch).numbers() * (x.fp64 ? 8 : 4);
}

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
