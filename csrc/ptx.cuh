// The instructions that CUDA C++ has no name for: tensor-core products, fragments from shared memory, asynchronous
// copies. No kernel uses them yet; the tests do. nvcc sees the PTX. The other branch says the same in C++ and is what
// the tests run on a CPU: all lanes of the warp meet, and each finds its part of the others' registers by the PTX
// manual's fragment layouts.
//
//   lane = 4 * group + member:  A (16 x k) rows group and group + 8;  B (k x 8) column group;  C, D (16 x 8) rows group
//   and group + 8, columns 2 * member and 2 * member + 1;  of k, what the index functions below say
#pragma once

#include <cstdint>

#ifndef __NVCC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace kd {
namespace cuda {

#ifdef __NVCC__

__device__ inline unsigned shared_address(const void* p) { return static_cast<unsigned>(__cvta_generic_to_shared(p)); }

#define KD_MMA_16816(name, type)                                                                                      \
  __device__ inline void name(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], const float (&c)[4]) {   \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                                               \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"                           \
                 : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])                                                     \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]), \
                   "f"(c[3]));                                                                                        \
  }
// D = A B + C for 16 x 16 and 16 x 8 numbers, two to a register, the one of the lower index in the lower half
KD_MMA_16816(mma_bf16, "bf16")
KD_MMA_16816(mma_fp16, "f16")
#undef KD_MMA_16816

// D = A B + C for 16 x 8 and 8 x 8 numbers: fp32 of which the upper 19 bits are read
__device__ inline void mma_tf32(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], const float (&c)[4]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%10, %11, %12, %13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}

// COUNT matrices of 8 x 8 two-byte numbers; lane 8 m + r gives the address of row r of matrix m (lanes beyond: any
// address). A lane gets, of row group, the numbers 2 * member and 2 * member + 1; with TRANSPOSED, of column group.
template <int COUNT, bool TRANSPOSED>
__device__ inline void load_matrices(unsigned (&r)[COUNT], const void* row) {
  static_assert(COUNT == 1 || COUNT == 2 || COUNT == 4);
  const unsigned from = shared_address(row);
  if constexpr (COUNT == 1 && !TRANSPOSED)
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(from) : "memory");
  else if constexpr (COUNT == 1)
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(from) : "memory");
  else if constexpr (COUNT == 2 && !TRANSPOSED)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(from)
                 : "memory");
  else if constexpr (COUNT == 2)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(from)
                 : "memory");
  else if constexpr (!TRANSPOSED)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(from)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(from)
                 : "memory");
}

// 16 bytes from global to shared memory, past the registers: the first `bytes` are copied, zeros fill up the rest.
__device__ inline void copy_async(void* shared, const void* global, int bytes = 16) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
               : "memory");
}
__device__ inline void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most GROUPS of the groups that this thread committed are still on their way.
template <int GROUPS>
__device__ inline void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS) : "memory");
}

#else

struct Fragment {  // of one lane
  unsigned a[4], b[2];
};

// Number i of a lane's a or b: which of k it is. PER is how many one register holds.
template <int PER>
inline int column_of_a(int member, int i) {
  return PER == 2 ? 2 * member + i % 2 + i / 4 * 8 : member + i / 2 * 4;
}
template <int PER>
inline int row_of_b(int member, int i) {
  return PER == 2 ? 2 * member + i % 2 + i / 2 * 8 : member + i * 4;
}

// K numbers of k, PER to a register, value(register, index) reading one.
template <int K, int PER, typename Value>
inline void multiply(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], const float (&c)[4], Value value,
                     cuda_on_cpu::Site site) {
  const int lane = static_cast<int>(cuda_on_cpu::lane()), group = lane / 4, member = lane % 4;
  const Fragment mine{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  float sum[4] = {c[0], c[1], c[2], c[3]};
  cuda_on_cpu::exchange(0xffffffffu, mine, site, [&](auto read) {
    float rows[2][K], columns[2][K];
    for (int m = 0; m < 4; ++m) {
      const Fragment of_rows = read(4 * group + m);
      for (int i = 0; i < 4 * PER; ++i)  // register 0, 2: row group; 1, 3: row group + 8
        rows[i / PER % 2][column_of_a<PER>(m, i)] = value(of_rows.a[i / PER], i % PER);
      for (int column = 0; column < 2; ++column) {
        const Fragment of_columns = read(4 * (2 * member + column) + m);
        for (int i = 0; i < 2 * PER; ++i) columns[column][row_of_b<PER>(m, i)] = value(of_columns.b[i / PER], i % PER);
      }
    }
    for (int i = 0; i < 4; ++i)
      for (int k = 0; k < K; ++k) sum[i] += rows[i / 2][k] * columns[i % 2][k];
    return 0;
  });
  for (int i = 0; i < 4; ++i) d[i] = sum[i];
}

inline void mma_bf16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], const float (&c)[4],
                     CUDA_ON_CPU_SITE) {
  multiply<16, 2>(d, a, b, c, [](unsigned r, int i) { return __uint_as_float(i ? r & 0xffff0000u : r << 16); }, site);
}
inline void mma_fp16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], const float (&c)[4],
                     CUDA_ON_CPU_SITE) {
  const auto value = [](unsigned r, int i) { return __half2float({static_cast<unsigned short>(i ? r >> 16 : r)}); };
  multiply<16, 2>(d, a, b, c, value, site);
}
inline void mma_tf32(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], const float (&c)[4],
                     CUDA_ON_CPU_SITE) {
  multiply<8, 1>(d, a, b, c, [](unsigned r, int) { return __uint_as_float(r & 0xffffe000u); }, site);
}

template <int COUNT, bool TRANSPOSED>
inline void load_matrices(unsigned (&r)[COUNT], const void* row, CUDA_ON_CPU_SITE) {
  const unsigned lane = cuda_on_cpu::lane(), group = lane / 4, member = lane % 4;
  if (lane < 8 * COUNT) cuda_on_cpu::check_row(row, 16);
  cuda_on_cpu::exchange(0xffffffffu, row, site, [&](auto read) __attribute__((no_sanitize("thread"))) {
    for (unsigned m = 0; m < COUNT; ++m) {
      unsigned short pair[2];
      for (unsigned i = 0; i < 2; ++i) {
        const unsigned from = TRANSPOSED ? 2 * member + i : group, at = TRANSPOSED ? group : 2 * member + i;
        pair[i] = static_cast<const unsigned short*>(read(8 * m + from))[at];
      }
      r[m] = pair[0] | unsigned(pair[1]) << 16;
    }
    return 0;
  });
}

inline void copy_async(void* shared, const void* global, int bytes = 16) {
  cuda_on_cpu::copy_async(shared, global, static_cast<size_t>(bytes), 16);
}
inline void copy_async_commit() { cuda_on_cpu::commit_copies(); }
template <int GROUPS>
inline void copy_async_wait() {
  cuda_on_cpu::wait_copies(GROUPS);
}

#endif

}  // namespace cuda
}  // namespace kd
