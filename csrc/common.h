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

// Each CPU kernel file is compiled once per instruction set, with KD_ISA its name, and specialises compute<> for it.
enum class Isa : int { base, avx2, avx512 };

// The record of one kernel call: all arguments that the bindings hand over. In such a record T is float, or double
// with fp64.
struct Call {
  bool fp64 = false;
  void* workspace = nullptr;  // CUDA: as many bytes as cuda::workspace() says; unused on the CPU
};

}  // namespace kd
