// The threads of a block as fibers: the order in which they run, barriers and collectives.
#include <sys/mman.h>

#include <algorithm>
#include <list>

#include "state.h"

#ifndef __x86_64__
#error "the context switch is written for x86-64"
#endif

// Saves the callee's registers and the stack pointer, takes another's. ucontext would make a system call.
asm(R"(
.text
.type cuda_on_cpu_switch, @function
cuda_on_cpu_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
)");
extern "C" __attribute__((visibility("hidden"))) void cuda_on_cpu_switch(void** save, void* to);

namespace cuda_on_cpu {

Indices indices;
Thread* running = nullptr;
bool reverse = false;

namespace {

constexpr size_t kStack = 64 << 10;
std::vector<Thread> threads(kMostThreads);
std::list<Collective> collectives[kMostThreads / kWarp];  // of each warp; those with left == 0 are free
unsigned count, alive, waiting;                           // threads of the block
bool failed;
void* main_stack_pointer;
void (*kernel_body)(const void*);
const void* kernel_parameters;

Site barrier_site;
uintptr_t barrier_path;
int votes[2], vote_turn;

char* stacks() {
  static char* const base = [] {
    const auto p = static_cast<char*>(mmap(nullptr, kStack * kMostThreads, PROT_READ | PROT_WRITE,
                                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    for (size_t i = 0; i < kMostThreads; ++i) mprotect(p + i * kStack, 4096, PROT_NONE);  // an overflow shows
    memory::set_stacks(p, kStack * kMostThreads);
    return p;
  }();
  return base;
}

void to_main(void** save) { cuda_on_cpu_switch(save, main_stack_pointer); }

void finish_barrier() {
  for (unsigned i = 0; i < count; ++i)
    if (threads[i].state == State::barrier) {
      threads[i].state = State::ready;
      threads[i].clock = 0;
    }
  waiting = 0;
  vote_turn ^= 1;
  votes[vote_turn] = 0;
  memory::next_interval();
}

unsigned existing(unsigned warp) {  // lanes that have not exited
  unsigned lanes = 0;
  for (unsigned l = 0; l < kWarp && warp * kWarp + l < count; ++l)
    if (threads[warp * kWarp + l].state != State::exited) lanes |= 1u << l;
  return lanes;
}

bool finish_if_all_are_here(Collective& c, unsigned warp) {
  if ((c.mask & existing(warp)) & ~c.arrived) return false;
  uint16_t newest = 0;
  for (unsigned l = 0; l < kWarp; ++l)
    if (c.arrived >> l & 1) newest = std::max(newest, threads[warp * kWarp + l].clock);
  for (unsigned l = 0; l < kWarp; ++l)
    if (c.arrived >> l & 1) {
      Thread& t = threads[warp * kWarp + l];
      t.state = State::ready;
      if (c.orders == Orders::memory) t.clock = newest + 1;
    }
  c.left = c.arrived;
  return true;
}

void entry() {
  kernel_body(kernel_parameters);
  const unsigned warp = running->number / kWarp;
  running->state = State::exited;
  --alive;
  if (alive && waiting == alive) finish_barrier();
  for (Collective& c : collectives[warp])
    if (c.arrived && !c.left) finish_if_all_are_here(c, warp);
  to_main(&running->stack_pointer);
  __builtin_trap();
}

void prepare(Thread& t, unsigned number, const dim3& block) {
  t.number = number;
  t.index = {number % block.x, number / block.x % block.y, number / (block.x * block.y)};
  t.state = State::ready;
  t.clock = 0;
  t.copies.clear();
  // tops are staggered, or the hot lines of all stacks would fall into the same few sets of the cache
  const auto top = reinterpret_cast<void**>(stacks() + (number + 1) * kStack - 64 - number % 61 * 128);
  top[-1] = nullptr;  // where a function would find its return address
  top[-2] = reinterpret_cast<void*>(&entry);
  for (int i = 3; i <= 8; ++i) top[-i] = nullptr;
  t.stack_pointer = top - 8;
}

void step(Thread& t) {
  running = &t;
  indices.thread = t.index;
  cuda_on_cpu_switch(&main_stack_pointer, t.stack_pointer);
  running = nullptr;
}

unsigned in_order(unsigned i, unsigned n) { return reverse ? n - 1 - i : i; }

// Each warp runs until all its lanes wait for the block or have exited.
bool run_warp(unsigned warp) {
  const unsigned lanes = std::min(kWarp, count - warp * kWarp);
  bool moved = false;
  for (bool again = true; again && !failed;) {
    again = false;
    for (unsigned i = 0; i < lanes && !failed; ++i) {
      Thread& t = threads[warp * kWarp + in_order(i, lanes)];
      if (t.state != State::ready) continue;
      step(t);
      again = moved = true;
    }
  }
  return moved;
}

std::string place(const Site& site) { return std::string(site.file) + ":" + std::to_string(site.line); }

std::string who_waits() {
  std::string text = "threads wait for ever:";
  if (waiting) text += " " + std::to_string(waiting) + " at the barrier " + place(barrier_site) + ",";
  for (unsigned w = 0; w * kWarp < count; ++w)
    for (const Collective& c : collectives[w])
      if (c.arrived && !c.left)
        text += " " + std::to_string(__builtin_popcount(c.arrived)) + " of " + std::to_string(__builtin_popcount(c.mask)) +
                " lanes of warp " + std::to_string(w) + " at " + place(c.site) + ",";
  return text + " " + std::to_string(count - alive) + " have exited";
}

}  // namespace

bool run_block(const dim3& block, void (*body)(const void*), const void* parameters) {
  failed = false;
  kernel_body = body;
  kernel_parameters = parameters;
  count = block.x * block.y * block.z;
  alive = count;
  waiting = 0;
  votes[0] = votes[1] = 0;
  for (unsigned i = 0; i < count; ++i) prepare(threads[i], i, block);
  for (auto& of_warp : collectives) of_warp.clear();
  const unsigned warps = (count + kWarp - 1) / kWarp;
  while (alive && !failed) {
    bool moved = false;
    for (unsigned w = 0; w < warps && !failed; ++w) moved |= run_warp(in_order(w, warps));
    if (!moved && !failed) set_error(launch->name + ": " + who_waits()), failed = true;
  }
  return !failed;
}

void fail(const std::string& what, const void* pc) {
  const auto number = [](const uint3& i) {
    return "(" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) + ")";
  };
  set_error(launch->name + ", block " + number(indices.block) + ", thread " + number(indices.thread) + ": " + what, pc);
  failed = true;
  to_main(&running->stack_pointer);
  __builtin_unreachable();
}

// The calls that have led here, as one number: a helper's barrier is another one wherever the helper is called. The
// checked build's frames are linked, and a thread's first ends the chain.
__attribute__((noinline)) uintptr_t call_path() {
  uintptr_t path = 0;
  for (auto frame = static_cast<void**>(__builtin_frame_address(0)); frame; frame = static_cast<void**>(*frame))
    path = path * 31 + reinterpret_cast<uintptr_t>(frame[1]);
  return path;
}

int barrier(Site site, Vote vote, bool predicate) {
  const uintptr_t path = memory::checked ? call_path() : 0;
  if (waiting && (site.line != barrier_site.line || std::strcmp(site.file, barrier_site.file)))
    fail("divergent barrier: others wait at " + place(barrier_site) + ", this thread at " + place(site));
  if (waiting && path != barrier_path) fail("divergent barrier: others came to " + place(site) + " from elsewhere");
  barrier_site = site;
  barrier_path = path;
  int& result = votes[vote_turn];
  result += predicate;
  ++waiting;
  running->state = State::barrier;
  if (waiting == alive) finish_barrier();
  to_main(&running->stack_pointer);
  return vote == Vote::all ? result == static_cast<int>(count) : vote == Vote::any ? result > 0 : result;
}

unsigned lane() { return running->number % kWarp; }

unsigned active_lanes() { return existing(running->number / kWarp); }

Collective& meet(unsigned mask, const void* mine, size_t bytes, Site site, Orders orders) {
  const unsigned warp = running->number / kWarp, me = lane();
  if (!(mask >> me & 1)) fail("lane " + std::to_string(me) + " is not in its own mask, " + place(site));
  auto& all = collectives[warp];
  auto c = std::find_if(all.begin(), all.end(), [&](const Collective& x) { return x.arrived && !x.left && x.mask & mask; });
  if (c == all.end()) {
    c = std::find_if(all.begin(), all.end(), [](const Collective& x) { return !x.arrived; });
    if (c == all.end()) c = all.emplace(all.end());
    c->mask = mask;
    c->orders = orders;
    c->site = site;
    c->size = bytes;
  } else if (c->mask != mask || c->site.line != site.line || std::strcmp(c->site.file, site.file) || c->size != bytes) {
    fail("divergent warp: other lanes wait at " + place(c->site) + ", this one at " + place(site) +
         (c->mask != mask ? " with another mask" : ""));
  }
  if (bytes) std::memcpy(c->data[me], mine, bytes);
  c->arrived |= 1u << me;
  running->state = State::collective;
  if (!finish_if_all_are_here(*c, warp)) to_main(&running->stack_pointer);
  return *c;
}

void brought(const Collective& c, unsigned from, void* to) {
  if (from < kWarp && c.arrived >> from & 1) std::memcpy(to, c.data[from], c.size);
  else std::memset(to, 0xff, c.size);
}

void leave(Collective& c) {
  c.left &= ~(1u << lane());
  if (!c.left) c.arrived = 0;
}

}  // namespace cuda_on_cpu
