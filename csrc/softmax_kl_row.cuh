// Rows of softmax_kl on CUDA: which threads share one, and how they read and write it, 16 bytes at a time.
#pragma once

#include "softmax_kl_gradient.h"
#include "softmax_kl_packs.cuh"

namespace kd {
namespace cuda {
namespace {

constexpr int kMostSums = 5;  // that a team makes at once

// The threads that share a row: a power of two of neighbouring lanes, or a whole block. A team behind the last row is
// not real: it has the last row's number, touches nothing and meets the others, as all lanes of a warp must.
struct Team {
  int size, rank;
  int64_t row;
  bool real;
  double* shared;  // [32 * kMostSums]

  __device__ Team(int width, int64_t rows, double* memory) : size(width), shared(memory) {
    rank = threadIdx.x % width;
    const int64_t of_thread = int64_t(blockIdx.x) * (blockDim.x / width) + threadIdx.x / width;
    real = of_thread < rows;
    row = real ? of_thread : rows - 1;
  }
  __device__ bool block() const { return size > 32; }
  __device__ void wait() const { block() ? __syncthreads() : __syncwarp(); }

  template <typename T, int N>
  __device__ void sum(const T (&x)[N], double (&total)[N]) const {
    T of_lanes[N];
    for (int i = 0; i < N; ++i) of_lanes[i] = x[i];
    over_lanes(of_lanes, Add());
    for (int i = 0; i < N; ++i) total[i] = of_lanes[i];
    if (block()) over_warps(total, 0.0, Add());
  }
  template <typename T>
  __device__ double sum(T x) const {
    double total[1];
    sum({x}, total);
    return total[0];
  }
  template <typename T, int N>
  __device__ void max(T (&x)[N]) const {
    over_lanes(x, Max());
    if (!block()) return;
    double most[N];
    for (int i = 0; i < N; ++i) most[i] = x[i];
    over_warps(most, -infinity<double>(), Max());
    for (int i = 0; i < N; ++i) x[i] = static_cast<T>(most[i]);
  }

 private:
  template <typename T, int N, typename Op>
  __device__ void over_lanes(T (&x)[N], Op op) const {
    for (int offset = (block() ? 32 : size) / 2; offset > 0; offset /= 2)
#pragma unroll
      for (int i = 0; i < N; ++i) x[i] = op(x[i], __shfl_xor_sync(0xffffffffu, x[i], offset));
  }
  template <int N, typename Op>
  __device__ void over_warps(double (&x)[N], double identity, Op op) const {
    static_assert(N <= kMostSums, "more than there is room for");
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    __syncthreads();  // whoever used `shared` before is done
    for (int i = 0; i < N; ++i)
      if (lane == 0) shared[32 * i + warp] = x[i];
    __syncthreads();
    for (int i = 0; i < N; ++i) x[i] = lane < size / 32 ? shared[32 * i + lane] : identity;
    over_lanes(x, op);
  }
};

// A row of a tensor: number k is at first + k.
struct Line {
  void* data;
  DType type;
  int64_t first;
};

__device__ inline Line student_of(const SoftmaxKl& x, int64_t row) {
  return {const_cast<void*>(x.student), x.student_type, row * x.student_stride};
}
__device__ inline Line teacher_of(const SoftmaxKl& x, int64_t row) {
  return {const_cast<void*>(x.teacher), x.teacher_type, row * x.teacher_stride};
}
__device__ inline Line gradient_of(const SoftmaxKlBackward& x, int64_t row) {
  return {x.out, x.student_type, row * x.classes};
}

// ---- layouts: which classes are in pack v of a row. Of those outside the row logits are -inf, and nothing is stored.

// All tensors are of dtype D and equally far from 16-byte boundaries: packs are the memory between two of these, of
// which a row's first and last may have to be read number by number.
template <DType D>
struct Aligned {
  using Format = Pack<D>;
  using T = typename Format::T;
  static constexpr int count = Format::count, bytes = 16 / count;
  static constexpr bool aligned = true;
  int classes, phase;  // numbers between the boundary before the row and the row

  __device__ Aligned(const SoftmaxKl& x, int64_t row)
      : classes(static_cast<int>(x.classes)),
        phase(static_cast<int>((reinterpret_cast<uintptr_t>(x.student) / bytes + row * x.student_stride) % count)) {}
  __device__ int packs() const { return (phase + classes + count - 1) / count; }
  __device__ int index(int v, int j) const { return v * count + j - phase; }
  __device__ int pack_of(int64_t k) const { return static_cast<int>(k + phase) / count; }
  __device__ bool whole(int k) const { return k >= 0 && k + count <= classes; }
  __device__ T at(const Line& line, int64_t k) const { return element<T>(D, line.data, line.first + k); }
  __device__ uint4 load(const Line& line, int v) const {
    const int k = index(v, 0);
    if (whole(k))
      return *reinterpret_cast<const uint4*>(static_cast<const char*>(line.data) + bytes * (line.first + k));
    uint4 pack = {};
#pragma unroll 1
    for (int j = 0; j < count; ++j)
      Format::push(pack, k + j >= 0 && k + j < classes ? at(line, k + j) : -infinity<T>());
    return pack;
  }
  __device__ void store(const Line& out, int v, uint4 pack) const {
    const int k = index(v, 0);
    if (whole(k)) {
      *reinterpret_cast<uint4*>(static_cast<char*>(out.data) + bytes * (out.first + k)) = pack;
      return;
    }
#pragma unroll 1
    for (int j = 0; j < count; ++j) {
      const T x = Format::pop(pack);
      if (k + j >= 0 && k + j < classes) kd::cuda::store<T>(D, out.data, out.first + k + j, x);
    }
  }
};

// Tensors of any dtypes at any addresses, number by number: pack v has the classes v, v + stride, v + 2 stride ...
template <typename Number>
struct Scattered {
  using T = Number;
  using Format = Pack<sizeof(T) == 4 ? DType::f32 : DType::f64>;
  static constexpr int count = Format::count;
  static constexpr bool aligned = false;
  int classes, stride;

