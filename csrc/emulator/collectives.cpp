// Barriers of a block and collectives of a warp.
#include <cstring>

#include "emulator/scheduler.h"

namespace emulator {

void barrier(const char* what, Where where) { Block::current()->barrier(what, where); }

unsigned exchange(const char* what, unsigned mask, const void* mine, size_t size, void* all, Where where) {
  return Block::current()->exchange(what, mask, mine, size, all, where);
}

void sync_warp(unsigned mask, Where where) { Block::current()->sync_warp(mask, where); }

void Block::barrier(const char* what, Where where) {
  Clock* clock = shared_.clock(barrier_.turn % 2);
  release(clock);
  wait(State::kAtBarrier, what, 0, where);
  if (barrier_.arrived++ == 0) barrier_.first = running_;
  const Fiber& first = *barrier_.first;
  if (first.where.line() != where.line() || std::strcmp(first.where.file_name(), where.file_name()) != 0) {
    fail("divergent barrier: %s (%s:%u), but thread (%u,%u,%u) waits at %s (%s:%u)", what, where.file_name(),
         where.line(), first.thread.x, first.thread.y, first.thread.z, first.what, first.where.file_name(),
         first.where.line());
  }
  complete_barrier();
  if (running_->state != State::kReady) suspend();
  acquire(clock);
}

void Block::complete_barrier() {
  if (barrier_.arrived == 0 || barrier_.arrived < live_) return;
  if constexpr (kCounted) count_barrier();
  ++barrier_.turn;
  barrier_.arrived = 0;
  for (Fiber& fiber : fibers_) {
    if (fiber.state == State::kAtBarrier) fiber.state = State::kReady;
  }
}

unsigned Block::exchange(const char* what, unsigned mask, const void* mine, size_t size, void* all, Where where,
                         unsigned* turn) {
  const Fiber& fiber = *running_;
  Warp& warp = warps_[fiber.warp];
  Exchange& exchange = join(warp, what, mask, size, where);
  exchange.turn = turn;
  copy_unseen(exchange.payload[fiber.lane], mine, size);
  wait(State::kInCollective, what, mask, where);
  complete(warp, exchange);
  if (fiber.state != State::kReady) suspend();

  for (int i = 0; i < warpSize; ++i) {
    if (exchange.lanes >> i & 1) copy_unseen(static_cast<char*>(all) + i * size, exchange.payload[i], size);
  }
  exchange.unread &= ~(1u << fiber.lane);
  return exchange.lanes;
}

Exchange& Block::join(Warp& warp, const char* what, unsigned mask, size_t size, Where where) {
  const unsigned lane = running_->lane;
  if (!(mask >> lane & 1)) {
    fail("%s by lane %u, which is not in the mask %08x (%s:%u)", what, lane, mask, where.file_name(), where.line());
  }
  Exchange *waiting = nullptr, *unused = nullptr;
  for (Exchange& exchange : warp.exchanges) {
    if (exchange.arrived != 0 && exchange.mask == mask) waiting = &exchange;
    if (exchange.arrived == 0 && exchange.unread == 0) unused = &exchange;
  }
  if (waiting == nullptr) {
    *unused = {};
    unused->mask = mask;
    unused->arrived = 1u << lane;
    unused->what = what;
    unused->size = size;
    unused->where = where;
    return *unused;
  }
  if (waiting->size != size || std::strcmp(waiting->what, what) != 0) {
    fail("divergent collective: lane %u calls %s (%s:%u), but lanes %08x wait in %s (%s:%u), mask %08x", lane, what,
         where.file_name(), where.line(), waiting->arrived, waiting->what, waiting->where.file_name(),
         waiting->where.line(), mask);
  }
  waiting->arrived |= 1u << lane;
  return *waiting;
}

void Block::complete(const Warp& warp, Exchange& exchange) {
  const unsigned needed = exchange.mask & warp.lanes & ~warp.exited;
  if (exchange.arrived == 0 || (exchange.arrived & needed) != needed) return;
  exchange.lanes = exchange.unread = exchange.arrived;
  exchange.arrived = 0;
  if (exchange.turn != nullptr) ++*exchange.turn;
  Fiber* lanes = &fibers_[(&warp - warps_.data()) * warpSize];
  for (int i = 0; i < warpSize; ++i) {
    if (exchange.lanes >> i & 1) lanes[i].state = State::kReady;
  }
}

void Block::sync_warp(unsigned mask, Where where) {
  Warp& warp = warps_[running_->warp];
  int i = 0;
  while (i < warp.mask_count && warp.masks[i].mask != mask) ++i;
  if (i == warp.mask_count) {
    if (i == Warp::kMasks) fail("__syncwarp with more than %d masks in a block", Warp::kMasks);
    warp.masks[warp.mask_count++] = {mask, 0};
  }
  MaskClocks& clocks = warp.masks[i];
  Clock* clock = shared_.clock(2 + 2 * (running_->warp * Warp::kMasks + i) + clocks.turn % 2);
  release(clock);
  exchange("__syncwarp", mask, nullptr, 0, nullptr, where, &clocks.turn);
  acquire(clock);
}

}  // namespace emulator
