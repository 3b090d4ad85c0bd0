// What the CPU and the CUDA kernels and their bindings share. No torch in here.
#pragma once

#include <cstdint>

// The namespace of the kernels that are being compiled: a CPU's instruction set, or cuda.
#ifdef __CUDACC__
#define KD_BOTH __host__ __device__
#define KD_ISA cuda
#else
// what loops call must be inlined for them to be vectorised, however much else the compiler has inlined before
#define KD_BOTH __attribute__((always_inline))
#ifndef KD_ISA
#define KD_ISA base
#endif
#endif

namespace kd {

enum class DType : int { f16, bf16, f32, f64 };

template <typename T>
struct Exponentials {
  T exp, minus_1;  // exp(x) and exp(x) - 1
};

// A function over [begin, end) and the thread pool that runs it in parts; the bindings pass PyTorch's own pool.
using Body = void (*)(int64_t begin, int64_t end, void* context);
using Parallel = void (*)(int64_t count, int64_t grain, Body body, void* context);

struct Pool {
  Parallel run;
  int threads;
};

// Each CPU kernel file is compiled once per instruction set and specialises compute<> for it.
enum class Isa : int { base, avx2, avx512 };

// The record of one kernel call: all arguments that the bindings hand over. In such a record T is float, or double
// with fp64.
struct Call {
  bool fp64 = false;
  void* workspace = nullptr;  // CUDA: as many bytes as cuda::workspace() says; unused on the CPU
};

}  // namespace kd
