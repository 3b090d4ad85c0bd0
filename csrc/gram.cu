// gram on CUDA. The Gram matrices of a training batch are few output tiles from many columns, so the columns are split:
//   product   a block per (matrix, 64 x 64 tile, split): partial inner products; only the lower half of a symmetric matrix
//   row       a block per row: sums the splits, normalises, forms the loss and H (or scales the cosines)
//   weights   W = H + H^T;  sum: the rows' losses in a fixed order
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

struct Product {
  Rows a, b;
  bool symmetric;
  int64_t partial;  // where the [splits, a.count, b.count] partial products start
};

struct Products {
  Product items[kTables];
  int64_t first_block[kTables + 1];
  int count, splits;
};

template <typename Table>
__device__ inline int item_of(const Table& table, int64_t block) {
  int i = 0;
  while (i + 1 < table.count && block >= table.first_block[i + 1]) ++i;
  return i;
}

__host__ __device__ inline int64_t tiles_of(const Product& p) {
  const int64_t rows = ceil_div(p.a.count, kTile), columns = ceil_div(p.b.count, kTile);
  return p.symmetric ? rows * (rows + 1) / 2 : rows * columns;
}

template <typename T>
__device__ inline T element(const Rows& q, int64_t row, int64_t column, int64_t end) {
  return row < q.count && column < end ? load<T>(q.type, q.data, row * q.stride + column) : T(0);
}

template <typename T>
__global__ void __launch_bounds__(kThreads) product_kernel(const __grid_constant__ Products table, T* partial) {
  __shared__ T tile_a[kDepth][kTile + 1], tile_b[kDepth][kTile + 1];
  const int i = item_of(table, blockIdx.x);
  const Product& p = table.items[i];
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
  const int64_t begin = split * step, end = smaller(p.a.width, begin + step);
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
  const int64_t wanted = ceil_div(kWantedBlocks, larger(tiles, 1)), room = ceil_div(width, 128);
  return static_cast<int>(larger(ceil_div(width, 4096), larger(1, smaller(smaller(wanted, room), 64))));
}

