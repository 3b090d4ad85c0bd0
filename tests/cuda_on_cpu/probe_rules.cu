// Small kernels that keep or break one rule each, for test_executor.py.
#include <cuda_runtime.h>

namespace {

__global__ void divergent_barrier(int* out) {
  if (threadIdx.x < 32)
    __syncthreads();
  else
    __syncthreads();
  out[threadIdx.x] = 1;
}

__device__ void helper(int* out) {
  __syncthreads();
  out[threadIdx.x] = 1;
}

// One line for all threads, and two calls of it.
__global__ void divergent_helper(int* out) {
  if (threadIdx.x < 32) helper(out);
  helper(out);
}

__global__ void missing_lanes(int* out) {
  if (threadIdx.x % 32 < 16) out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1, 1);
  __syncthreads();
}

// Each half of a warp adds up its own lane numbers; the other half has no part in it.
__global__ void half_warps(int* out) {
  const int lane = threadIdx.x % 32;
  const unsigned mask = lane < 16 ? 0x0000ffffu : 0xffff0000u;
  int sum = lane;
  for (int step = 8; step > 0; step /= 2) sum += __shfl_xor_sync(mask, sum, step);
  out[threadIdx.x] = sum;
}

__global__ void votes(int* out) {
  const int lane = threadIdx.x % 32, count = __syncthreads_count(threadIdx.x < 40);
  out[threadIdx.x] = count + 100 * __all_sync(0xffffffffu, lane < 40) + 200 * __any_sync(0xffffffffu, lane == 33) +
                     1000 * __popc(__ballot_sync(0xffffffffu, lane < 5)) + 10000 * __shfl_down_sync(0xffffffffu, lane, 2) +
                     1000000 * __shfl_up_sync(0xffffffffu, lane, 3, 8) + 100000000 * __shfl_sync(0xffffffffu, lane, 9, 8);
}

// Neighbours swap numbers through shared memory.
__global__ void swap_in_warps(int* out, int ordered) {
  __shared__ int box[64];
  box[threadIdx.x] = threadIdx.x;
  if (ordered) __syncwarp();
  out[threadIdx.x] = box[threadIdx.x ^ 1];
}

// Whichever block comes last adds up what all have written.
__global__ void last_block(int* out, int* parts, unsigned* arrived, int fenced) {
  __shared__ int last;
  parts[blockIdx.x * blockDim.x + threadIdx.x] = threadIdx.x;
  if (fenced) __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicInc(arrived, gridDim.x - 1) == gridDim.x - 1;
  __syncthreads();
  if (!last || threadIdx.x) return;
  int sum = 0;
  for (unsigned i = 0; i < gridDim.x * blockDim.x; ++i) sum += parts[i];
  out[0] = sum;
}

__global__ void vector_load(const float* from, float* out) {
  const float4 v = *reinterpret_cast<const float4*>(from + threadIdx.x);
  out[threadIdx.x] = v.x + v.y + v.z + v.w;
}

__global__ void vectors(const float4* from, float* out) {
  const float4 v = from[threadIdx.x];
  out[threadIdx.x] = v.x + v.y + v.z + v.w;
}

__global__ void fill_shared(int* out, int count) {
  extern __shared__ int numbers[];
  const int thread = threadIdx.y * blockDim.x + threadIdx.x, threads = blockDim.x * blockDim.y;
  for (int i = thread; i < count; i += threads) numbers[i] = i;
  __syncthreads();
  out[blockIdx.x * threads + thread] = numbers[count - 1 - thread];
}

__global__ void unwritten(const int* in, int* out) { out[threadIdx.x + 1] = in[threadIdx.x] + out[threadIdx.x]; }

__global__ void in_place(const int* in) { const_cast<int*>(in)[threadIdx.x] = 0; }

__global__ void strided(const int* from, int stride, int* out) {
  __shared__ int box[33 * 32];
  box[threadIdx.x * stride] = from[threadIdx.x * stride];
  out[threadIdx.x] = box[threadIdx.x * stride];
}

}  // namespace

#define ENTRY extern "C" __attribute__((visibility("default"))) void

ENTRY run_divergent_barrier(int* out) { divergent_barrier<<<1, 64>>>(out); }
ENTRY run_divergent_helper(int* out) { divergent_helper<<<1, 64>>>(out); }
ENTRY run_missing_lanes(int* out) { missing_lanes<<<1, 64>>>(out); }
ENTRY run_half_warps(int* out) { half_warps<<<1, 64>>>(out); }
ENTRY run_votes(int* out) { votes<<<1, 64>>>(out); }
ENTRY run_swap(int* out, int ordered) { swap_in_warps<<<1, 64>>>(out, ordered); }
ENTRY run_last_block(int* out, int* parts, unsigned* arrived, int fenced) {
  cudaMemsetAsync(arrived, 0, sizeof(unsigned));
  last_block<<<6, 32>>>(out, parts, arrived, fenced);
}
ENTRY run_vector_load(const float* from, int offset, float* out) { vector_load<<<1, 4>>>(from + offset, out); }
ENTRY run_fill_shared(int* out, int count, int bytes, int opt_in) {
  cudaFuncSetAttribute(fill_shared, cudaFuncAttributeMaxDynamicSharedMemorySize, opt_in);
  fill_shared<<<dim3(2), dim3(32, 2), bytes>>>(out, count);
}
ENTRY run_unwritten(const int* in, int* out) { unwritten<<<1, 1>>>(in, out); }
ENTRY run_in_place(const int* in) { in_place<<<1, 4>>>(in); }
ENTRY run_strided(const int* from, int stride, int* out) { strided<<<1, 32>>>(from, stride, out); }
ENTRY run_vectors(const float4* from, float* out) { vectors<<<1, 32>>>(from, out); }
