// Counts memory traffic by warp access: the lanes of a warp that execute an instruction for the same time. A lane's
// instruction is the place in the kernel's code that a hook returns to, so the n-th accesses of all lanes from there
// make one access of the warp. Where lanes take a branch in different rounds of a loop, several of them pass for one.
#include "emulator/counters.h"

#include <pthread.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "emulator/sanitizer.h"
#include "emulator/scheduler.h"

// The ends of this library in memory, from the linker.
extern "C" [[gnu::visibility("hidden")]] const char __ehdr_start, _end;

namespace emulator {
namespace {

constexpr int kSector = 32, kBanks = 32, kBank = 4;

struct Traffic {
  uint64_t bytes = 0;          // distinct bytes of each warp access
  uint64_t sectors = 0;        // of 32 bytes that it touches
  uint64_t ideal_sectors = 0;  // that its bytes fill when they lie together
};

struct Counters {
  uint64_t launches = 0, blocks = 0;
  Traffic loads, stores;
  uint64_t shared_accesses = 0, bank_conflicts = 0;
  uint64_t barriers = 0, atomics = 0;
};

struct Access {
  uintptr_t address[warpSize];
  unsigned lanes, bytes;
  bool store;
};

struct Instruction {
  unsigned executed[warpSize] = {};
  std::vector<Access> accesses;
};

// Of the block that this OS thread runs.
struct Trace {
  std::unordered_map<const void*, Instruction> warps[kMaxThreads / warpSize];
  uint64_t barriers = 0, atomics = 0;
};

thread_local Trace t_trace;
std::mutex g_mutex;
std::map<std::string, Counters>& counters() {
  static std::map<std::string, Counters> all;
  return all;
}

// A fiber's stack is registers and local memory. Arguments lie on the launching thread's stack and constants in the
// library; a GPU has both in constant memory.
bool is_local(const Block& block, const void* address) {
  struct Stack {
    void* start;
    size_t bytes;
    Stack() {
      pthread_attr_t attributes;
      pthread_getattr_np(pthread_self(), &attributes);
      pthread_attr_getstack(&attributes, &start, &bytes);
      pthread_attr_destroy(&attributes);
    }
  };
  thread_local const Stack stack;
  const char* at = static_cast<const char*>(address);
  return block.is_stack(address) || static_cast<size_t>(at - static_cast<char*>(stack.start)) < stack.bytes ||
         (&__ehdr_start <= at && at < &_end);
}

void record(const void* address, size_t bytes, bool store, const void* instruction_address) {
  const Block* block = Block::current();
  if (block == nullptr || block->running() == nullptr || is_local(*block, address)) return;
  const Fiber& fiber = *block->running();
  Instruction& instruction = t_trace.warps[fiber.warp][instruction_address];
  const unsigned round = instruction.executed[fiber.lane]++;
  if (round == instruction.accesses.size()) {
    instruction.accesses.push_back({{}, 0, static_cast<unsigned>(bytes), store});
  }
  Access& access = instruction.accesses[round];
  access.address[fiber.lane] = reinterpret_cast<uintptr_t>(address);
  access.lanes |= 1u << fiber.lane;
}

// The lanes' addresses in ascending order, each once.
std::vector<uintptr_t> addresses(const Access& access, int first, int last) {
  std::vector<uintptr_t> sorted;
  for (int i = first; i < last; ++i) {
    if (access.lanes >> i & 1) sorted.push_back(access.address[i]);
  }
  std::sort(sorted.begin(), sorted.end());
  sorted.erase(std::unique(sorted.begin(), sorted.end()), sorted.end());
  return sorted;
}

void count_global(const Access& access, Traffic& traffic) {
  uint64_t bytes = 0, sectors = 0;
  uintptr_t end = 0, next_sector = 0;
  for (const uintptr_t address : addresses(access, 0, warpSize)) {
    bytes += address + access.bytes - std::max(address, end);
    end = address + access.bytes;
    const uintptr_t first = std::max(address / kSector, next_sector);
    next_sector = (end - 1) / kSector + 1;
    sectors += next_sector - first;
  }
  traffic.bytes += bytes;
  traffic.sectors += sectors;
  traffic.ideal_sectors += (bytes + kSector - 1) / kSector;
}

// A warp's access of 4 bytes or less is one pass, of 8 bytes two passes of half a warp, of 16 bytes four of a quarter.
// Two lanes of a pass conflict where they need different words of a bank.
void count_shared(const Access& access, Counters& counted) {
  const int words = std::max<int>(1, access.bytes / kBank), lanes = warpSize / words;
  ++counted.shared_accesses;
  for (int first = 0; first < warpSize; first += lanes) {
    int words_of_bank[kBanks] = {};
    uintptr_t last_word = 0;
    for (const uintptr_t address : addresses(access, first, first + lanes)) {
      for (uintptr_t word = address / kBank; word < address / kBank + words; ++word) {
        if (word == last_word) continue;
        last_word = word;
        ++words_of_bank[word % kBanks];
      }
    }
    const int deepest = *std::max_element(words_of_bank, words_of_bank + kBanks);
    counted.bank_conflicts += std::max(deepest - 1, 0);
  }
}

}  // namespace

void counted_copy(void* to, const void* from, size_t bytes, bool store) {
  record(store ? to : from, bytes, store, __builtin_return_address(0));
  copy_unseen(to, from, bytes);
}

void count_atomic() { ++t_trace.atomics; }
void count_barrier() { ++t_trace.barriers; }

void count_block() {
  Block& block = *Block::current();
  const std::lock_guard lock(g_mutex);
  Counters& counted = counters()[kernel_name(block.shape().kernel)];
  const uint3& index = block.index();
  counted.launches += index.x == 0 && index.y == 0 && index.z == 0;
  ++counted.blocks;
  counted.barriers += t_trace.barriers;
  counted.atomics += t_trace.atomics;
  for (auto& warp : t_trace.warps) {
    for (const auto& [where, instruction] : warp) {
      for (const Access& access : instruction.accesses) {
        if (block.shared().contains(reinterpret_cast<const void*>(access.address[std::countr_zero(access.lanes)]))) {
          count_shared(access, counted);
        } else {
          count_global(access, access.store ? counted.stores : counted.loads);
        }
      }
    }
    warp.clear();
  }
  t_trace.barriers = t_trace.atomics = 0;
}

}  // namespace emulator

