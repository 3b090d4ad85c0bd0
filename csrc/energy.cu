// energy and attention on CUDA: all layers in one launch per step.
//   energy     one read of each activation: sums of squares, in one part per pixel or several (energy_views.cuh)
//   attention  a block per sample: everything that happens on the small maps, and at the end the sum of all losses
//   backward   one read and one write of each student activation
#include "energy_maps.cuh"

namespace kd {
namespace cuda {
namespace {

constexpr int kMaps = 2;  // numbers per pixel: the energies of both networks, then unit maps
constexpr int kWidest = 8;

// ---- energies ----

// The sums of a block's threads, spread over the banks: number j of a thread's vector
template <int kSize>
__device__ inline int place(int thread, int j) {
  return j * (kThreads + 32 / kSize) + thread;
}

template <typename T, typename P>
__device__ void energies_of_columns(const Part& part, T* shared, T* sums) {
  const View& v = part.view();
  const Column at(part);
  T sum[P::kSize] = {};
  const auto add = [&](const P& p, int) {
#pragma unroll
    for (int j = 0; j < P::kSize; ++j) {
      const T x = number<T>(p.x[j]);
      sum[j] += x * x;
    }
  };
  read_ahead(static_cast<const P*>(v.data) + at.begin, at.count, at.step, add);
#pragma unroll
  for (int j = 0; j < P::kSize; ++j) shared[place<P::kSize>(threadIdx.x, j)] = sum[j];
  __syncthreads();
  // the slices one behind the other are rows of pixels, if the block has whole rows of vectors
  const int pixels = part.layer.pixels(), repeats = v.tiles == 1 ? v.repeats : 1;
  const int count = at.width * P::kSize / repeats, rows = at.slices * repeats;
  T* to = sums + (int64_t(part.sample) * v.parts() + part.chunk * v.unfolded()) * pixels + at.first * P::kSize;
  for (int i = threadIdx.x; i < count; i += kThreads) {
    T total = 0;
    for (int k = i; k < rows * count; k += count) total += shared[place<P::kSize>(k / P::kSize, k % P::kSize)];
    to[i] = total;
  }
}

template <typename T, typename P>
__device__ void energies_of_pixels(const Part& part, T* sums) {
  const Lanes lanes(part);
  T* to = sums + int64_t(part.sample) * part.layer.pixels();
  lanes.each([&](int pixel, int64_t begin, int count) {
    T sum = 0;
    const auto add = [&](const P& p, int) {
#pragma unroll
      for (int j = 0; j < P::kSize; ++j) {
        const T x = number<T>(p.x[j]);
        sum += x * x;
      }
    };
    read_ahead(static_cast<const P*>(lanes.view.data) + begin, count, lanes.count, add);
    sum = reduce_lanes(sum, lanes.count, Add());
    if (lanes.lane == 0 && pixel < lanes.end) to[pixel] = sum;
  });
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    energy_kernel(const __grid_constant__ Table table, T* sums, unsigned* arrived) {
  __shared__ T shared[kWidest * kThreads + 32];
  if (arrived && blockIdx.x == 0 && threadIdx.x == 0) *arrived = 0;
  const Part part(table, layer_of(table, blockIdx.x));
  T* to = sums + part.layer.sums[part.network];
  with_pack<T>(part.view().type, part.view().wide, [&](auto pack) {
    using P = decltype(pack);
    part.view().last ? energies_of_pixels<T, P>(part, to) : energies_of_columns<T, P>(part, shared, to);
  });
}

// Energies that are in parts
template <typename T>
__global__ void parts_kernel(const __grid_constant__ Table table, const T* sums, T* r) {
  const Sample at(table, layer_of(table, blockIdx.x));
  for (int n = threadIdx.x; n < at.pixels; n += blockDim.x) r[at.offset + n] = energy_at(sums, at, 0, n);
}

template <typename T>
void launch_energies(const Plan& plan, T* sums, unsigned* arrived, cudaStream_t stream) {
  plan.launch_views([&](const Table& table, int64_t blocks) {
    energy_kernel<T><<<blocks, kThreads, 0, stream>>>(table, sums, arrived);
    check_launch("energy");
  });
}

template <typename T>
void energies(const Energies& x, cudaStream_t stream) {
  const Plan plan(x, Networks::student);
  const bool whole = plan.sums() == plan.pixels();
  launch_energies(plan, static_cast<T*>(whole ? x.r : x.workspace), nullptr, stream);
  if (whole) return;
  plan.launch_samples([&](const Table& table, int64_t blocks) {
    parts_kernel<T><<<blocks, kThreads, 0, stream>>>(table, static_cast<T*>(x.workspace), static_cast<T*>(x.r));
    check_launch("parts of energies");
  });
}

// ---- attention ----

// A block per sample: every pixel belongs to one thread throughout, so that nothing but the sums needs a barrier.
template <typename T, bool kOnChip>
__global__ void __launch_bounds__(kMostThreads)
    attention_kernel(const __grid_constant__ Table table, const Samples<T> x, bool absolute) {
  extern __shared__ double on_chip[];
  __shared__ double shared[2 * 32];
  const Sample at(table, layer_of(table, blockIdx.x));
  T* unit = kOnChip ? reinterpret_cast<T*>(on_chip) : x.scratch.maps + at.offset * kMaps;
  T* difference = unit + at.pixels;
  double squares[2] = {};
  for (int n = threadIdx.x; n < at.pixels; n += blockDim.x) {
    const T s = energy_at(x.scratch.sums, at, 0, n), t = energy_at(x.scratch.sums, at, 1, n);
    unit[n] = s;
    difference[n] = t;
    squares[0] += double(s) * double(s);
    squares[1] += double(t) * double(t);
  }
  add_block(squares, shared);
  // the eps is for the energies' mean over the channels
  const double channels_s = max(at.layer.channels[0], 1), channels_t = max(at.layer.channels[1], 1);
  const double norm_s = sqrt(squares[0]), norm_t = sqrt(squares[1]);
  const double length_s = max(norm_s, kUnitEps * channels_s), length_t = max(norm_t, kUnitEps * channels_t);
  const Divisor<T> by_s(static_cast<T>(length_s)), by_t(static_cast<T>(length_t));
  T e = 0, inner = 0;
  for (int n = threadIdx.x; n < at.pixels; n += blockDim.x) {
    const T u = by_s.divide(unit[n]), d = u - by_t.divide(difference[n]);
    unit[n] = u;
    difference[n] = d;
    e += absolute ? fabs(d) : d * d;
    inner += sign(d) * u;
  }
  double sums[2] = {e, inner};
  add_block(sums, shared);
  const double c = at.pixels ? at.layer.factor / at.pixels : 0.0;
  if (x.kappa) {
    double along = 2 * along_unit(sums[0], norm_s / channels_s, norm_t / channels_t);
    if (absolute) along = norm_s < kUnitEps * channels_s ? 0 : sums[1];
    const T by = static_cast<T>(along), scale = static_cast<T>(2 * c / length_s);
    for (int n = threadIdx.x; n < at.pixels; n += blockDim.x) {
      const T d = difference[n];
      x.kappa[at.offset + n] = ((absolute ? sign(d) : 2 * d) - by * unit[n]) * scale;
    }
  }
  finish(x, at, c * sums[0], shared);
}

template <typename T>
void forward(const AttentionForward& x, cudaStream_t stream) {
  const auto start = [&](const Table& table, const Samples<T>& of, int64_t blocks, int threads, int64_t bytes) {
    ask_for_shared(attention_kernel<T, true>, bytes);
    if (bytes) attention_kernel<T, true><<<blocks, threads, bytes, stream>>>(table, of, x.absolute);
    else attention_kernel<T, false><<<blocks, threads, 0, stream>>>(table, of, x.absolute);
    check_launch("attention");
  };
  forward_pass<T>(x, kMaps, stream, start);
}

// ---- backward ----

template <typename T, typename P>
__device__ inline P scaled(const P& p, const T (&by)[P::kSize]) {
  P out;
#pragma unroll
  for (int j = 0; j < P::kSize; ++j) round_to(number<T>(p.x[j]) * by[j], out.x[j]);
  return out;
}

template <typename T, typename P>
__device__ void gradients_of_columns(const Part& part, const T* kappa, T grad) {
  const Column at(part);
  const int pixels = part.layer.pixels();
  T by[P::kSize];
  int pixel = (at.first + at.own()) * P::kSize % pixels;
#pragma unroll
  for (int j = 0; j < P::kSize; ++j) {
    by[j] = grad * kappa[pixel];
    pixel = pixel + 1 < pixels ? pixel + 1 : 0;
  }
  const P* from = static_cast<const P*>(part.view().data) + at.begin;
  P* to = static_cast<P*>(part.layer.out) + at.begin;
  const auto scale = [&](const P& p, int i) { to[i * at.step] = scaled(p, by); };
  read_ahead(from, at.count, at.step, scale);
}

template <typename T, typename P>
__device__ void gradients_of_pixels(const Part& part, const T* kappa, T grad) {
  const Lanes lanes(part);
  lanes.each([&](int pixel, int64_t begin, int count) {
    if (count == 0) return;
    T by[P::kSize];
#pragma unroll
    for (int j = 0; j < P::kSize; ++j) by[j] = grad * kappa[pixel];
    const P* from = static_cast<const P*>(lanes.view.data) + begin;
    P* to = static_cast<P*>(part.layer.out) + begin;
    const auto scale = [&](const P& p, int i) { to[i * lanes.count] = scaled(p, by); };
    read_ahead(from, count, lanes.count, scale);
  });
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    backward_kernel(const __grid_constant__ Table table, const T* kappa, const T* grad, int64_t layer_stride,
                    int64_t sample_stride) {
  const int i = layer_of(table, blockIdx.x);
  const Part part(table, i);
  const T g = grad[(table.index + i) * layer_stride + part.sample * sample_stride];
  kappa += part.layer.offset + int64_t(part.sample) * part.layer.pixels();
  with_pack<T>(part.view().type, part.view().wide, [&](auto pack) {
    using P = decltype(pack);
    part.view().last ? gradients_of_pixels<T, P>(part, kappa, g) : gradients_of_columns<T, P>(part, kappa, g);
  });
}

template <typename T>
void backward(const MapBackward& x, cudaStream_t stream) {
  Plan(x, Networks::student).launch_views([&](const Table& table, int64_t blocks) {
    backward_kernel<T><<<blocks, kThreads, 0, stream>>>(table, static_cast<const T*>(x.kappa),
                                                        static_cast<const T*>(x.grad), x.layer_stride, x.sample_stride);
    check_launch("energy backward");
  });
}

}  // namespace

void start_energies(const Plan& plan, float* sums, unsigned* arrived, cudaStream_t stream) {
  launch_energies(plan, sums, arrived, stream);
}
void start_energies(const Plan& plan, double* sums, unsigned* arrived, cudaStream_t stream) {
  launch_energies(plan, sums, arrived, stream);
}

int64_t workspace(const Energies& x) {
  const Plan plan(x, Networks::student);
  return plan.sums() == plan.pixels() ? 0 : plan.sums() * (x.fp64 ? 8 : 4);
}
int64_t workspace(const AttentionForward& x) { return scratch_bytes(x, kMaps); }

void compute(const Energies& x, const Launch& launch) {
  x.fp64 ? energies<double>(x, launch.stream()) : energies<float>(x, launch.stream());
}

void compute(const AttentionForward& x, const Launch& launch) {
  x.fp64 ? forward<double>(x, launch.stream()) : forward<float>(x, launch.stream());
}

void compute(const MapBackward& x, const Launch& launch) {
  x.fp64 ? backward<double>(x, launch.stream()) : backward<float>(x, launch.stream());
}

}  // namespace cuda
}  // namespace kd
