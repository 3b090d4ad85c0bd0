// Launches: what is valid, the blocks in turn, the shared memory of each, and a record for those who count.
#include <dlfcn.h>
#include <signal.h>
#include <sys/mman.h>

#include <algorithm>
#include <list>
#include <map>

#include "state.h"

namespace cuda_on_cpu {

LaunchRecord* launch = nullptr;
unsigned sample = 0;
bool held = false;

namespace {

constexpr size_t kArena = 512 << 10, kMostRecords = 10000;
std::map<const void*, size_t> opted_in;
size_t arena_used;
bool first_block, last_of_sample;
uint64_t sampled, all_blocks;
struct SharedVariable {
  const void* tag;
  void* at;
};
std::vector<SharedVariable> shared_variables;
std::list<LaunchRecord> records;

char* arena() {
  static char* const base = static_cast<char*>(
      mmap(nullptr, kArena, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  return base;
}

void* take_shared(size_t bytes, size_t alignment) {
  // behind a gap, so that a step too far shows, and no better aligned than was asked for
  const size_t at = (arena_used + 64 + 2 * alignment - 1) / (2 * alignment) * (2 * alignment) + alignment;
  arena_used = at + bytes;
  std::memset(arena() + at, 0xff, bytes);
  memory::allow(arena() + at, bytes, memory::readable | memory::writable);
  return arena() + at;
}

void on_segfault(int, siginfo_t* info, void*) {
  if (running) fail("segmentation fault at address " + std::to_string(reinterpret_cast<uintptr_t>(info->si_addr)));
  signal(SIGSEGV, SIG_DFL);
}

class CatchSegfaults {  // on a stack of its own, as the fiber's may be what overflowed
 public:
  CatchSegfaults() {
    static char stack[64 << 10];
    stack_t own{};
    own.ss_sp = stack;
    own.ss_size = sizeof(stack);
    sigaltstack(&own, &stack_before_);
    struct sigaction action{};
    action.sa_sigaction = on_segfault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    sigaction(SIGSEGV, &action, &before_);
  }
  ~CatchSegfaults() {
    sigaction(SIGSEGV, &before_, nullptr);
    sigaltstack(&stack_before_, nullptr);
  }

 private:
  struct sigaction before_;
  stack_t stack_before_;
};

const char* why_invalid(const Configuration& c, size_t bytes, const void* kernel) {
  const auto within = [](const dim3& d, uint64_t x, uint64_t y, uint64_t z) {
    return d.x && d.y && d.z && d.x <= x && d.y <= y && d.z <= z;
  };
  if (!within(c.grid, 0x7fffffff, 65535, 65535)) return "invalid grid";
  if (!within(c.block, 1024, 1024, 64) || uint64_t(c.block.x) * c.block.y * c.block.z > kMostThreads) return "invalid block";
  if (c.shared > std::max(kSharedLimit, opted_in[kernel])) return "more shared memory than allowed";
  if (bytes > 32764) return "more than 32764 bytes of parameters";
  return nullptr;
}

}  // namespace

// In a sample its last block stands for each that arrives last.
unsigned arrived(unsigned before, unsigned last) {
  if (!sample) return before;
  const bool partial = sampled < all_blocks;
  if (partial) before = last_of_sample ? last : 0;
  if (before == last && last) counters::last_arrived(partial ? double(sampled) / (last + 1.0) : 1.0);
  return before;
}

void opt_in(const void* kernel, size_t shared) { opted_in[kernel] = shared; }

namespace {
void* find_or_take(const void* tag, size_t bytes, size_t alignment) {
  for (const SharedVariable& v : shared_variables)
    if (v.tag == tag) return v.at;
  shared_variables.push_back({tag, take_shared(bytes, alignment)});
  return shared_variables.back().at;
}
}  // namespace

void* dynamic_shared(size_t alignment) { return find_or_take(nullptr, launch->dynamic_shared, std::max<size_t>(alignment, 16)); }

void* shared_variable(const void* tag, size_t bytes, size_t alignment) {
  const size_t before = shared_variables.size();
  void* const at = find_or_take(tag, bytes, alignment);
  if (first_block && shared_variables.size() > before) launch->static_shared += bytes;
  if (launch->static_shared > kSharedLimit || launch->static_shared + launch->dynamic_shared > kSharedOptIn)
    fail("more shared memory than a block can have");
  return at;
}

void run(const char* name, const void* kernel, const Configuration& c, void (*body)(const void*), const void* parameters,
         size_t bytes) {
  if (held) return;
  if (records.size() == kMostRecords) records.pop_front();
  records.push_back({name, c.grid, c.block, c.shared});
  launch = &records.back();
  launch->kernel = kernel;
  if (const char* reason = why_invalid(c, bytes, kernel)) return set_error(launch->name + ": " + reason);
  const CatchSegfaults guard;
  indices.block_size = c.block;
  indices.grid_size = c.grid;
  memory::shared_range(arena(), kArena);
  memory::begin_launch(parameters, bytes);
  const uint64_t blocks = uint64_t(c.grid.x) * c.grid.y * c.grid.z;
  bool going = true;
  all_blocks = blocks;
  sampled = sample ? std::min<uint64_t>(sample, blocks) : blocks;
  for (uint64_t b = 0; b < sampled && going; ++b) {
    const uint64_t at = (2 * b + 1) * blocks / (2 * sampled), i = reverse ? blocks - 1 - at : at;
    last_of_sample = b + 1 == sampled;
    ++launch->blocks_run;
    indices.block = {unsigned(i % c.grid.x), unsigned(i / c.grid.x % c.grid.y), unsigned(i / c.grid.x / c.grid.y)};
    memory::begin_block();
    shared_variables.clear();
    arena_used = 0;
    first_block = b == 0;
    going = run_block(c.block, body, parameters);
    memory::allow(arena(), arena_used, memory::none);
  }
  memory::next_interval();
}

}  // namespace cuda_on_cpu

// What Python reads: see library.py.
namespace {
std::string rounded(double x) { return std::to_string(static_cast<uint64_t>(x + 0.5)); }
std::string offset_of(const void* pc) {  // in the library
  Dl_info info{};
  return std::to_string(dladdr(pc, &info) ? static_cast<const char*>(pc) - static_cast<const char*>(info.dli_fbase) : 0);
}
}  // namespace

extern "C" __attribute__((visibility("default"))) const char* cuda_on_cpu_launches() {
  static std::string text;
  const auto size = [](const dim3& d) { return std::to_string(d.x) + " " + std::to_string(d.y) + " " + std::to_string(d.z); };
  text.clear();
  for (const auto& r : cuda_on_cpu::records) {
    text += r.name + "\t" + size(r.grid) + "\t" + size(r.block);
    for (uint64_t n : {uint64_t(r.dynamic_shared), uint64_t(r.static_shared), r.read, r.written, r.distinct_read, r.distinct_written})
      text += "\t" + std::to_string(n);
    for (double n : {r.global_requests, r.sectors, r.shared_requests, r.bank_conflicts, r.blocks_run, r.sectors_once, r.last_sectors})
      text += "\t" + rounded(n);
    text += "\t" + offset_of(r.kernel);
    for (const auto* by_path : {&r.bytes, &r.last_bytes}) {
      text += "\t";
      for (const auto& [path, bytes] : *by_path) {
        text += rounded(bytes);
        for (const void* pc : path) text += " " + offset_of(static_cast<const char*>(pc) - 1);
        text += ";";
      }
    }
    text += "\n";
  }
  cuda_on_cpu::records.clear();
  return text.c_str();
}

extern "C" __attribute__((visibility("default"))) void cuda_on_cpu_hold(int on) { cuda_on_cpu::held = on; }
extern "C" __attribute__((visibility("default"))) void cuda_on_cpu_sample(unsigned blocks) { cuda_on_cpu::sample = blocks; }