using emulator::record;

extern "C" {

void mmoe_reset_counters() {
  const std::lock_guard lock(emulator::g_mutex);
  emulator::counters().clear();
}

// {kernel: {name of Counters in mmoe/ops/emulated.py: number}} as JSON; valid until the next call.
const char* mmoe_counters() {
  static std::string text;
  const std::lock_guard lock(emulator::g_mutex);
  text = "{";
  for (const auto& [kernel, counted] : emulator::counters()) {
    const std::pair<const char*, uint64_t> fields[] = {
        {"launches", counted.launches},
        {"blocks", counted.blocks},
        {"load_bytes", counted.loads.bytes},
        {"load_sectors", counted.loads.sectors},
        {"ideal_load_sectors", counted.loads.ideal_sectors},
        {"store_bytes", counted.stores.bytes},
        {"store_sectors", counted.stores.sectors},
        {"ideal_store_sectors", counted.stores.ideal_sectors},
        {"shared_accesses", counted.shared_accesses},
        {"bank_conflicts", counted.bank_conflicts},
        {"barriers", counted.barriers},
        {"atomics", counted.atomics},
    };
    text += (text.size() > 1 ? ", \"" : "\"") + kernel + "\": {";
    for (const auto& [name, value] : fields) {
      text += (text.back() == '{' ? "\"" : ", \"") + std::string(name) + "\": " + std::to_string(value);
    }
    text += "}";
  }
  text += "}";
  return text.c_str();
}

// What g++ -fsanitize=thread calls. An access from within the runtime never gets here: only kernels are compiled so.
#define MMOE_HOOKS(bytes)                                                                                \
  void __tsan_read##bytes(void* at) { record(at, bytes, false, __builtin_return_address(0)); }           \
  void __tsan_write##bytes(void* at) { record(at, bytes, true, __builtin_return_address(0)); }           \
  void __tsan_unaligned_read##bytes(void* at) { record(at, bytes, false, __builtin_return_address(0)); } \
  void __tsan_unaligned_write##bytes(void* at) { record(at, bytes, true, __builtin_return_address(0)); }
MMOE_HOOKS(1)
MMOE_HOOKS(2)
MMOE_HOOKS(4)
MMOE_HOOKS(8)
MMOE_HOOKS(16)
#undef MMOE_HOOKS
void __tsan_read_range(void* at, size_t bytes) { record(at, bytes, false, __builtin_return_address(0)); }
void __tsan_write_range(void* at, size_t bytes) { record(at, bytes, true, __builtin_return_address(0)); }

// atomicAdd counts itself, whatever number of tries a float takes.
#define MMOE_ATOMIC_HOOKS(bits, T)                                                                          \
  T __tsan_atomic##bits##_load(const volatile T* at, int) { return __atomic_load_n(at, __ATOMIC_RELAXED); } \
  int __tsan_atomic##bits##_compare_exchange_weak(volatile T* at, T* expected, T desired, int, int) {       \
    return __atomic_compare_exchange_n(at, expected, desired, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED);    \
  }
MMOE_ATOMIC_HOOKS(32, uint32_t)
MMOE_ATOMIC_HOOKS(64, uint64_t)
#undef MMOE_ATOMIC_HOOKS

// What launchers call besides: counts of references to tensors, constructors.
uint32_t __tsan_atomic32_fetch_add(volatile uint32_t* at, uint32_t value, int) {
  return __atomic_fetch_add(at, value, __ATOMIC_ACQ_REL);
}
void __tsan_vptr_update(void**, void*) {}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
}
