// The threads of a block as fibers on one OS thread: a thread runs until it waits for others or ends.
#include "emulator/scheduler.h"

#include <algorithm>
#include <numeric>

namespace emulator {

namespace context = boost::context::detail;

Clock g_begin, g_end;

namespace {

thread_local Block* t_block = nullptr;

}  // namespace

Block* Block::current() { return t_block; }

uint3 thread_index() { return Block::current()->running()->thread; }
uint3 block_index() { return Block::current()->index(); }
dim3 block_shape() { return Block::current()->shape().block; }
dim3 grid_shape() { return Block::current()->shape().grid; }
unsigned lane() { return Block::current()->running()->lane; }

Block::Block(const Shape& shape, const Settings& settings, size_t shared_limit, void (*call)(const void*),
             const void* arguments)
    : shape_(shape),
      settings_(settings),
      shared_limit_(shared_limit),
      call_(call),
      arguments_(arguments),
      fibers_(shape.block.x * shape.block.y * shape.block.z),
      warps_((fibers_.size() + warpSize - 1) / warpSize),
      order_(fibers_.size()) {}

void Block::run(uint3 index) {
  t_block = this;
  begin(index);
  while (live_ > 0) {
    const bool moved = settings_.schedule == Schedule::kGreedy ? turn_by_warp() : turn_by_order();
    if (!moved) report_deadlock();
  }
  if constexpr (kCounted) count_block();
  for (const Fiber& fiber : fibers_) contexts_.push_back(fiber.side.context);
  retire_contexts(kContexts);
  t_block = nullptr;
}

void Block::retire_contexts(size_t keep) {
  for (; contexts_.size() > keep; contexts_.pop_front()) destroy_context(contexts_.front());
}

void Block::begin(uint3 index) {
  const int count = static_cast<int>(fibers_.size());
  index_ = index;
  live_ = count;
  barrier_ = {};
  shared_.begin(shape_.dynamic_bytes, shared_limit_);
  scheduler_side_.context = current_context();
  random_.seed(settings_.seed + 2654435761u * (index.x + 65537 * (index.y + 65537 * index.z)));
  std::iota(order_.begin(), order_.end(), 0);
  if (settings_.schedule == Schedule::kReverse) std::reverse(order_.begin(), order_.end());

  for (int w = 0; w < static_cast<int>(warps_.size()); ++w) {
    const int lanes = std::min(warpSize, count - w * warpSize);
    warps_[w] = {};
    warps_[w].lanes = lanes == warpSize ? ~0u : (1u << lanes) - 1;
  }
  const bool fresh = stacks_.renew(count * kStackBytes);
  char* stack = stacks_.start();
  for (int i = 0; i < count; ++i, stack += kStackBytes) {
    // A stack that overflows must not reach the next thread's.
    constexpr size_t kGuard = 4096;
    if (fresh) mprotect(stack, kGuard, PROT_NONE);
    Fiber& fiber = fibers_[i];
    const unsigned row = i / shape_.block.x;
    fiber = {};
    fiber.thread = {i % shape_.block.x, row % shape_.block.y, row / shape_.block.y};
    fiber.lane = i % warpSize;
    fiber.warp = i / warpSize;
    fiber.side = {stack + kGuard, kStackBytes - kGuard, nullptr, create_context()};
    fiber.context = context::make_fcontext(stack + kStackBytes, kStackBytes - kGuard, enter);
  }
}

void Block::enter(context::transfer_t from) {
  Block& block = *t_block;
  Fiber& fiber = *block.running_;
  block.scheduler_ = from.fctx;
  end_switch(fiber.side, block.scheduler_side_);
  acquire(&g_begin);
  block.call_(block.arguments_);
  release(&g_end);
  fiber.state = State::kExited;
  block.suspend(true);
  __builtin_unreachable();
}

bool Block::turn_by_order() {
  if (settings_.schedule == Schedule::kRandom) std::shuffle(order_.begin(), order_.end(), random_);
  bool moved = false;
  for (int i : order_) {
    if (fibers_[i].state != State::kReady) continue;
    resume(fibers_[i]);
    moved = true;
  }
  return moved;
}

bool Block::turn_by_warp() {
  const size_t first = random_() % warps_.size();
  bool moved = false;
  for (size_t w = 0; w < warps_.size(); ++w) {
    const size_t begin = (first + w) % warps_.size() * warpSize;
    const size_t end = std::min(begin + warpSize, fibers_.size());
    for (bool again = true; again;) {
      again = false;
      for (size_t i = begin; i < end; ++i) {
        if (fibers_[i].state != State::kReady) continue;
        resume(fibers_[i]);
        again = moved = true;
      }
    }
  }
  return moved;
}

void Block::resume(Fiber& fiber) {
  running_ = &fiber;
  begin_switch(scheduler_side_, fiber.side);
  fiber.context = context::jump_fcontext(fiber.context, nullptr).fctx;
  end_switch(scheduler_side_, fiber.side);
  running_ = nullptr;
  if (fiber.state != State::kExited) return;
  --live_;
  complete_barrier();
  Warp& warp = warps_[fiber.warp];
  warp.exited |= 1u << fiber.lane;
  for (Exchange& exchange : warp.exchanges) complete(warp, exchange);
}

void Block::suspend(bool for_good) {
  Fiber& fiber = *running_;
  begin_switch(fiber.side, scheduler_side_, for_good);
  scheduler_ = context::jump_fcontext(scheduler_, nullptr).fctx;
  end_switch(fiber.side, scheduler_side_);
}

void Block::wait(State state, const char* what, unsigned mask, Where where) {
  Fiber& fiber = *running_;
  fiber.state = state;
  fiber.what = what;
  fiber.mask = mask;
  fiber.where = where;
}

void Block::report_deadlock() const {
  const Fiber *at_barrier = nullptr, *in_collective = nullptr;
  int barriers = 0, collectives = 0;
  for (const Fiber& fiber : fibers_) {
    if (fiber.state == State::kAtBarrier && barriers++ == 0) at_barrier = &fiber;
    if (fiber.state == State::kInCollective && collectives++ == 0) in_collective = &fiber;
  }
  char first[256] = "", second[256] = "";
  if (at_barrier != nullptr) {
    snprintf(first, sizeof(first), ", %d at a barrier: %s (%s:%u)", barriers, at_barrier->what,
             at_barrier->where.file_name(), at_barrier->where.line());
  }
  if (in_collective != nullptr) {
    snprintf(second, sizeof(second), ", %d in a collective of a warp: lane %u of warp %u calls %s, mask %08x (%s:%u)",
             collectives, in_collective->lane, in_collective->warp, in_collective->what, in_collective->mask,
             in_collective->where.file_name(), in_collective->where.line());
  }
  fail("deadlock: %d threads have exited%s%s", static_cast<int>(fibers_.size()) - live_, first, second);
}

}  // namespace emulator
