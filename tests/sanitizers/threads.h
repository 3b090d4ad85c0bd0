// For threads.cpp: threads that share a call out, inputs, and memory for what it writes.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

#include "common.h"

namespace {

using namespace kd;
constexpr Isa kIsa = Isa::KD_ISA;

// ---- pools: the same thread count for the kernels, other ways to run their parts ----

int threads_now = 1;

void alone(int64_t count, int64_t, Body body, void* context) { body(0, count, context); }

// Every thread has single tasks all over the range: smaller parts than any grain asks for. Nobody takes what is free:
// where threads are slow to start, the first would do it all, and there would be nothing to see.
void scattered(int64_t count, int64_t, Body body, void* context) {
  const int n = threads_now;
  std::vector<std::thread> team;
  for (int i = 0; i < n; ++i)
    team.emplace_back([=] {
      for (int64_t k = i; k < count; k += n) body(k, k + 1, context);
    });
  for (std::thread& t : team) t.join();
}

// ---- numbers ----

template <typename T>
constexpr DType kType = sizeof(T) == 4   ? DType::f32
                        : sizeof(T) == 8 ? DType::f64
                                         : DType::bf16;

template <typename T>
std::vector<T> wave(int64_t n, double seed) {
  std::vector<T> x(n);
  for (int64_t i = 0; i < n; ++i) {
    const float value = static_cast<float>(2 * std::sin(seed + 1.7 * i + 0.3 * std::sin(0.013 * i)));
    if constexpr (sizeof(T) == 2) {
      uint32_t b;
      std::memcpy(&b, &value, 4);
      x[i] = static_cast<T>(b >> 16);
    } else {
      x[i] = static_cast<T>(value);
    }
  }
  return x;
}

// What a call writes: bits that are no result until then
template <typename T>
struct Written {
  std::vector<std::vector<char>> all;
  template <typename U = T>
  U* operator()(int64_t n) {
    return reinterpret_cast<U*>(all.emplace_back(n * sizeof(U), static_cast<char>(0xff)).data());
  }
};

}  // namespace