template <typename T>
void start_products(Products& table, T* partial, cudaStream_t stream) {
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

// ---- similarity-preserving loss ----

struct SpScratch {  // T partial [2 layers, splits, B, B], K [2 layers, B, B], H [layers, B, B]; double losses [layers, B]
  int64_t size, matrices;
  int splits;
  explicit SpScratch(const SpGram& x) : size(x.batch * x.batch), matrices(2 * x.count) {
    int64_t tiles = 0, width = 1;
    for (int64_t i = 0; i < x.count; ++i) {
      tiles += 2 * tiles_of({x.layers[i].student, x.layers[i].student, true, 0});
      width = larger(width, larger(x.layers[i].student.width, x.layers[i].teacher.width));
    }
    splits = splits_for(tiles, width);
  }
  int64_t gram() const { return matrices * splits * size; }
  int64_t h() const { return gram() + matrices * size; }
  int64_t end() const { return h() + matrices / 2 * size; }
  int64_t bytes(int64_t item) const { return ceil_div(end() * item, 8) * 8; }
};

struct SpConstants {
  int64_t batch;
  double scale, eps;
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

// A block per (layer, row). Every column belongs to one thread throughout.
template <typename T>
__global__ void sp_row_kernel(const SpConstants c, const T* partial, T* gram, T* h, double* losses) {
  __shared__ double shared[32];
  const int64_t n = c.batch, size = n * n, layer = blockIdx.x / n, i = blockIdx.x % n;
  T *k_s = gram + 2 * layer * size + i * n, *k_t = k_s + size;
  for (int network = 0; network < 2; ++network)
    for (int64_t j = threadIdx.x; j < n; j += blockDim.x) {
      const int64_t at = j <= i ? i * n + j : j * n + i;  // the lower half is all there is
      (network ? k_t : k_s)[j] =
          static_cast<T>(product_at(partial + (2 * layer + network) * c.splits * size, size, c.splits, at));
    }
  const double norm_s = row_norm(k_s, n, c.l1, shared), norm_t = row_norm(k_t, n, c.l1, shared);
  const double by_s = norm_s < c.eps ? c.eps : norm_s, by_t = norm_t < c.eps ? c.eps : norm_t;
  double loss = 0, inner = 0;
  for (int64_t j = threadIdx.x; j < n; j += blockDim.x) {
    const double g = k_s[j] / by_s, difference = g - k_t[j] / by_t;
    loss += difference * difference;
    inner += 2 * c.scale * difference * g;
  }
  loss = reduce_block(loss, shared, 0.0, Add());
  inner = reduce_block(inner, shared, 0.0, Add());
  if (threadIdx.x == 0) losses[blockIdx.x] = loss;
  if (!h) return;
  if (norm_s < c.eps) inner = 0;                          // below eps the norm is a constant
  const bool dead = norm_s == 0 && !c.zero_row_grad;  // an all-zero row has no direction to normalise
  for (int64_t j = threadIdx.x; j < n; j += blockDim.x) {
    const double g = k_s[j] / by_s, r = 2 * c.scale * (g - k_t[j] / by_t);
    const double direction = c.l1 ? (k_s[j] > T(0)) - (k_s[j] < T(0)) : g;
    h[layer * size + i * n + j] = dead ? T(0) : static_cast<T>((r - inner * direction) / by_s);
  }
}

template <typename T>
__global__ void sp_weights_kernel(const T* h, int64_t n, int64_t total, T* weights) {
  const int64_t at = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (at >= total) return;
  const int64_t layer = at / (n * n), i = at / n % n, j = at % n;
  weights[at] = h[at] + h[layer * n * n + j * n + i];
}

template <typename T>
__global__ void sp_sum_kernel(const double* losses, int64_t count, double scale, T* out) {
  __shared__ double shared[32];
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) sum += losses[i];
  sum = reduce_block(sum, shared, 0.0, Add());
  if (threadIdx.x == 0) *out = static_cast<T>(scale * sum);
}

template <typename T>
void sp_forward_as(const SpGram& x, cudaStream_t stream) {
  const SpScratch scratch(x);
  T* data = static_cast<T*>(x.workspace);
  double* losses = reinterpret_cast<double*>(static_cast<char*>(x.workspace) + scratch.bytes(sizeof(T)));
  for (int64_t begin = 0; begin < scratch.matrices; begin += kTables) {
    Products table{};
    table.splits = scratch.splits;
    table.count = static_cast<int>(smaller(kTables, scratch.matrices - begin));
    for (int i = 0; i < table.count; ++i) {
      const SpLayer& layer = x.layers[(begin + i) / 2];
      const Rows& q = (begin + i) % 2 ? layer.teacher : layer.student;
      table.items[i] = {q, q, true, (begin + i) * scratch.splits * scratch.size};
    }
    start_products(table, data, stream);
  }
  const int64_t rows = x.count * x.batch;
  if (rows > 0) {
    const SpConstants c{x.batch, x.scale, x.eps, x.l1, x.zero_row_grad, scratch.splits};
    T* h = x.weights ? data + scratch.h() : nullptr;
    sp_row_kernel<T><<<rows, kRowThreads, 0, stream>>>(c, data, data + scratch.gram(), h, losses);
    check_launch("gram row");
    if (x.weights) {
      const int64_t total = rows * x.batch;
      sp_weights_kernel<T><<<ceil_div(total, kThreads), kThreads, 0, stream>>>(h, x.batch, total, static_cast<T*>(x.weights));
      check_launch("gram weights");
    }
  }
  sp_sum_kernel<T><<<1, kThreads, 0, stream>>>(losses, rows, x.scale, static_cast<T*>(x.loss));
  check_launch("gram sum");
}

template <typename T>
void sp_backward_as(const SpGram& x, cudaStream_t stream) {
  for (int64_t begin = 0; begin < x.count; begin += kTables) {
    WeightedTable<T> table{};
    table.count = static_cast<int>(smaller(kTables, x.count - begin));
    for (int i = 0; i < table.count; ++i) {
      const SpLayer& layer = x.layers[begin + i];
      const T* w = static_cast<const T*>(x.weights) + (begin + i) * x.batch * x.batch;
      table.items[i] = {w,       x.batch, 1,       nullptr, static_cast<const T*>(x.grad), layer.student, layer.student,
                        nullptr, nullptr, layer.out};
    }
    start_weighted(table, stream);
  }
}

// ---- cosine similarities ----

// A block per row of a, then of b: 1 / max(|row|, 1e-8)
template <typename T>
__global__ void inverse_norm_kernel(const Rows a, const Rows b, T* inverse_a, T* inverse_b) {
  __shared__ double shared[32];
  const bool second = blockIdx.x >= a.count;
  const Rows& q = second ? b : a;
  const int64_t i = second ? blockIdx.x - a.count : blockIdx.x;
  double sum = 0;
  for (int64_t k = threadIdx.x; k < q.width; k += blockDim.x) {
    const double v = static_cast<double>(load<T>(q.type, q.data, i * q.stride + k));
    sum += v * v;
  }
  const double norm = sqrt(reduce_block(sum, shared, 0.0, Add()));
  if (threadIdx.x == 0) (second ? inverse_b : inverse_a)[i] = static_cast<T>(1 / (norm < 1e-8 ? 1e-8 : norm));
}

template <typename T>
__global__ void similarity_kernel(const T* partial, int splits, int64_t n, int64_t m, const T* inverse_a,
                                  const T* inverse_b, T* similarity) {
  const int64_t at = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (at >= n * m) return;
  similarity[at] = static_cast<T>(product_at(partial, n * m, splits, at) * double(inverse_a[at / m]) *
                                  double(inverse_b[at % m]));
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

inline int cosine_splits(const Cosine& x) { return splits_for(tiles_of({x.a, x.b, false, 0}), x.a.width); }

template <typename T>
void cosine_forward_as(const Cosine& x, cudaStream_t stream) {
  const int64_t n = x.a.count, m = x.b.count;
  if (n + m == 0) return;
  T* inverse_a = static_cast<T*>(x.inverse_a);
  T* inverse_b = static_cast<T*>(x.inverse_b);
  inverse_norm_kernel<T><<<n + m, kRowThreads, 0, stream>>>(x.a, x.b, inverse_a, inverse_b);
  check_launch("cosine norms");
  if (n * m == 0) return;
  Products table{};
  table.count = 1;
  table.splits = cosine_splits(x);
  table.items[0] = {x.a, x.b, false, 0};
  T* partial = static_cast<T*>(x.workspace);
  start_products(table, partial, stream);
  similarity_kernel<T><<<ceil_div(n * m, kThreads), kThreads, 0, stream>>>(partial, table.splits, n, m, inverse_a,
                                                                        inverse_b, static_cast<T*>(x.similarity));
  check_launch("cosine similarities");
}

template <typename T>
void cosine_backward_as(const Cosine& x, cudaStream_t stream) {
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

int64_t sp_workspace(const SpGram& x, bool fp64) {
  return SpScratch(x).bytes(fp64 ? 8 : 4) + 8 * x.count * x.batch;
}

int64_t cosine_workspace(const Cosine& x) {  // forward: partial products; backward: n + m inner products
  return larger(8 * int64_t(cosine_splits(x)) * x.a.count * x.b.count, 8 * (x.a.count + x.b.count));
}

void sp_forward(const SpGram& x, bool fp64, const Launch& launch) {
  fp64 ? sp_forward_as<double>(x, launch.stream()) : sp_forward_as<float>(x, launch.stream());
}

void sp_backward(const SpGram& x, bool fp64, const Launch& launch) {
  fp64 ? sp_backward_as<double>(x, launch.stream()) : sp_backward_as<float>(x, launch.stream());
}

void cosine_forward(const Cosine& x, bool fp64, const Launch& launch) {
  fp64 ? cosine_forward_as<double>(x, launch.stream()) : cosine_forward_as<float>(x, launch.stream());
}

void cosine_backward(const Cosine& x, bool fp64, const Launch& launch) {
  fp64 ? cosine_backward_as<double>(x, launch.stream()) : cosine_backward_as<float>(x, launch.stream());
}

}  // namespace cuda
}  // namespace kd
