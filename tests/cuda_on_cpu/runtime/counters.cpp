// What a warp's accesses cost: 32-byte sectors of global memory, passes over the banks of shared memory. A lane's n-th pass
// over an instruction since the last barrier belongs with the other lanes' n-th.
#include <algorithm>
#include <map>
#include <unordered_map>

#include "state.h"

namespace cuda_on_cpu {
namespace counters {

bool counting = false;
double weight = 1;
bool last = false;

namespace {

double weight_from_barrier = 1;
bool last_from_barrier = false;

struct Lane {
  unsigned lane;
  uintptr_t address;
};
struct Access {  // of a warp
  bool global;
  size_t bytes;
  std::vector<Lane> lanes;
};
struct Key {
  unsigned warp, turn;
  const void* pc;
  bool operator==(const Key& other) const { return warp == other.warp && turn == other.turn && pc == other.pc; }
};
struct Hash {
  size_t operator()(const Key& k) const { return (reinterpret_cast<size_t>(k.pc) * 1024 + k.warp) * 0x9e3779b97f4a7c15u + k.turn; }
};

std::unordered_map<Key, Access, Hash> accesses;
std::unordered_map<const void*, unsigned> turns[kMostThreads];

uint64_t sectors_of(const Access& a) {
  std::vector<uintptr_t> sectors;
  for (const Lane& l : a.lanes)
    for (uintptr_t s = l.address / 32; s <= (l.address + a.bytes - 1) / 32; ++s) sectors.push_back(s);
  std::sort(sectors.begin(), sectors.end());
  return std::unique(sectors.begin(), sectors.end()) - sectors.begin();
}

// Passes beyond the first: different words of one bank. Of 8 bytes half a warp goes at once, of 16 a quarter.
uint64_t conflicts_of(const Access& a) {
  const unsigned words = std::max<unsigned>(a.bytes / 4, 1), together = kWarp / std::min(words, kWarp);
  std::map<unsigned, std::vector<uintptr_t>> groups;
  for (const Lane& l : a.lanes)
    for (unsigned w = 0; w < words; ++w) groups[l.lane / together].push_back(l.address / 4 + w);
  uint64_t conflicts = 0;
  for (auto& [group, touched] : groups) {
    std::sort(touched.begin(), touched.end());
    touched.erase(std::unique(touched.begin(), touched.end()), touched.end());
    unsigned of_bank[32] = {}, most = 1;
    for (uintptr_t word : touched) most = std::max(most, ++of_bank[word % 32]);
    conflicts += most - 1;
  }
  return conflicts;
}

}  // namespace

namespace {

// By the calls that led here, as an access in a helper belongs to whoever called it.
void note_path(size_t bytes, const void* pc) {
  std::vector<const void*> path;
  for (auto frame = static_cast<void**>(__builtin_frame_address(0)); frame && path.size() < 24; frame = static_cast<void**>(*frame))
    if (!path.empty() || frame[1] == pc) path.push_back(frame[1]);
  launch->bytes[path] += weight * bytes;
  if (last) launch->last_bytes[path] += bytes;
}

}  // namespace

void note(uintptr_t address, size_t bytes, bool global, const void* pc) {
  if (sample) note_path(bytes, pc);
  const unsigned number = running->number;
  Access& a = accesses[{number / kWarp, turns[number][pc]++, pc}];
  a.global = global;
  a.bytes = bytes;
  a.lanes.push_back({number % kWarp, address});
}

void settle() {
  for (const auto& [key, a] : accesses) {
    if (a.global) {
      const uint64_t sectors = sectors_of(a);
      launch->global_requests += weight;
      launch->sectors += weight * sectors;
      if (last) launch->last_sectors += sectors;
    } else {
      launch->shared_requests += weight;
      launch->bank_conflicts += weight * conflicts_of(a);
    }
  }
  accesses.clear();
  for (auto& of_thread : turns) of_thread.clear();
  weight = weight_from_barrier;
  last = last_from_barrier;
}

void begin_block() {
  weight = weight_from_barrier = 1;
  last = last_from_barrier = false;
}

void last_arrived(double w) {
  weight_from_barrier = w;
  last_from_barrier = true;
}

}  // namespace counters
}  // namespace cuda_on_cpu

extern "C" __attribute__((visibility("default"))) void cuda_on_cpu_count(int on) { cuda_on_cpu::counters::counting = on; }
