// Gram matrices on CUDA, up to sixteen in a launch. Those of a training batch are few output tiles from many columns,
// so the columns are split until the blocks fill the GPU: each makes one tile of one part, and leaves it to the next
// launch to add up the parts in their order.
#pragma once

#include "cuda.h"
#include "product_loops.cuh"

namespace kd {
namespace cuda {
namespace {

constexpr int64_t kTables = 16;  // matrices or layers of a launch; their table is passed by value
// Of an H100: a constant, so that sums do not depend on the GPU.
constexpr int64_t kMultiprocessors = 132;

// A number type for a launch: that of all the rows, or float if they differ.
inline DType common_type(const Rows* rows, int64_t count) {
  for (int64_t i = 1; i < count; ++i)
    if (rows[i].type != rows[0].type) return DType::f32;
  return count ? rows[0].type : DType::f32;
}

template <typename L>
struct Choice {
  using Loop = L;
};

// Calls f with the main loop for these rows: on tensor cores, in tiles of 128 for many rows, or in fp64.
template <typename F>
void with_loop(DType type, bool fp64, bool large, const F& f) {
  const auto with_side = [&](auto number) {
    using N = decltype(number);
    large ? f(Choice<TensorLoop<N, 128>>()) : f(Choice<TensorLoop<N, 64>>());
  };
  if (fp64) return f(Choice<PlainLoop>());
  if (type == DType::bf16) return with_side(__nv_bfloat16());
  type == DType::f16 ? with_side(__half()) : with_side(float());
}

// Above 48 KB a kernel has to ask for its shared memory.
template <typename Kernel>
void allow_shared(Kernel* kernel, int bytes) {
  if (bytes > 48 << 10)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), "shared memory");
}

template <typename Table>
__device__ inline int item_of(const Table& table, int64_t block) {
  int i = 0;
  while (i + 1 < table.count && block >= table.first_block[i + 1]) ++i;
  return i;
}

// There is a tile for the squares of a's rows even if b has none, and the other way round.
__host__ __device__ inline int64_t columns_of_tiles(const Factors& p, int64_t side) {
  return max<int64_t>(1, ceil_div(p.b.count, side));
}

__host__ __device__ inline int64_t tiles_of(const Factors& p, int64_t side) {
  const int64_t rows = max<int64_t>(1, ceil_div(p.a.count, side));
  return p.symmetric ? rows * (rows + 1) / 2 : rows * columns_of_tiles(p, side);
}

// The upper left corner of a tile; of a symmetric product row r has r + 1 tiles.
__device__ inline Part corner(const Factors& p, int64_t tile, int64_t side) {
  Part part{};
  if (p.symmetric) {
    while (tile > part.row) tile -= ++part.row;
    part.column = tile;
  } else {
    const int64_t columns = columns_of_tiles(p, side);
    part.row = tile / columns;
    part.column = tile % columns;
  }
  part.row *= side;
  part.column *= side;
  return part;
}

// How many columns a part has, `work` being those of all tiles together: so many that all parts run at once, 256 at
// least, as each part is written and read again, and 8192 at most, as what two Grams differ by would drown in the
// rounding of longer fp32 sums.
inline int64_t part_columns(int64_t work, int64_t blocks, int64_t step) {
  return round_up(min<int64_t>(8192, max<int64_t>(256, ceil_div(work, blocks))), step);
}

// ---- what the launch leaves: T [batch, pitch] of every part of every matrix ----

template <typename T>
struct Parts {
  T* data;
  int64_t pitch, splits;  // rows are a multiple of 16 bytes long
};

struct Partials {
  int64_t batch, columns, numbers = 0;
  bool large;
  Partials(const Rows* features, int64_t count, int64_t batch, bool fp64) : batch(batch), large(batch > 64 && !fp64) {
    const Rows rows{nullptr, DType::f32, batch, 0, 0};
    const int64_t tiles = tiles_of({rows, rows, true, false}, side());
    int64_t work = 0;
    for (int64_t i = 0; i < count; ++i) work += tiles * features[i].width;
    columns = part_columns(work, (large ? 1 : 2) * kMultiprocessors, 64);
    for (int64_t i = 0; i < count; ++i) numbers += splits(features[i]) * size();
  }
  int64_t side() const { return large ? 128 : 64; }
  int64_t pitch() const { return round_up(batch, 4); }
  int64_t size() const { return batch * pitch(); }
  int64_t splits(const Rows& q) const { return max<int64_t>(1, ceil_div(q.width, columns)); }
};

template <typename T>
struct ProductTable {
  Factors items[kTables];
  Parts<T> parts[kTables];
  int64_t first_block[kTables + 1], columns;
  unsigned long long* counters;  // of the next launch: they become 0
  int count, counts;
};

// Two neighbours in row r, as far as they are in the lower half: there and, mirrored, in the upper one. What pads the
// rows to 16 bytes is the mirror image of rows that are not there, which is 0.
template <typename T>
__device__ inline void store_lower(T* out, int64_t n, int64_t pitch, int64_t r, int64_t c, T first, T second) {
  struct alignas(2 * sizeof(T)) Pair {
    T first, second;
  };
  if (r < n && c < r) *reinterpret_cast<Pair*>(out + r * pitch + c) = {first, second};
  if (r < n && c == r) out[r * pitch + c] = first;
  if (r < pitch && c < r && c < n) out[c * pitch + r] = first;
  if (r < pitch && c + 1 < r && c + 1 < n) out[(c + 1) * pitch + r] = second;
}

// Neighbouring blocks have the same columns, which the second of them finds in L2.
template <typename Loop>
__global__ void __launch_bounds__(Loop::kThreads, Loop::kResident)
    product_kernel(const __grid_constant__ ProductTable<typename Loop::Sum> table) {
  extern __shared__ __align__(16) char shared[];
  using T = typename Loop::Sum;
  if (blockIdx.x == 0 && threadIdx.x < table.counts) table.counters[threadIdx.x] = 0;
  const int i = item_of(table, blockIdx.x);
  const Factors& p = table.items[i];
  const int64_t block = blockIdx.x - table.first_block[i], tiles = tiles_of(p, Loop::kSide);
  Part part = corner(p, block % tiles, Loop::kSide);
  part.begin = block / tiles * table.columns;
  part.end = min(p.a.width, part.begin + table.columns);
  Loop loop;
  loop.template run<false>(p, part, shared);
  const int64_t n = p.a.count, pitch = table.parts[i].pitch;
  T* out = table.parts[i].data + block / tiles * n * pitch;
  loop.each([&](int row, int column, T first, T second) {
    store_lower(out, n, pitch, part.row + row, part.column + column, first, second);
  });
}

// `first` is where the partial products start; `counters` may be null. Afterwards parts(i) tells where those of matrix
// i are.
template <typename T, typename Use>
void start_products(const Rows* features, int64_t count, const Partials& layout, T* first, unsigned long long* counters,
                    int64_t counts, cudaStream_t stream, const Use& use) {
  for (int64_t begin = 0; begin < count; begin += kTables) {
    ProductTable<T> table{};
    table.columns = layout.columns;
    table.counters = counters;
    table.counts = static_cast<int>(begin == 0 && counters ? counts : 0);
    table.count = static_cast<int>(min(kTables, count - begin));
    const DType type = common_type(features + begin, table.count);
    with_loop(type, sizeof(T) == 8, layout.large, [&](auto choice) {
      using Loop = typename decltype(choice)::Loop;
      if constexpr (sizeof(T) == sizeof(typename Loop::Sum)) {
        for (int i = 0; i < table.count; ++i) {
          const Rows& q = features[begin + i];
          table.items[i] = {q, q, true, in_whole_chunks<typename Loop::Number>(q)};
          table.parts[i] = {first, layout.pitch(), layout.splits(q)};
          use(begin + i, table.parts[i]);
          first += layout.splits(q) * layout.size();
          table.first_block[i + 1] = table.first_block[i] + tiles_of(table.items[i], Loop::kSide) * layout.splits(q);
        }
        if (table.first_block[table.count] == 0) return;
        allow_shared(product_kernel<Loop>, Loop::kShared);
        product_kernel<Loop><<<table.first_block[table.count], Loop::kThreads, Loop::kShared, stream>>>(table);
        check_launch("gram product");
      }
    });
  }
}

}  // namespace
}  // namespace cuda
}  // namespace kd
