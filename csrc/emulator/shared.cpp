// A block's shared memory.
#include "emulator/scheduler.h"

namespace emulator {

void* dynamic_shared() { return Block::current()->shared().dynamic(); }
void* shared_array(const void* site, size_t bytes) { return Block::current()->shared().array(site, bytes); }

void SharedMemory::begin(size_t dynamic_bytes, size_t limit) {
  memory_.renew(kMapped);
  clocks_ = reinterpret_cast<Clock*>(memory_.start());
  end_ = memory_.start() + sizeof(Clock) * kClocks;
  end_ += kAlignment - reinterpret_cast<uintptr_t>(end_) % kAlignment;
  forbid(end_, memory_.start() + kMapped - end_);
  used_ = 0;
  limit_ = limit;
  count_ = 0;
  dynamic_ = allocate(dynamic_bytes);
}

void* SharedMemory::array(const void* site, size_t bytes) {
  for (int i = 0; i < count_; ++i) {
    if (arrays_[i].site == site) return arrays_[i].address;
  }
  if (count_ == kMaxArrays) fail("more than %d arrays in shared memory", kMaxArrays);
  arrays_[count_] = {site, allocate(bytes)};
  return arrays_[count_++].address;
}

char* SharedMemory::allocate(size_t bytes) {
  used_ += bytes;
  if (used_ > limit_) fail("%zu bytes of shared memory, but the launch may have %zu", used_, limit_);
  char* address = end_;
  end_ += (bytes + 2 * kAlignment - 1) / kAlignment * kAlignment;
  permit(address, bytes);
  // What is read before it was written is NaN or -1.
  fill_unseen(address, 0xff, bytes);
  return address;
}

}  // namespace emulator
