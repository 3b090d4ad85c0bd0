// Where a call runs: the CPU's kernels of this machine's instruction set, or the GPU's on the current stream.
#pragma once

#include <cstdlib>
#include <string>

#include "angular_margin.h"
#include "energy.h"
#include "gram.h"
#include "softmax_kl.h"
#include "tensors.h"
#ifdef KD_CUDA
#include "cuda.h"
#endif

// KD_ONLY names the only instruction set of a build for one machine
#if !defined(KD_ONLY) && !defined(__x86_64__)
#define KD_ONLY base
#endif

namespace kd {

inline void run_parallel(int64_t count, int64_t grain, Body body, void* context) {
  STABLE_TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, count, grain, body, context));
}

inline Pool pool() { return {run_parallel, static_cast<int>(torch::stable::get_num_threads())}; }

#ifdef KD_ONLY
template <typename C>
void run_on_cpu(const C& call) {
  compute<Isa::KD_ONLY>(call, pool());
}
#else
// What this machine has, or less where KDKERNELS_ISA says so. Names are checked before the library is loaded.
inline Isa best_isa() {
  __builtin_cpu_init();
  const char* given = std::getenv("KDKERNELS_ISA");
  const std::string most = given ? given : "";
  if (most == "base") return Isa::base;
  if (most != "avx2" && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma"))
    return Isa::avx512;
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? Isa::avx2 : Isa::base;
}

template <typename C>
void run_on_cpu(const C& call) {
  static const Isa isa = best_isa();
  switch (isa) {
    case Isa::avx512: return compute<Isa::avx512>(call, pool());
    case Isa::avx2: return compute<Isa::avx2>(call, pool());
    default: return compute<Isa::base>(call, pool());
  }
}
#endif

// Runs the call where `like` lives.
template <typename C>
void run(const Tensor& like, C& call) {
#ifdef KD_CUDA
  if (like.is_cuda()) {
    const cuda::Launch launch(like.get_device_index());
    const Tensor scratch = empty({cuda::workspace(call)}, ScalarType::Byte, like);
    call.workspace = scratch.mutable_data_ptr();
    return cuda::compute(call, launch);
  }
#else
  (void)like;
#endif
  run_on_cpu(call);
}

}  // namespace kd
