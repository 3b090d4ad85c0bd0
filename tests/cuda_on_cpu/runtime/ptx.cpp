// The executor's part of csrc/ptx.cuh: what ldmatrix demands of an address, and cp.async.
#include "state.h"

namespace cuda_on_cpu {

namespace {

void touch(const void* p, size_t bytes, bool write, const void* pc) {
  if (memory::checked && bytes) memory::access(reinterpret_cast<uintptr_t>(p), bytes, write, false, pc);
}

void need_aligned(const void* p, size_t bytes, const void* pc) {
  if (reinterpret_cast<uintptr_t>(p) % bytes) fail("an address that is not a multiple of " + std::to_string(bytes) + " bytes", pc);
}

}  // namespace

void check_row(const void* shared, size_t bytes) {
  need_aligned(shared, bytes, __builtin_return_address(0));
  touch(shared, bytes, false, __builtin_return_address(0));
}

void copy_async(void* shared, const void* global, size_t copied, size_t bytes) {
  const void* pc = __builtin_return_address(0);
  if (copied > bytes) fail("an asynchronous copy of more than it holds", pc);
  need_aligned(shared, bytes, pc);
  need_aligned(global, bytes, pc);
  touch(global, copied, false, pc);
  touch(shared, bytes, true, pc);
  // what arrives, arrives at the wait: a missing one shows
  std::memset(shared, 0xff, bytes);
  memory::set_unwritten(shared, bytes);
  if (running->copies.empty()) running->copies.emplace_back();
  running->copies.back().push_back({shared, global, copied, bytes});
}

void commit_copies() {
  if (running->copies.empty()) running->copies.emplace_back();
  running->copies.emplace_back();
}

void wait_copies(unsigned groups_in_flight) {
  auto& groups = running->copies;  // the last one is not committed yet
  while (groups.size() > size_t(groups_in_flight) + 1) {
    for (const Copy& c : groups.front()) {
      if (!sample) touch(c.to, c.bytes, true, __builtin_return_address(0));  // counted where it was asked for
      std::memset(c.to, 0, c.bytes);
      std::memcpy(c.to, c.from, c.copied);
    }
    groups.erase(groups.begin());
  }
}

}  // namespace cuda_on_cpu
