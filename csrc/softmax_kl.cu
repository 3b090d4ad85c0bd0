// softmax_kl on CUDA. Every row is read once forward and once backward, 16 bytes at a time where the tensors' layout
// allows.
//
//   softmax_kl_packs.cuh     16 bytes and the numbers in them
//   softmax_kl_row.cuh       the threads of a row, from one lane to a block; layouts; sweeps over a row
//   softmax_kl_sums.cuh      the one sweep that gives the forward KL, CE and the decoupled terms
//   softmax_kl_sweeps.cuh    what takes further sweeps, over a copy of the row in shared memory
//   softmax_kl_gradient.cuh  the gradient
//
// A kernel is compiled for each dtype, and for tensors of different dtypes or alignment (Scattered); once for the terms
// of the one sweep (PLAIN) and once for everything. A last small kernel sums the rows in a fixed order.
#include <type_traits>

#include "cuda.h"
#include "softmax_kl_gradient.cuh"

namespace kd {
namespace cuda {
namespace {

constexpr int kWarpThreads = 128, kSumThreads = 1024;
constexpr int64_t kFill = 132 * 512;  // threads that keep a GPU busy
constexpr int64_t kMostClasses = int64_t(1) << 30;

// Threads that a block can have, by the registers that its kernel needs: 64, 128 or 255
template <typename Layout, bool PLAIN>
constexpr int kMostThreads = PLAIN                             ? 1024
                             : sizeof(typename Layout::T) == 4 ? 512
                                                               : 256;

// How rows share threads: up to 8 packs to a lane of a warp and 16 to a thread of a block, 8 where a copy of the
// rows in shared memory leaves room for few blocks; fewer where there are few rows.
struct Shape {
  int width = 1, threads, slots;
  int64_t blocks, partials;  // sums of rows that the forward kernel leaves

