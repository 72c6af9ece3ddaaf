// Launches: the checks that a driver makes, and the grid over OS threads.
#include "emulator/launch.h"

#include <cxxabi.h>
#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>
#include <numeric>
#include <thread>

#include "emulator/scheduler.h"

namespace emulator {
namespace {

constexpr int kErrorStatus = 86;

std::mutex g_mutex;
std::map<const void*, size_t>& allowed_bytes() {
  static std::map<const void*, size_t> bytes;
  return bytes;
}

size_t dynamic_limit(const void* kernel) {
  const std::lock_guard lock(g_mutex);
  const auto found = allowed_bytes().find(kernel);
  return found == allowed_bytes().end() ? 0 : found->second;
}

void check_shape(const Shape& shape) {
  const dim3 &grid = shape.grid, &block = shape.block;
  const std::string name = kernel_name(shape.kernel);
  if (grid.x < 1 || grid.y < 1 || grid.z < 1 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
    fail("%s: no grid of (%u,%u,%u) blocks", name.c_str(), grid.x, grid.y, grid.z);
  }
  const size_t threads = size_t{block.x} * block.y * block.z;
  if (threads < 1 || threads > kMaxThreads || block.z > 64) {
    fail("%s: no block of (%u,%u,%u) threads", name.c_str(), block.x, block.y, block.z);
  }
  const size_t limit = std::max(SharedMemory::kDefaultBytes, dynamic_limit(shape.kernel));
  if (shape.dynamic_bytes > limit) {
    fail("%s: %zu bytes of dynamic shared memory, but %zu are allowed: see cudaFuncSetAttribute", name.c_str(),
         shape.dynamic_bytes, limit);
  }
}

std::vector<size_t> block_order(size_t count, const Settings& settings) {
  std::vector<size_t> order(count);
  std::iota(order.begin(), order.end(), size_t{0});
  if (settings.schedule == Schedule::kReverse) std::reverse(order.begin(), order.end());
  if (settings.schedule == Schedule::kRandom) std::shuffle(order.begin(), order.end(), std::mt19937(settings.seed));
  return order;
}

}  // namespace

void launch(const Shape& shape, void (*call)(const void*), const void* arguments) {
  check_shape(shape);
  const Settings settings = read_settings();
  // Who asked for more than the default may use all there is, static arrays included.
  const bool opted_in = dynamic_limit(shape.kernel) > 0;
  const size_t shared_limit = opted_in ? SharedMemory::kMaxBytes : SharedMemory::kDefaultBytes;
  const dim3 grid = shape.grid;
  const std::vector<size_t> order = block_order(size_t{grid.x} * grid.y * grid.z, settings);
  std::atomic<size_t> next{0};
  const auto work = [&] {
    Block block(shape, settings, shared_limit, call, arguments);
    for (size_t i; (i = next++) < order.size();) {
      const size_t row = order[i] / grid.x;
      block.run({static_cast<unsigned>(order[i] % grid.x), static_cast<unsigned>(row % grid.y),
                 static_cast<unsigned>(row / grid.y)});
    }
  };
  release(&g_begin);
  if (settings.threads == 1) {
    work();
  } else {
    std::vector<std::thread> threads;
    for (int i = 0; i < settings.threads; ++i) threads.emplace_back(work);
    for (std::thread& thread : threads) thread.join();
  }
  acquire(&g_end);
}

void allow_dynamic_bytes(const void* kernel, size_t bytes) {
  if (bytes > SharedMemory::kMaxBytes) {
    fail("%s: %zu bytes of dynamic shared memory, but a device has %zu", kernel_name(kernel).c_str(), bytes,
         SharedMemory::kMaxBytes);
  }
  const std::lock_guard lock(g_mutex);
  allowed_bytes()[kernel] = bytes;
}

std::string kernel_name(const void* kernel) {
  Dl_info info;
  if (dladdr(kernel, &info) == 0 || info.dli_sname == nullptr) return "a kernel without a symbol";
  char* demangled = abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, nullptr);
  if (demangled == nullptr) return info.dli_sname;
  std::string name = demangled;
  std::free(demangled);
  // "void mmoe::permute::count_kernel<int>(int const*, int)": neither the result's type nor the parameters.
  int depth = 0;
  for (size_t i = 0; i < name.size(); ++i) {
    depth += name[i] == '<' ? 1 : name[i] == '>' ? -1 : 0;
    if (name[i] == '(' && depth == 0) {
      name.resize(i);
      break;
    }
  }
  for (const std::string& prefix : {"void ", "mmoe::"}) {
    if (name.starts_with(prefix)) name.erase(0, prefix.size());
  }
  return name;
}

void fail(const char* format, ...) {
  char message[1024];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(message, sizeof(message), format, arguments);
  va_end(arguments);
  const Block* block = Block::current();
  if (block == nullptr) {
    std::fprintf(stderr, "mmoe emulator: %s\n", message);
  } else {
    const uint3& index = block->index();
    char thread[64] = "";
    if (const Fiber* fiber = block->running()) {
      snprintf(thread, sizeof(thread), " thread (%u,%u,%u)", fiber->thread.x, fiber->thread.y, fiber->thread.z);
    }
    std::fprintf(stderr, "mmoe emulator: %s block (%u,%u,%u)%s: %s\n", kernel_name(block->shape().kernel).c_str(),
                 index.x, index.y, index.z, thread, message);
  }
  // Not exit(): its handlers would run on a fiber's stack.
  std::_Exit(kErrorStatus);
}

}  // namespace emulator
