// The checked build's map of memory: one cell per two bytes that a kernel may touch. Whatever has no cell is out of bounds.
#include <algorithm>
#include <map>
#include <unordered_map>
#include <unordered_set>

#include "state.h"

extern "C" const char __ehdr_start __attribute__((visibility("hidden")));  // this library's own constants and globals
extern "C" const char _end __attribute__((visibility("hidden")));

namespace cuda_on_cpu {
namespace memory {

bool checked = false;

namespace {

constexpr unsigned kPage = 4096, kNobody = 2047, kSeveral = 2046, kSeveralInWarp = 1024, kAtomic = 2000;

// Intervals number the time between two barriers, over all blocks and launches, so that one number tells the block too.
struct Cell {
  uint32_t write_interval, read_interval;
  uint16_t write_clock, read_clock;
  uint16_t writer : 11, rights : 3;
  uint16_t reader : 11;
};

struct Page {
  Cell cells[kPage / 2];
};
struct Range {
  uintptr_t begin = 0, size = 0;
  bool has(uintptr_t a) const { return a - begin < size; }
};
struct Intervals {
  uint32_t first, last;
};

std::unordered_map<uintptr_t, Page*> pages;
std::vector<Page*> spare;
struct Recent {
  uintptr_t number;
  Page* page;
} recent[256];
Range stacks, image, parameters, shared;
std::map<uintptr_t, uintptr_t> tensors;  // begin and end, for messages
uint32_t interval = 1, block_first = 1, launch_first = 1;
const void* pc;  // of the access at hand
bool fenced;                                                  // this block wrote nothing since its last __threadfence
std::unordered_map<uintptr_t, std::vector<Intervals>> released;  // by an atomic's address
std::vector<Intervals> acquired;
std::unordered_set<uintptr_t> block_sectors;  // of a sample

Page* page_of(uintptr_t a) {
  const uintptr_t number = a / kPage;
  Recent& r = recent[number % 256];
  if (r.page && r.number == number) return r.page;
  const auto found = pages.find(number);
  if (found == pages.end()) return nullptr;
  r = {number, found->second};
  return r.page;
}

Cell* cell_of(uintptr_t a) {
  Page* page = page_of(a);
  return page ? &page->cells[a % kPage / 2] : nullptr;
}

Page* make_page(uintptr_t a) {
  Page*& page = pages[a / kPage];
  if (!page) {
    if (spare.empty()) spare.push_back(new Page);
    page = spare.back();
    spare.pop_back();
    std::memset(static_cast<void*>(page), 0, sizeof(Page));
  }
  return page;
}

std::string describe(uintptr_t a) {
  if (a < 1 << 24) return "a null pointer";
  if (shared.has(a)) return "shared memory that is no variable's";
  auto next = tensors.upper_bound(a);
  std::string text;
  if (next != tensors.begin()) {
    const auto [begin, end] = *std::prev(next);
    const std::string size = std::to_string(end - begin) + " bytes";
    if (a < end) return "a gap between the elements of a view that spans " + size;
    text = std::to_string(a - end) + " bytes behind the end of a tensor of " + size;
  }
  if (next != tensors.end()) text += (text.empty() ? "" : ", ") + std::to_string(next->first - a) + " bytes before a tensor";
  return text.empty() ? "no tensor at all" : text;
}

// Whether that thread, or several of one warp, are in the running thread's warp.
bool is_in_my_warp(unsigned other) {
  return (other < kMostThreads ? other / kWarp : other - kSeveralInWarp) == running->number / kWarp;
}

// Whether an access at (interval, clock) by `other` is ordered before what the running thread does now.
bool ordered(uint32_t when, unsigned other, uint16_t clock) {
  if (when < launch_first || (when >= block_first && when < interval)) return true;
  if (when < block_first) {
    const auto after = std::upper_bound(acquired.begin(), acquired.end(), when,
                                        [](uint32_t w, const Intervals& i) { return w < i.first; });
    return after != acquired.begin() && when <= std::prev(after)->last;
  }
  if (other == kNobody || other == running->number) return true;
  return is_in_my_warp(other) && running->clock > clock;
}

[[noreturn]] void race(uint32_t when, unsigned other, const char* they, const char* we, uintptr_t a) {
  const char* where = shared.has(a) ? "shared" : "global";
  if (when < block_first)
    fail(std::string("race between blocks: another block ") + they + ", this one " + we + " " + where + " memory", pc);
  fail("race within the block: " + (other < kMostThreads ? "thread " + std::to_string(other) : "another thread") + " " + they +
           ", this one " + we + " " + where + " memory with no barrier between",
       pc);
}

void note_read(Cell& c) {
  const unsigned me = running->number;
  if (c.read_interval != interval || c.reader == me || (running->clock > c.read_clock && is_in_my_warp(c.reader))) {
    c.reader = me;  // who read before a __syncwarp of this warp has read before this
  } else if (is_in_my_warp(c.reader)) {
    c.reader = kSeveralInWarp + me / kWarp;
  } else {
    c.reader = kSeveral;
  }
  c.read_interval = interval;
  c.read_clock = running->clock;
}

void count(Cell& c, bool write) {
  (write ? launch->written : launch->read) += 2;
  if (write && c.write_interval < launch_first) launch->distinct_written += 2;
  if (!write && c.read_interval < launch_first) launch->distinct_read += 2;
}

}  // namespace

void set_stacks(const void* begin, size_t bytes) {
  stacks = {reinterpret_cast<uintptr_t>(begin), bytes};
  image = {reinterpret_cast<uintptr_t>(&__ehdr_start), static_cast<uintptr_t>(&_end - &__ehdr_start)};
}

void shared_range(const void* begin, size_t bytes) { shared = {reinterpret_cast<uintptr_t>(begin), bytes}; }

void begin_launch(const void* p, size_t bytes) {
  parameters = {reinterpret_cast<uintptr_t>(p), bytes};
  launch_first = block_first = ++interval;
  released.clear();
}

void next_interval() {
  ++interval;
  if (counters::counting) counters::settle();
}

void begin_block() {
  next_interval();
  counters::begin_block();
  block_first = interval;
  block_sectors.clear();
  fenced = false;
  acquired.clear();
}

void allow(const void* p, size_t bytes, unsigned rights) {
  if (!checked || sample || !bytes) return;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(p), end = begin + bytes;
  for (uintptr_t a = begin & ~uintptr_t(1); a < end;) {
    Page* page = make_page(a);
    const uintptr_t stop = std::min(end, (a / kPage + 1) * kPage);
    for (; a < stop; a += 2) {
      Cell& c = page->cells[a % kPage / 2];
      if (c.rights && rights) c.rights = c.rights | (rights & ~written);  // another view of it: what was written is known
      else c = {0, 0, 0, 0, kNobody, uint16_t(rights & 7), kNobody};
    }
  }
}

void name_tensor(const void* begin, size_t bytes) {
  const uintptr_t a = reinterpret_cast<uintptr_t>(begin);
  if (checked) tensors[a] = std::max(tensors[a], a + bytes);
}

void set_unwritten(const void* p, size_t bytes) {
  for (uintptr_t a = reinterpret_cast<uintptr_t>(p), end = a + bytes; checked && !sample && a < end; a += 2)
    if (Cell* c = cell_of(a)) c->rights = c->rights & ~written;
}

void written_by_host(const void* p, size_t bytes, const char* call) {
  for (uintptr_t a = reinterpret_cast<uintptr_t>(p), end = a + bytes; checked && !sample && a < end; a += 2) {
    Cell* c = cell_of(a);
    if (!c || !(c->rights & writable)) return set_error(std::string(call) + ": write to " + (c && c->rights ? "an input" : describe(a)));
    c->rights = c->rights | written;
  }
}

void forget_tensors() {
  for (const auto& [number, page] : pages) spare.push_back(page);
  pages.clear();
  tensors.clear();
  std::fill(std::begin(recent), std::end(recent), Recent{});
}

namespace {

void write_cell(Cell& c, uintptr_t a, bool global, bool atomic) {
  if (!(c.rights & writable)) fail("write to an input", pc);
  if (!(atomic && c.writer == kAtomic) && !ordered(c.write_interval, c.writer, c.write_clock))
    race(c.write_interval, c.writer, "wrote", "writes", a);
  if (!ordered(c.read_interval, c.reader, c.read_clock)) race(c.read_interval, c.reader, "read", "writes", a);
  c.rights = c.rights | written;
  c.writer = atomic ? kAtomic : running->number;
  c.write_interval = interval;
  c.write_clock = running->clock;
  if (global && !atomic) fenced = false;
}

[[noreturn]] void out_of_bounds(uintptr_t a, bool write) {
  fail((write ? "write to " : "read of ") + describe(a), pc);
}

[[noreturn]] void unwritten(bool global) {
  fail(std::string("read of ") + (global ? "global" : "shared") + " memory that was never written", pc);
}

}  // namespace

// Distinct bytes as if the launch touched all of a tensor that it touched somewhere.
void sampled(uintptr_t begin, size_t bytes, bool write) {
  (write ? launch->written : launch->read) += bytes;
  if (block_sectors.insert(begin / 32).second) launch->sectors_once += counters::weight;
  auto tensor = tensors.upper_bound(begin);
  if (tensor == tensors.begin() || !launch->touched.insert({(--tensor)->first, write}).second) return;
  (write ? launch->distinct_written : launch->distinct_read) += tensor->second - tensor->first;
}

void access(uintptr_t begin, size_t bytes, bool write, bool atomic, const void* caller) {
  if (stacks.has(begin) || parameters.has(begin) || image.has(begin)) return;
  pc = caller;
  const bool global = !shared.has(begin);
  if (counters::counting) counters::note(begin, bytes, global, pc);
  if (sample) {
    if (global) sampled(begin, bytes, write);
    return;
  }
  for (uintptr_t a = begin & ~uintptr_t(1); a < begin + bytes;) {
    Page* page = page_of(a);
    if (!page) out_of_bounds(a, write);
    const uintptr_t stop = std::min(begin + bytes, (a / kPage + 1) * kPage);
    for (Cell* c = &page->cells[a % kPage / 2]; a < stop; a += 2, ++c) {
      if (!c->rights) out_of_bounds(a, write);
      if ((atomic || !write) && !(c->rights & written)) unwritten(global);
      if (global) count(*c, write);
      if (write) {
        write_cell(*c, a, global, atomic);
      } else {
        if (!ordered(c->write_interval, c->writer, c->write_clock)) race(c->write_interval, c->writer, "wrote", "reads", a);
        note_read(*c);
      }
    }
  }
}

void release_and_acquire(uintptr_t a) {
  if (sample) return;
  std::vector<Intervals>& blocks = released[a];
  acquired = blocks;
  if (!acquired.empty() && acquired.back().first == block_first) acquired.pop_back();
  if (!fenced) return;
  if (!blocks.empty() && blocks.back().first == block_first) blocks.back().last = interval;
  else blocks.push_back({block_first, interval});
}

void set_fenced() { fenced = true; }

}  // namespace memory

void fence() { memory::set_fenced(); }

}  // namespace cuda_on_cpu
