// How the CUDA kernels of sva are launched: pure host arithmetic, without torch and CUDA
// (tests/csrc/test_heuristics.py).
#pragma once

#include <algorithm>
#include <cstdint>

namespace mmoe::sva {

constexpr int kWidestHead = 128;                 // elements; the kernels have instances for 32, 64 and 128
constexpr int64_t kSharedByDefault = 48 * 1024;  // bytes a block gets without asking for more

// Launch of the kernels over projected encoders.
struct ProjectedLaunch {
  bool vectors;          // 16-byte accesses
  int width;             // elements of a head that the lanes make room for
  int groups;            // of heads that a query is split into, a warp each
  int warps;             // of a block
  int64_t shared_bytes;  // of a block of the backward: two floats a key and head
};

// `aligned`: every pointer, every image's start and every head is a multiple of 16 bytes. `keys`: of a query. The least
// room that holds a head, so that a warp's lanes are busy; more where the weights of very many keys would not fit into
// shared memory.
inline ProjectedLaunch projected_launch(int64_t heads, int64_t width, int64_t element_bytes, bool aligned,
                                        int64_t keys) {
  const auto heads_of_warp = [&](int room) { return aligned ? 512 / element_bytes / room : 1; };
  const auto bytes_of_warp = [&](int room) { return keys * heads_of_warp(room) * 8; };
  int room = aligned ? 32 : kWidestHead;
  while (room < kWidestHead && (room < width || bytes_of_warp(room) > kSharedByDefault)) room *= 2;
  const int64_t fitting = kSharedByDefault / std::max<int64_t>(bytes_of_warp(room), 1);
  const int warps = static_cast<int>(std::clamp<int64_t>(fitting, 1, 4));
  const int64_t groups = (heads + heads_of_warp(room) - 1) / heads_of_warp(room);
  return {aligned, room, static_cast<int>(groups), warps, warps * bytes_of_warp(room)};
}

}  // namespace mmoe::sva