  __device__ Scattered(const SoftmaxKl& x, int64_t)
      : classes(static_cast<int>(x.classes)), stride((classes + count - 1) / count) {}
  __device__ int packs() const { return stride; }
  __device__ int index(int v, int j) const { return j * stride + v; }
  __device__ int pack_of(int64_t k) const { return static_cast<int>(k) % stride; }
  __device__ T at(const Line& line, int64_t k) const { return element<T>(line.type, line.data, line.first + k); }
  __device__ uint4 load(const Line& line, int v) const {
    uint4 pack = {};
    for (int j = 0; j < count; ++j) Format::push(pack, index(v, j) < classes ? at(line, index(v, j)) : -infinity<T>());
    return pack;
  }
  __device__ void store(const Line& out, int v, uint4 pack) const {
    for (int j = 0; j < count; ++j) {
      const T x = Format::pop(pack);
      if (index(v, j) < classes) kd::cuda::store<T>(out.type, out.data, out.first + index(v, j), x);
    }
  }
};

// A row's logits of one network by class, for the few that are needed by name
template <typename Layout>
struct Logits {
  const Layout layout;
  const Line line;
  __device__ typename Layout::T operator[](int64_t k) const { return layout.at(line, k); }
};

// ---- a row of both networks, as the threads of a team see it. KEEP: later sweeps read it from shared memory, where
// each thread puts the packs that are its own, so that nobody waits for anybody.
template <typename Layout, bool KEEP>
class Row {
 public:
  using T = typename Layout::T;
  using Format = typename Layout::Format;
  static constexpr int count = Layout::count;
  const Layout layout;
  const Team& team;
  int label_a = -1, label_b = -1;  // the packs that hold the labels

  // Of a row that does not count nothing is read. `kept`: this thread's place, or null.
  __device__ Row(const SoftmaxKl& x, const Team& its_team, const Labels& l, uint4* kept)
      : layout(x, its_team.row),
        team(its_team),
        s_(student_of(x, its_team.row)),
        t_(teacher_of(x, its_team.row)),
        packs_(its_team.real && l.keep && l.valid ? layout.packs() : 0),
        soft_(x.soft()),
        kept_(kept) {
    if (l.a < 0 || !packs_) return;
    label_a = layout.pack_of(l.a);
    label_b = layout.pack_of(l.b);
  }

  __device__ bool counts() const { return packs_ > 0; }
  __device__ Logits<Layout> student() const { return {layout, s_}; }
  __device__ Logits<Layout> teacher() const { return {layout, t_}; }

  // f(v, pack of the student, pack of the teacher) for the packs of this thread
  template <typename F>
  __device__ void each_pack(const F& f) {
    uint4 a, b;
    for (int v = team.rank, slot = threadIdx.x; v < packs_; v += team.size, slot += 2 * blockDim.x) {
      fetch(v, slot, a, b);
      f(v, a, b);
    }
    on_chip_ = KEEP && kept_;
  }

  // f(k, logit of the student, logit of the teacher) for the classes of this thread
  template <typename F>
  __device__ void each_class(const F& f) {
    each_pack([&](int v, uint4 a, uint4 b) {
#pragma unroll 1
      for (int j = 0; j < count; ++j) {
        const T x = Format::pop(a), y = Format::pop(b);
        const int k = layout.index(v, j);
        if (k >= 0 && k < layout.classes) f(k, x, y);
      }
    });
  }

 private:
  const Line s_, t_;
  const int packs_;
  const bool soft_;
  uint4* const kept_;
  bool on_chip_ = false;

  // Without terms that need the teacher the student stands in for it.
  __device__ void fetch(int v, int slot, uint4& a, uint4& b) const {
    if (KEEP && on_chip_) {
      a = kept_[slot];
      b = kept_[slot + blockDim.x];
      return;
    }
    a = layout.load(s_, v);
    b = soft_ ? layout.load(t_, v) : a;
    if (KEEP && kept_) {
      kept_[slot] = a;
      kept_[slot + blockDim.x] = b;
    }
  }
};

}  // namespace
}  // namespace cuda
}  // namespace kd
