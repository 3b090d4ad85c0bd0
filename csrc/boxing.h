// From the dispatcher's stack of values to a C++ function and back. TORCH_BOX does that too, but knows no records as
// arguments, and loses the memory of every string that it reads.
#pragma once

#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#include "tensors.h"

namespace kd {

// The arguments of a call, one after the other. Reading one takes it off the stack.
class Arguments {
 public:
  Arguments(const StableIValue* stack, uint64_t count) : at_(stack), end_(stack + count) {}

  template <typename T>
  T next() {
    if constexpr (std::is_constructible_v<T, Arguments&>) {
      return T(*this);  // a record of several arguments reads them itself
    } else {
      STD_TORCH_CHECK(at_ < end_, "kdkernels: the schema has fewer arguments than the kernel");
      if constexpr (std::is_same_v<T, std::string>) return text(*at_++);
      else return torch::stable::detail::to<T>(*at_++);
    }
  }

 private:
  static std::string text(StableIValue value) {
    const auto handle = torch::stable::detail::to<StringHandle>(value);
    size_t length = 0;
    const char* data = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
    STABLE_TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
    std::string result(data, length);
    STABLE_TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
    return result;
  }

  const StableIValue *at_, *end_;
};

template <typename R>
void put(StableIValue* stack, const R& result) {
  *stack = torch::stable::detail::from(result);
}
template <typename... R>
void put(StableIValue* stack, const std::tuple<R...>& results) {
  std::apply([&](const R&... result) { ((*stack++ = torch::stable::detail::from(result)), ...); }, results);
}

template <typename R, typename... A>
void call(R (*function)(A...), StableIValue* stack, uint64_t count) {
  Arguments arguments(stack, count);
  std::tuple<std::decay_t<A>...> values{arguments.next<std::decay_t<A>>()...};  // braces: from left to right
  put(stack, std::apply(function, std::move(values)));
}

// F as the dispatcher calls it.
template <auto F>
void boxed(StableIValue* stack, uint64_t inputs, uint64_t) {
  call(F, stack, inputs);
}

}  // namespace kd