  Shape(int64_t rows, int64_t packs, int most_threads) {
    const int per_thread = most_threads == 1024 ? 16 : 8, usual = most_threads == 1024 ? 256 : most_threads;
    while (width < usual && width * (width < 32 ? 8 : per_thread) < packs) width *= 2;
    while (width < most_threads && rows * width < kFill && 2 * width <= packs) width *= 2;
    threads = width > 32 ? width : kWarpThreads;
    blocks = ceil_div(rows, threads / width);
    partials = width > 32 ? blocks : blocks * (threads / 32);
    slots = static_cast<int>(ceil_div(packs, width));
  }
};

// ---- kernels

// The sum of a warp's rows and how many count: one pair per warp, or per block that has one row
__device__ inline void leave_partial(const SoftmaxKl& x, const Team& team, double loss, bool kept) {
  const bool mine = team.real && team.rank == 0;
  const double sum = reduce_lanes(mine ? loss : 0.0, 32, Add()),
               count = reduce_lanes(mine && kept ? 1.0 : 0.0, 32, Add());
  if (threadIdx.x % 32) return;
  const int64_t at = team.block() ? int64_t(blockIdx.x) : int64_t(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
  double* const partial = static_cast<double*>(x.workspace) + 2 * at;
  partial[0] = sum;
  partial[1] = count;
}

template <typename Layout, bool PLAIN>
__global__ void __launch_bounds__(kMostThreads<Layout, PLAIN>, 1)
    forward_kernel(const __grid_constant__ SoftmaxKlForward x, int width, int keep) {
  using T = typename Layout::T;
  extern __shared__ uint4 kept[];
  __shared__ double shared[32 * kMostSums];
  const Team team(width, x.rows, shared);
  const Labels l = read_labels<T>(x, team.row);
  Row<Layout, !PLAIN> row(x, team, l, keep ? kept : nullptr);
  RowStats<T> r;
  double loss;
  if constexpr (PLAIN) {
    r.standardise(x, Spread(), Spread());
    loss = terms_of_sums<false>(x, row, l, r);
  } else {
    loss = any_terms(x, row, l, x.stats, r);
  }
  if (team.rank >= 32) return;
  if (!row.counts()) {
    r = RowStats<T>();
    loss = l.keep ? not_a_number<double>() : 0;
  }
  if (team.real && team.rank == 0) {
    save_stats(x, team.row, r);
    if (x.reduction == Reduction::none) static_cast<T*>(x.loss)[team.row] = static_cast<T>(loss);
  }
  leave_partial(x, team, loss, l.keep);
}

// One block: the sum of the rows, and the scale from the number of rows that count.
template <typename T>
__global__ void finish_kernel(const __grid_constant__ SoftmaxKlForward x, int64_t partials) {
  __shared__ double shared[32];
  double sum = 0, count = 0;
  for (int64_t i = threadIdx.x; i < partials; i += blockDim.x) {
    const double2 partial = static_cast<const double2*>(x.workspace)[i];
    sum += partial.x;
    count += partial.y;
  }
  sum = reduce_block(sum, shared, 0.0, Add());
  count = reduce_block(count, shared, 0.0, Add());
  if (threadIdx.x) return;
  const double scale = x.reduction == Reduction::mean ? 1 / (count > 1 ? count : 1) : 1;
  *static_cast<T*>(x.scale) = static_cast<T>(scale);
  if (x.reduction != Reduction::none) *static_cast<T*>(x.loss) = static_cast<T>(sum * scale);
}

template <typename Layout, bool PLAIN>
__global__ void __launch_bounds__(kMostThreads<Layout, PLAIN>, 1)
    backward_kernel(const __grid_constant__ SoftmaxKlBackward x, int width) {
  using T = typename Layout::T;
  __shared__ double shared[32 * kMostSums];
  const Team team(width, x.rows, shared);
  const Labels l = read_labels<T>(x, team.row);
  Row<Layout, false> row(x, team, l, nullptr);
  const RowStats<T> r = read_stats<T>(x, team.row);
  const double upstream =
      double(static_cast<const T*>(x.grad)[team.row * x.grad_stride]) * *static_cast<const T*>(x.scale);
  const double y_sum = !PLAIN && x.ce != 0 && x.dense ? sum_of_target(x, row) : 1;
  Factors<T> f = gradient_factors(x, r, upstream, y_sum);
  if constexpr (!PLAIN) {
    if (x.decoupled() && row.counts()) add_decoupled(x, l, row.student(), row.teacher(), r, upstream, f);
    if (x.decoupled() && x.out == x.student) team.wait();  // until all have read the labels' logits
  }
  if (!team.real) return;
  if (!row.counts()) fill(x, row, l.keep ? not_a_number<T>() : T(0));
  else if constexpr (PLAIN) write_packs<false>(x, row, l, r, f);
  else if (x.plain() && !x.dense) write_packs<true>(x, row, l, r, f);
  else write_classes(x, row, l, r, f);
}

// ---- launches

// Whether packs are the same memory in every tensor: of one dtype, equally far from 16-byte boundaries in every row
template <typename C>
bool is_aligned(const C& x, int64_t count) {
  const auto phase = [&](const void* data) {
    return reinterpret_cast<uintptr_t>(data) * static_cast<uintptr_t>(count) / 16 % static_cast<uintptr_t>(count);
  };
  bool same = x.student_type == x.teacher_type && phase(x.student) == phase(x.teacher) &&
              (x.student_stride - x.teacher_stride) % count == 0;
  if constexpr (std::is_same_v<C, SoftmaxKlBackward>)
    same = same && phase(x.out) == phase(x.student) && (x.student_stride - x.classes) % count == 0;
  return same;
}

// The most packs that a row can have
template <typename Layout>
int64_t most_packs(const SoftmaxKl& x) {
  const bool phases =
      Layout::aligned && (reinterpret_cast<uintptr_t>(x.student) % 16 || x.student_stride % Layout::count);
  return ceil_div(x.classes + (phases ? Layout::count - 1 : 0), Layout::count);
}

// A kernel's variant as a value
template <typename L, bool P>
struct Variant {
  using Layout = L;
  static constexpr bool plain = P;
  static Shape shape(const SoftmaxKl& x) { return Shape(x.rows, most_packs<L>(x), kMostThreads<L, P>); }
};

template <typename Layout, typename F>
auto choose_terms(const SoftmaxKl& x, const F& f) {
  const bool plain = x.plain() && !x.decoupled() && !x.dense && x.smoothing == 0;
  return plain ? f(Variant<Layout, true>()) : f(Variant<Layout, false>());
}

template <typename C, typename F>
auto choose_variant(const C& x, const F& f) {
  if (x.classes > kMostClasses) throw std::runtime_error("kdkernels: more classes than 32-bit indices reach");
  if (x.fp64) return f(Variant<Scattered<double>, false>());
  if (x.student_type == DType::f16 && is_aligned(x, 8)) return choose_terms<Aligned<DType::f16>>(x, f);
  if (x.student_type == DType::bf16 && is_aligned(x, 8)) return choose_terms<Aligned<DType::bf16>>(x, f);
  if (x.student_type == DType::f32 && is_aligned(x, 4)) return choose_terms<Aligned<DType::f32>>(x, f);
  return f(Variant<Scattered<float>, false>());
}

// Bytes for a copy of a block's rows in shared memory: 0 where none is read twice, or there is too little
inline size_t copy_of_rows(const SoftmaxKl& x, const Shape& shape) {
  if (x.plain() && !x.dense && x.smoothing == 0) return 0;
  const size_t bytes = size_t(shape.slots) * shape.threads * 2 * sizeof(uint4), sums = 8 * 32 * kMostSums;
  int device = 0, most = 0;
  check(cudaGetDevice(&device), "softmax_kl's device");
  check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "softmax_kl's shared memory");
  return bytes + sums <= size_t(most) ? bytes : 0;
}

template <typename V>
void forward(V, const SoftmaxKlForward& x, cudaStream_t stream) {
  using Layout = typename V::Layout;
  const Shape shape = V::shape(x);
  const size_t bytes = V::plain ? 0 : copy_of_rows(x, shape);
  if (bytes)
    check(cudaFuncSetAttribute(forward_kernel<Layout, V::plain>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(bytes)),
          "softmax_kl's shared memory");
  if (x.rows > 0)
    forward_kernel<Layout, V::plain><<<shape.blocks, shape.threads, bytes, stream>>>(x, shape.width, bytes > 0);
  check_launch("softmax_kl forward");
  finish_kernel<typename Layout::T><<<1, kSumThreads, 0, stream>>>(x, shape.partials);
  check_launch("softmax_kl sum");
}

template <typename V>
void backward(V, const SoftmaxKlBackward& x, cudaStream_t stream) {
  const Shape shape = V::shape(x);
  if (x.rows == 0) return;
  backward_kernel<typename V::Layout, V::plain><<<shape.blocks, shape.threads, 0, stream>>>(x, shape.width);
  check_launch("softmax_kl backward");
}

}  // namespace

int64_t workspace(const SoftmaxKlForward& x) {
  return 16 * choose_variant(x, [&](auto variant) { return decltype(variant)::shape(x).partials; });
}

void compute(const SoftmaxKlForward& x, const Launch& launch) {
  choose_variant(x, [&](auto variant) { forward(variant, x, launch.stream()); });
}

void compute(const SoftmaxKlBackward& x, const Launch& launch) {
  choose_variant(x, [&](auto variant) { backward(variant, x, launch.stream()); });
}

}  // namespace cuda
}  // namespace kd
