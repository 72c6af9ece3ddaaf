// A block under way: its threads as fibers, its warps' collectives, its shared memory. One OS thread runs a block from
// start to end, so nothing here is locked.
#pragma once

#include <boost/context/detail/fcontext.hpp>
#include <deque>
#include <random>
#include <string>
#include <vector>

#include "emulator/block.h"
#include "emulator/counters.h"
#include "emulator/launch.h"
#include "emulator/sanitizer.h"
#include "emulator/settings.h"
#include "emulator/warp.h"

namespace emulator {

constexpr int kMaxThreads = 1024;
constexpr size_t kStackBytes = 128 * 1024;
// ThreadSanitizer gives the number of a context that is gone to a new one and then sees no race between the two. The
// contexts of so many threads stay until the launch ends; it has room for 8192.
constexpr size_t kContexts = 2048;

enum class State { kReady, kAtBarrier, kInCollective, kExited };

struct Fiber {
  uint3 thread;
  unsigned lane, warp;
  State state;
  const char* what;  // the synchronisation it is in, and where that was called
  Where where;
  unsigned mask;
  boost::context::detail::fcontext_t context;
  Side side;
};

// A collective under way, then its result until the last of its lanes has read it.
struct Exchange {
  unsigned mask;
  unsigned arrived;        // lanes that wait
  unsigned lanes, unread;  // of the result: who brought something, who has still to read
  const char* what;
  size_t size;
  Where where;
  unsigned* turn;  // counts completions, where somebody asks
  char payload[warpSize][kPayload];
};

// __syncwarp's order of memory. Two clocks in turn: a lane that has gone on to the next one with this mask must not be
// seen by one that still leaves this one.
struct MaskClocks {
  unsigned mask, turn;
};

struct Warp {
  static constexpr int kMasks = 16;
  unsigned lanes, exited;
  // A lane is in one exchange at most.
  Exchange exchanges[warpSize];
  MaskClocks masks[kMasks];
  int mask_count;
};

struct Barrier {
  int arrived;
  unsigned turn;
  const Fiber* first;
};

class SharedMemory {
 public:
  static constexpr size_t kMaxBytes = 227 * 1024;
  static constexpr size_t kDefaultBytes = 48 * 1024;
  static constexpr int kMaxArrays = 32;
  static constexpr size_t kClocks = 2 + 2 * Warp::kMasks * (kMaxThreads / warpSize);

  // `limit`: bytes that the launch may use in all.
  void begin(size_t dynamic_bytes, size_t limit);
  void* dynamic() const { return dynamic_; }
  void* array(const void* site, size_t bytes);
  Clock* clock(size_t index) { return clocks_ + index; }
  bool contains(const void* address) const { return memory_.contains(address); }

 private:
  // Every array starts in the first of the 32 banks and is followed by at least as much that nobody may touch.
  static constexpr size_t kAlignment = 128;
  static constexpr size_t kMapped = sizeof(Clock) * kClocks + kMaxBytes + 3 * kAlignment * kMaxArrays;

  char* allocate(size_t bytes);

  struct Array {
    const void* site;
    char* address;
  };
  BlockMemory memory_;
  Clock* clocks_;
  char* end_;
  char* dynamic_;
  size_t used_, limit_;
  Array arrays_[kMaxArrays];
  int count_;
};

class Block {
 public:
  // The block that this OS thread runs, or none outside of kernels.
  static Block* current();

  Block(const Shape& shape, const Settings& settings, size_t shared_limit, void (*call)(const void*),
        const void* arguments);
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;
  ~Block() { retire_contexts(0); }
  void run(uint3 index);

  const uint3& index() const { return index_; }
  const Shape& shape() const { return shape_; }
  const Fiber* running() const { return running_; }
  SharedMemory& shared() { return shared_; }
  bool is_stack(const void* address) const { return stacks_.contains(address); }

  void barrier(const char* what, Where where);
  unsigned exchange(const char* what, unsigned mask, const void* mine, size_t size, void* all, Where where,
                    unsigned* turn = nullptr);
  void sync_warp(unsigned mask, Where where);

 private:
  static void enter(boost::context::detail::transfer_t from);

  void begin(uint3 index);
  void retire_contexts(size_t keep);
  bool turn_by_order();
  bool turn_by_warp();
  void resume(Fiber& fiber);
  void suspend(bool for_good = false);
  void wait(State state, const char* what, unsigned mask, Where where);
  [[noreturn]] void report_deadlock() const;

  void complete_barrier();
  Exchange& join(Warp& warp, const char* what, unsigned mask, size_t size, Where where);
  void complete(const Warp& warp, Exchange& exchange);

  const Shape shape_;
  const Settings settings_;
  const size_t shared_limit_;
  void (*const call_)(const void*);
  const void* const arguments_;

  uint3 index_{};
  std::vector<Fiber> fibers_;
  std::vector<Warp> warps_;
  std::vector<int> order_;
  int live_ = 0;
  Barrier barrier_{};
  SharedMemory shared_;
  BlockMemory stacks_;
  std::mt19937 random_;

  Fiber* running_ = nullptr;
  Side scheduler_side_;
  std::deque<void*> contexts_;
  boost::context::detail::fcontext_t scheduler_ = nullptr;
};

// kernel<its template arguments>, without the project's namespace.
std::string kernel_name(const void* kernel);

// Orders a launch after what the host did before it, and the host after the launch.
extern Clock g_begin, g_end;

}  // namespace emulator
