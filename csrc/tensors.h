// What the bindings know of tensors: reading, checking and making them by the LibTorch stable ABI alone, so that one
// binary serves every torch from 2.11 on.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <vector>

#include "common.h"

#ifndef STABLE_TORCH_ERROR_CODE_CHECK  // its name in torch 2.11
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

namespace kd {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// ---- reading tensors ----

inline kd::DType dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Half: return kd::DType::f16;
    case ScalarType::BFloat16: return kd::DType::bf16;
    case ScalarType::Float: return kd::DType::f32;
    case ScalarType::Double: return kd::DType::f64;
    default: STD_TORCH_CHECK(false, "kdkernels: a tensor is of no floating-point type that is known here");
  }
}

inline bool is_double(const Tensor& x) { return x.scalar_type() == ScalarType::Double; }

inline bool any_double(const std::vector<Tensor>& tensors) {
  for (const Tensor& x : tensors)
    if (is_double(x)) return true;
  return false;
}

inline ScalarType compute_type(bool fp64) { return fp64 ? ScalarType::Double : ScalarType::Float; }

inline void check_device(const Tensor& x, const Tensor& first) {
  STD_TORCH_CHECK(x.is_cuda() == first.is_cuda() && x.get_device_index() == first.get_device_index(),
                  "kdkernels: all tensors must be on one device");
}

// Dense and uninitialised. Through the C shim: the dispatcher's boxed way would cost a small loss a tenth of its time.
inline Tensor empty(const std::vector<int64_t>& sizes, ScalarType type, const Tensor& like,
                    bool channels_last = false) {
  std::vector<int64_t> strides(sizes.size());
  int64_t step = 1;
  const auto place = [&](size_t d) {
    strides[d] = step;
    step *= sizes[d] > 1 ? sizes[d] : 1;
  };
  if (channels_last) {
    for (size_t d : {1, 3, 2, 0}) place(d);
  } else {
    for (size_t d = sizes.size(); d-- > 0;) place(d);
  }
  int32_t device = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  AtenTensorHandle out = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(),
                                                         strides.data(), static_cast<int32_t>(type), device,
                                                         like.get_device_index(), &out));
  return Tensor(out);
}

inline Tensor as_contiguous(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }

inline Tensor contiguous_as(const Tensor& x, bool fp64) {
  const ScalarType type = compute_type(fp64);
  return as_contiguous(x.scalar_type() == type ? x : torch::stable::to(x, type));
}

inline bool is_channels_last(const Tensor& x) {
  if (x.dim() != 4 || x.is_contiguous()) return false;
  int64_t expected = 1;
  for (int64_t d : {1, 3, 2, 0}) {
    if (x.size(d) != 1 && x.stride(d) != expected) return false;
    expected *= x.size(d);
  }
  return true;
}

inline Tensor dense(const Tensor& x) {
  return x.is_contiguous() || is_channels_last(x) ? x : torch::stable::contiguous(x);
}

inline std::vector<int64_t> sizes_of(const Tensor& x) {
  std::vector<int64_t> sizes;
  for (int64_t d = 0; d < x.dim(); ++d) sizes.push_back(x.size(d));
  return sizes;
}

// A large gradient on the CPU is fresh memory, whose page faults can cost more than the kernel that fills it: 4096 for
// 16 MB, 8 with huge pages, which Linux gives to those who ask.
inline void ask_for_huge_pages(const Tensor& x) {
#ifdef __linux__
  constexpr uintptr_t kHuge = uintptr_t(1) << 21;
  constexpr uintptr_t kMost = uintptr_t(1) << 28;  // of more, Linux may have to make them first
  const uintptr_t begin = reinterpret_cast<uintptr_t>(x.mutable_data_ptr());
  const uintptr_t end = begin + static_cast<uintptr_t>(x.numel()) * x.element_size();
  const uintptr_t first = (begin + kHuge - 1) / kHuge * kHuge, last = end / kHuge * kHuge;
  if (last > first && last - first <= kMost)
    (void)madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // a wish: may fail
#else
  (void)x;
#endif
}

inline Tensor grad_like(const Tensor& x) {
  Tensor out = empty(sizes_of(x), x.scalar_type(), x, is_channels_last(x));
  if (x.is_cpu()) ask_for_huge_pages(out);
  return out;
}

}  // namespace kd
