// How a kernel runs on a CPU: blocks one after another, each thread of a block a fiber with a stack of its own. A fiber runs
// until it waits (barrier, shuffle, vote); then the next one does. What this header declares is what rewritten sources call.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
using cudaStream_t = struct CUstream_st*;

namespace cuda_on_cpu {

constexpr unsigned kWarp = 32, kMostThreads = 1024;
constexpr size_t kSharedLimit = 48 << 10, kSharedOptIn = 227 << 10;  // bytes per block, without and with cudaFuncSetAttribute

struct Indices {
  uint3 thread, block;
  dim3 block_size, grid_size;
};
extern Indices indices;  // of the thread that runs

// The place in the source of a barrier, shuffle or vote: threads that meet must have come from the same one.
struct Site {
  const char* file;
  int line;
};
#define CUDA_ON_CPU_SITE cuda_on_cpu::Site site = {__builtin_FILE(), __builtin_LINE()}

// ---- waiting for other threads ----

enum class Vote { none, all, any, count };
int barrier(Site site, Vote vote, bool predicate);  // of the whole block

constexpr size_t kMostBytes = 64;  // that a lane may bring to a collective

enum class Orders { nothing, memory };  // __syncwarp orders memory between the lanes; shuffles and votes do not

struct Collective {  // the lanes of `mask` meet; what each brought can then be read by all
  unsigned mask, arrived, left;
  Site site;
  Orders orders;
  size_t size;
  alignas(16) unsigned char data[kWarp][kMostBytes];
};
Collective& meet(unsigned mask, const void* mine, size_t bytes, Site site, Orders orders = Orders::nothing);
void brought(const Collective&, unsigned lane, void* to);
void leave(Collective&);
unsigned lane();
unsigned active_lanes();

// read(lane) gives what that lane brought: poison where it did not take part.
template <typename T, typename Use>
auto exchange(unsigned mask, const T& mine, Site site, Use use) {
  static_assert(sizeof(T) <= kMostBytes && std::is_trivially_copyable_v<T>);
  Collective& c = meet(mask, &mine, sizeof(T), site);
  const auto read = [&](unsigned from) {
    T value;
    brought(c, from, &value);
    return value;
  };
  const auto result = use(read);
  leave(c);
  return result;
}

// ---- memory ----

void* shared_variable(const void* tag, size_t bytes, size_t alignment);
void* dynamic_shared(size_t alignment);
void fence();
void note_atomic(const void* address, size_t bytes);  // before an atomic operation
unsigned arrived(unsigned before, unsigned last);      // what atomicInc returns
// cp.async: arrives at the wait, not before; until then the destination counts as never written
void copy_async(void* shared, const void* global, size_t copied, size_t bytes);
void commit_copies();
void wait_copies(unsigned groups_in_flight);
void check_row(const void* shared, size_t bytes);  // a read whose address ldmatrix takes

// ---- launching ----

struct Configuration {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
  Configuration(dim3 g, dim3 b, size_t bytes = 0, cudaStream_t s = nullptr) : grid(g), block(b), shared(bytes), stream(s) {}
};

void run(const char* name, const void* kernel, const Configuration&, void (*body)(const void*), const void* parameters,
         size_t bytes);
void opt_in(const void* kernel, size_t shared);

template <typename... P>
struct Launcher {
  const char* name;
  void (*kernel)(P...);
  Configuration configuration;
  Launcher(const char* n, void (*k)(P...), const Configuration& c) : name(n), kernel(k), configuration(c) {}

  template <typename... A>
  void operator()(A&&... arguments) const {
    struct Call {
      void (*kernel)(P...);
      std::tuple<std::decay_t<P>...> parameters;
    };
    const Call call{kernel, std::tuple<std::decay_t<P>...>(std::forward<A>(arguments)...)};
    const auto body = [](const void* p) {
      const Call& c = *static_cast<const Call*>(p);
      std::apply(c.kernel, c.parameters);
    };
    run(name, reinterpret_cast<const void*>(kernel), configuration, body, &call, sizeof(call));
  }
};

}  // namespace cuda_on_cpu

#define threadIdx (cuda_on_cpu::indices.thread)
#define blockIdx (cuda_on_cpu::indices.block)
#define blockDim (cuda_on_cpu::indices.block_size)
#define gridDim (cuda_on_cpu::indices.grid_size)
#define warpSize 32

// __shared__ T x[2][3]  becomes  CUDA_ON_CPU_SHARED(T, x, [2][3], 1): memory of the block, found again by the tag's address.
#define CUDA_ON_CPU_SHARED(type, name, dimensions, alignment)             \
  using name##_type = std::remove_reference_t<type(&) dimensions>;        \
  static const char name##_tag = 0;                                       \
  name##_type& name = *static_cast<name##_type*>(cuda_on_cpu::shared_variable( \
      &name##_tag, sizeof(name##_type), alignof(name##_type) > alignment ? alignof(name##_type) : alignment))
