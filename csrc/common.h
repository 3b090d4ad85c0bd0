// What the CPU and the CUDA kernels and their bindings share. No torch in here.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define KD_BOTH __host__ __device__
#else
#define KD_BOTH
#endif

namespace kd {

enum class DType : int { f16, bf16, f32, f64 };

// A function over [begin, end) and the thread pool that runs it in parts; the bindings pass PyTorch's own pool.
using Body = void (*)(int64_t begin, int64_t end, void* context);
using Parallel = void (*)(int64_t count, int64_t grain, Body body, void* context);

struct Pool {
  Parallel run;
  int threads;
};

// Each CPU kernel file is compiled once per instruction set, into a namespace of that name; KD_ONLY names the only one of a
// build for one machine.
#if !defined(KD_ONLY) && !defined(__x86_64__)
#define KD_ONLY base
#endif

#ifdef KD_ONLY
#define KD_FOR_EACH_ISA(DECLARATION) \
  namespace KD_ONLY {                \
  DECLARATION                        \
  }
#define KD_DISPATCH(call) return kd::KD_ONLY::call;
#else
#define KD_FOR_EACH_ISA(DECLARATION) \
  namespace base {                   \
  DECLARATION                        \
  }                                  \
  namespace avx2 {                   \
  DECLARATION                        \
  }                                  \
  namespace avx512 {                 \
  DECLARATION                        \
  }

enum class Isa : int { base, avx2, avx512 };

inline Isa best_isa() {
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma"))
    return Isa::avx512;
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? Isa::avx2 : Isa::base;
}

#define KD_DISPATCH(call)                         \
  static const kd::Isa isa = kd::best_isa();      \
  switch (isa) {                                  \
    case kd::Isa::avx512: return kd::avx512::call; \
    case kd::Isa::avx2: return kd::avx2::call;     \
    default: return kd::base::call;               \
  }
#endif

}  // namespace kd
