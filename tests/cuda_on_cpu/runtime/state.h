// What the executor's own files share. Rewritten sources see execution.h alone.
#pragma once

#include <map>
#include <set>
#include <string>
#include <vector>

#include "execution.h"

namespace cuda_on_cpu {

enum class State : unsigned char { ready, barrier, collective, exited };

struct Copy {
  void* to;
  const void* from;
  size_t copied, bytes;
};

struct Thread {
  void* stack_pointer;
  uint3 index;
  unsigned number;  // in the block
  uint16_t clock;   // counts __syncwarp within a barrier interval
  State state;
  std::vector<std::vector<Copy>> copies;  // cp.async: groups in order, the last one still open
};

struct LaunchRecord {
  std::string name;
  dim3 grid, block;
  size_t dynamic_shared = 0, static_shared = 0;
  // counted in the checked build; distinct: each two bytes of global memory once per launch
  uint64_t read = 0, written = 0, distinct_read = 0, distinct_written = 0;
  double global_requests = 0, sectors = 0, shared_requests = 0, bank_conflicts = 0;  // if asked for: it takes time
  const void* kernel = nullptr;
  // of a sample; once: each sector once per block
  double blocks_run = 0, sectors_once = 0;
  std::set<std::pair<uintptr_t, bool>> touched;  // tensors read, and written
  using Bytes = std::map<std::vector<const void*>, double>;  // by the calls that led to an access, innermost first
  Bytes bytes, last_bytes;  // last: of one block that arrived last, what it did from there on
  double last_sectors = 0;
};

extern Thread* running;  // null outside of kernels
extern LaunchRecord* launch;
extern bool reverse;     // blocks, warps and lanes from the last to the first
extern unsigned sample;  // run so many blocks of each launch, and count: nothing is checked, no result is right; 0: all
extern bool held;        // launches do nothing: for what they take of the host's time
// Runs the kernel's body in every thread of the block; false if it failed.
bool run_block(const dim3& block, void (*body)(const void*), const void* parameters);
// Ends the kernel that runs; the launch's status tells why. `pc`: the instruction whose source line to name.
[[noreturn]] void fail(const std::string& what, const void* pc = nullptr);
void set_error(const std::string& what, const void* pc = nullptr);
const std::string& error();  // the first since it was last forgotten, or empty
void forget_error();

namespace memory {  // who may touch what; all of it does nothing unless the build is a checked one

enum Rights : unsigned { none = 0, readable = 1, writable = 2, written = 4 };
extern bool checked;
void allow(const void* p, size_t bytes, unsigned rights);  // none takes all of them back
void name_tensor(const void* begin, size_t bytes);       // for messages
void access(uintptr_t begin, size_t bytes, bool write, bool atomic, const void* pc);
void release_and_acquire(uintptr_t atomic);
void set_unwritten(const void* p, size_t bytes);
void written_by_host(const void* p, size_t bytes, const char* call);
void forget_tensors();
void set_stacks(const void* begin, size_t bytes);
void begin_launch(const void* parameters, size_t bytes);
void begin_block();
void next_interval();
void shared_range(const void* begin, size_t bytes);

}  // namespace memory

namespace counters {

extern bool counting;
void note(uintptr_t address, size_t bytes, bool global, const void* pc);
void settle();  // at a barrier: what follows belongs to new accesses
void begin_block();
// From the next barrier on the running block does what only the last one of several does, and in a sample stands for
// `weight` times the blocks that it stood for before.
void last_arrived(double weight);
extern double weight;
extern bool last;

}  // namespace counters
}  // namespace cuda_on_cpu
