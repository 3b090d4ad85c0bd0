// Kernels that multiply one tile with csrc/ptx.cuh, for test_ptx.py; nvcc compiles them too.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "ptx.cuh"

using kd::cuda::copy_async;
using kd::cuda::copy_async_commit;
using kd::cuda::copy_async_wait;
using kd::cuda::load_matrices;

namespace {

struct Bf16 {
  static __device__ void multiply(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], const float (&c)[4]) {
    kd::cuda::mma_bf16(d, a, b, c);
  }
};
struct Fp16 {
  static __device__ void multiply(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], const float (&c)[4]) {
    kd::cuda::mma_fp16(d, a, b, c);
  }
};

// The registers of A, B and C filled element by element from the manual's formulas: A [16, 16], B [16, 8], D [16, 8].
template <typename Type>
__global__ void mma_16816_kernel(const unsigned short* a, const unsigned short* b, float* d) {
  const int group = threadIdx.x / 4, member = threadIdx.x % 4;
  unsigned ra[4], rb[2];
  for (int i = 0; i < 8; i += 2) {
    const int row = group + ((i < 2 || (4 <= i && i < 6)) ? 0 : 8), column = 2 * member + (i < 4 ? 0 : 8);
    ra[i / 2] = a[row * 16 + column] | unsigned(a[row * 16 + column + 1]) << 16;
  }
  for (int i = 0; i < 4; i += 2) {
    const int row = 2 * member + (i < 2 ? 0 : 8);
    rb[i / 2] = b[row * 8 + group] | unsigned(b[(row + 1) * 8 + group]) << 16;
  }
  float sum[4] = {1, 1, 1, 1};
  Type::multiply(sum, ra, rb, sum);
  for (int i = 0; i < 4; ++i) d[(group + i / 2 * 8) * 8 + 2 * member + i % 2] = sum[i];
}

// A [16, 8], B [8, 8] of fp32 bits
__global__ void mma_tf32_kernel(const unsigned* a, const unsigned* b, float* d) {
  const int group = threadIdx.x / 4, member = threadIdx.x % 4;
  unsigned ra[4], rb[2];
  for (int i = 0; i < 4; ++i) ra[i] = a[(group + i % 2 * 8) * 8 + member + i / 2 * 4];
  for (int i = 0; i < 2; ++i) rb[i] = b[(member + 4 * i) * 8 + group];
  float sum[4] = {};
  kd::cuda::mma_tf32(sum, ra, rb, sum);
  for (int i = 0; i < 4; ++i) d[(group + i / 2 * 8) * 8 + 2 * member + i % 2] = sum[i];
}

// COUNT matrices of 8 x 8, one behind the other; out [COUNT, 32] registers
template <int COUNT, bool TRANSPOSED>
__global__ void matrices_kernel(const unsigned short* matrices, unsigned* out) {
  __shared__ __align__(16) unsigned short tile[COUNT * 64];
  for (int i = threadIdx.x; i < COUNT * 64; i += 32) tile[i] = matrices[i];
  __syncthreads();
  unsigned r[COUNT];
  load_matrices<COUNT, TRANSPOSED>(r, tile + threadIdx.x % (8 * COUNT) * 8);
  for (int m = 0; m < COUNT; ++m) out[m * 32 + threadIdx.x] = r[m];
}

// D [16, 8] = A [16, width] B [8, width]^T in bf16: two stages of copy_async, rows filled up with zeros behind the width
// (a multiple of 8). `wait` false leaves the wait out.
__global__ void tile_kernel(const unsigned short* a, const unsigned short* b, int width, float* d, bool wait) {
  extern __shared__ __align__(16) unsigned short stages[];  // [2, 24, 16]
  const int lane = threadIdx.x, steps = (width + 15) / 16;
  const auto fetch = [&](int step) {
    unsigned short* stage = stages + step % 2 * 24 * 16;
    for (int i = lane; i < 48; i += 32) {
      const int row = i / 2, column = step * 16 + i % 2 * 8, bytes = column < width ? 16 : 0;
      const unsigned short* from = row < 16 ? a + row * width : b + (row - 16) * width;
      copy_async(stage + row * 16 + i % 2 * 8, bytes ? from + column : a, bytes);
    }
    copy_async_commit();
  };
  float sum[4] = {};
  fetch(0);
  for (int step = 0; step < steps; ++step) {
    if (step + 1 < steps) fetch(step + 1);
    else copy_async_commit();
    if (wait) copy_async_wait<1>();
    __syncthreads();
    const unsigned short* stage = stages + step % 2 * 24 * 16;
    unsigned ra[4], rb[2];
    load_matrices<4, false>(ra, stage + lane % 16 * 16 + lane / 16 * 8);
    load_matrices<2, false>(rb, stage + (16 + lane % 8) * 16 + lane / 8 % 2 * 8);
    kd::cuda::mma_bf16(sum, ra, rb, sum);
    __syncthreads();
  }
  for (int i = 0; i < 4; ++i) d[(lane / 4 + i / 2 * 8) * 8 + 2 * (lane % 4) + i % 2] = sum[i];
}

}  // namespace

#define ENTRY extern "C" __attribute__((visibility("default"))) void

ENTRY mma_bf16(const unsigned short* a, const unsigned short* b, float* d) { mma_16816_kernel<Bf16><<<1, 32>>>(a, b, d); }
ENTRY mma_fp16(const unsigned short* a, const unsigned short* b, float* d) { mma_16816_kernel<Fp16><<<1, 32>>>(a, b, d); }
ENTRY mma_tf32(const unsigned* a, const unsigned* b, float* d) { mma_tf32_kernel<<<1, 32>>>(a, b, d); }
ENTRY matrices(const unsigned short* from, unsigned* out, int count, int transposed) {
  if (count == 1) transposed ? matrices_kernel<1, true><<<1, 32>>>(from, out) : matrices_kernel<1, false><<<1, 32>>>(from, out);
  if (count == 2) transposed ? matrices_kernel<2, true><<<1, 32>>>(from, out) : matrices_kernel<2, false><<<1, 32>>>(from, out);
  if (count == 4) transposed ? matrices_kernel<4, true><<<1, 32>>>(from, out) : matrices_kernel<4, false><<<1, 32>>>(from, out);
}
ENTRY tile(const unsigned short* a, const unsigned short* b, int width, float* d, int wait) {
  tile_kernel<<<1, 32, 2 * 24 * 16 * sizeof(unsigned short)>>>(a, b, width, d, wait != 0);
}
