// What the compiler calls in a checked build: -fsanitize=thread before every access to memory that is not a register, and
// -fsanitize=bounds,alignment where an index or an address breaks the type's rules. No sanitizer's own runtime is linked.
#include <cstdio>

#include <dlfcn.h>

#include "state.h"

namespace cuda_on_cpu {

namespace {

std::string error_text;
const void* error_pc;

struct Location {  // as the compiler lays them out
  const char* file;
  unsigned line, column;
};

void break_rule(const void* data, const char* what) {
  const Location& at = *static_cast<const Location*>(data);
  if (running) fail(std::string(what) + ", " + at.file + ":" + std::to_string(at.line));
}

std::string source_line(const void* pc) {
  Dl_info info{};
  if (!pc || !dladdr(pc, &info) || !info.dli_fname) return "";
  char command[4096], line[1024] = "";
  snprintf(command, sizeof(command), "addr2line -e '%s' 0x%zx 2>/dev/null", info.dli_fname,
           static_cast<size_t>(static_cast<const char*>(pc) - 1 - static_cast<const char*>(info.dli_fbase)));
  if (FILE* pipe = popen(command, "r")) {
    if (!fgets(line, sizeof(line), pipe)) line[0] = 0;
    pclose(pipe);
  }
  std::string text = line;
  text = text.substr(0, text.find_first_of(" \n"));
  return text.empty() || text[0] == '?' ? "" : ", " + text;
}

}  // namespace

void set_error(const std::string& what, const void* pc) {
  if (!error_text.empty()) return;
  error_text = what;
  error_pc = pc;
}

const std::string& error() {
  error_text += source_line(error_pc);  // not where the fault was found: a fiber's stack is small
  error_pc = nullptr;
  return error_text;
}

void forget_error() { error_text.clear(), error_pc = nullptr; }

void note_atomic(const void* address, size_t bytes) {
  if (!memory::checked) return;
  memory::access(reinterpret_cast<uintptr_t>(address), bytes, true, true, __builtin_return_address(0));
  memory::release_and_acquire(reinterpret_cast<uintptr_t>(address));
}

}  // namespace cuda_on_cpu

#define HIDDEN extern "C" __attribute__((visibility("hidden")))
#define ACCESS(name, bytes, write)                                                                                \
  HIDDEN void __tsan_##name(void* p) {                                                                            \
    if (cuda_on_cpu::running)                                                                                     \
      cuda_on_cpu::memory::access(reinterpret_cast<uintptr_t>(p), bytes, write, false, __builtin_return_address(0)); \
  }
ACCESS(read1, 1, false)
ACCESS(read2, 2, false)
ACCESS(read4, 4, false)
ACCESS(read8, 8, false)
ACCESS(read16, 16, false)
ACCESS(write1, 1, true)
ACCESS(write2, 2, true)
ACCESS(write4, 4, true)
ACCESS(write8, 8, true)
ACCESS(write16, 16, true)
ACCESS(unaligned_read2, 2, false)
ACCESS(unaligned_read4, 4, false)
ACCESS(unaligned_read8, 8, false)
ACCESS(unaligned_read16, 16, false)
ACCESS(unaligned_write2, 2, true)
ACCESS(unaligned_write4, 4, true)
ACCESS(unaligned_write8, 8, true)
ACCESS(unaligned_write16, 16, true)
ACCESS(volatile_read4, 4, false)
ACCESS(volatile_write4, 4, true)

HIDDEN void __tsan_read_range(void* p, size_t bytes) {
  if (cuda_on_cpu::running)
    cuda_on_cpu::memory::access(reinterpret_cast<uintptr_t>(p), bytes, false, false, __builtin_return_address(0));
}
HIDDEN void __tsan_write_range(void* p, size_t bytes) {
  if (cuda_on_cpu::running)
    cuda_on_cpu::memory::access(reinterpret_cast<uintptr_t>(p), bytes, true, false, __builtin_return_address(0));
}
HIDDEN void __tsan_init() { cuda_on_cpu::memory::checked = true; }
HIDDEN void __tsan_func_entry(void*) {}
HIDDEN void __tsan_func_exit() {}
HIDDEN void __tsan_vptr_update(void**, void*) {}
HIDDEN void __tsan_vptr_read(void**) {}

HIDDEN void __ubsan_handle_out_of_bounds(void* data, void*) {
  cuda_on_cpu::break_rule(data, "index outside of an array");
}
HIDDEN void __ubsan_handle_type_mismatch_v1(void* data, void*) {
  cuda_on_cpu::break_rule(data, "an address that is not a multiple of its type's alignment");
}
