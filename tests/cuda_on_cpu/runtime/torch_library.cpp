// The bindings' view of torch. The linker's --wrap sends the C calls below through here, so that bindings.cpp, compiled as it
// is, takes CPU tensors for CUDA ones, allocates poisoned memory, and tells the map of memory which elements it hands out.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>

#include <array>
#include <mutex>
#include <stdexcept>

#include "state.h"

#define REAL(name) extern "C" decltype(name) __real_##name;
REAL(aoti_torch_empty_strided)
REAL(aoti_torch_get_data_ptr)
REAL(torch_get_const_data_ptr)
REAL(torch_get_mutable_data_ptr)
REAL(torch_library_impl)

using namespace cuda_on_cpu;

namespace {

std::recursive_mutex one_op_at_a_time;
std::vector<AtenTensorHandle> kept;  // until the op returns, so that no address is used twice in it

void keep(AtenTensorHandle tensor) {
  AtenTensorHandle other = nullptr;
  if (memory::checked && aoti_torch_new_tensor_handle(tensor, &other) == 0) kept.push_back(other);
}

void forget() {
  for (AtenTensorHandle tensor : kept) aoti_torch_delete_tensor_object(tensor);
  kept.clear();
  memory::forget_tensors();
}

size_t item_size(AtenTensorHandle tensor) {
  int32_t type = 0;
  aoti_torch_get_dtype(tensor, &type);
  return aoti_torch_dtype_element_size(type);
}

// The view's elements and nothing between them, by recursion over its dimensions from the outermost.
void allow_elements(char* at, int64_t dim, const int64_t* sizes, const int64_t* strides, size_t item, unsigned rights) {
  if (dim == 0) return memory::allow(at, item, rights);
  if (dim == 1 && strides[0] == 1) return memory::allow(at, item * sizes[0], rights);
  const int64_t count = strides[0] ? sizes[0] : sizes[0] > 0;
  for (int64_t i = 0; i < count; ++i)
    allow_elements(at + i * strides[0] * int64_t(item), dim - 1, sizes + 1, strides + 1, item, rights);
}

void allow_tensor(AtenTensorHandle tensor, const void* data, unsigned rights) {
  if (!memory::checked) return;
  int64_t dim = 0, *sizes = nullptr, *strides = nullptr, span = 1;
  aoti_torch_get_dim(tensor, &dim);
  aoti_torch_get_sizes(tensor, &sizes);
  aoti_torch_get_strides(tensor, &strides);
  for (int64_t d = 0; d < dim; ++d) {
    if (sizes[d] == 0) return;
    span += (sizes[d] - 1) * strides[d];
  }
  const size_t item = item_size(tensor);
  char* at = static_cast<char*>(const_cast<void*>(data));
  if (!sample) allow_elements(at, dim, sizes, strides, item, rights);
  memory::name_tensor(at, span * item);
  keep(tensor);
}

}  // namespace

extern "C" {

int32_t __wrap_aoti_torch_device_type_cuda() { return aoti_torch_device_type_cpu(); }

__attribute__((visibility("hidden"))) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}

AOTITorchError __wrap_aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  *guard = nullptr;
  return 0;
}
AOTITorchError __wrap_aoti_torch_delete_device_guard(DeviceGuardHandle) { return 0; }

AOTITorchError __wrap_aoti_torch_empty_strided(int64_t dim, const int64_t* sizes, const int64_t* strides, int32_t type,
                                              int32_t device, int32_t index, AtenTensorHandle* out) {
  const AOTITorchError status = __real_aoti_torch_empty_strided(dim, sizes, strides, type, device, index, out);
  void* data = nullptr;
  if (status || __real_aoti_torch_get_data_ptr(*out, &data)) return status;
  int64_t bytes = 0;
  aoti_torch_get_storage_size(*out, &bytes);
  if (data && bytes && !sample && !held) std::memset(data, 0xff, bytes);  // NaN in every floating-point type
  allow_tensor(*out, data, memory::readable | memory::writable);
  return status;
}

AOTITorchError __wrap_aoti_torch_get_data_ptr(AtenTensorHandle tensor, void** data) {
  const AOTITorchError status = __real_aoti_torch_get_data_ptr(tensor, data);
  allow_tensor(tensor, *data, memory::readable | memory::writable | memory::written);
  return status;
}

AOTITorchError __wrap_torch_get_mutable_data_ptr(AtenTensorHandle tensor, void** data) {
  const AOTITorchError status = __real_torch_get_mutable_data_ptr(tensor, data);
  allow_tensor(tensor, *data, memory::readable | memory::writable | memory::written);
  return status;
}

AOTITorchError __wrap_torch_get_const_data_ptr(AtenTensorHandle tensor, const void** data) {
  const AOTITorchError status = __real_torch_get_const_data_ptr(tensor, data);
  allow_tensor(tensor, *data, memory::readable | memory::written);
  return status;
}

}  // extern "C"

// ---- where an op begins and ends ----

namespace {

using Boxed = void (*)(StableIValue*, uint64_t, uint64_t);
constexpr size_t kMostOps = 128;
Boxed ops[kMostOps];
size_t op_count = 0;

void run_op(Boxed op, StableIValue* stack, uint64_t inputs, uint64_t outputs) {
  const std::lock_guard<std::recursive_mutex> lock(one_op_at_a_time);
  struct Guard {
    ~Guard() {
      forget();
      forget_error();
    }
  } guard;
  forget();
  // the Thue-Morse sequence: forward and backward calls that take turns get both orders
  static unsigned calls = 0;
  reverse = __builtin_parity(++calls);
  op(stack, inputs, outputs);
  if (!error().empty()) throw std::runtime_error(error());  // of a launch whose status nobody looked at
}

template <size_t I>
void op_number(StableIValue* stack, uint64_t inputs, uint64_t outputs) {
  run_op(ops[I], stack, inputs, outputs);
}

template <size_t... I>
constexpr std::array<Boxed, sizeof...(I)> make_wrappers(std::index_sequence<I...>) {
  return {&op_number<I>...};
}
constexpr auto wrappers = make_wrappers(std::make_index_sequence<kMostOps>());

}  // namespace

extern "C" AOTITorchError __wrap_torch_library_impl(TorchLibraryHandle library, const char* name, Boxed op, uint64_t version) {
  if (op_count == kMostOps) return 1;
  ops[op_count] = op;
  return __real_torch_library_impl(library, name, wrappers[op_count++], version);
}
