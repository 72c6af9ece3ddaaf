// How the CUDA kernels of sva are launched: pure host arithmetic, without torch and CUDA
// (tests/csrc/test_heuristics.py).
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "common/shared_memory.h"
#include "sva/sva_limits.h"

namespace mmoe::sva {

constexpr int kWidestHead = 128;  // elements; the kernels have instances for 32, 64 and 128

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

constexpr int kKeysOfTile = 16;     // of a warp's dot products
constexpr int kAbsorbedBlocks = 2;  // that the registers of a multiprocessor hold

struct AbsorbedShape {
  int64_t window, channels;
  bool positions;
};

// Where what a block of the kernels over absorbed encoders keeps lies in its shared memory, in bytes. `row` and `plane`
// are in floats.
struct AbsorbedLayout {
  bool staged;                    // x^ has a place, and the kernel takes vectors
  int row, plane;                 // [H][row] of weights; strides that keep shared stores free of conflicts
  int weights, slopes, products;  // planes; the latter two of the backward
  int moments, means, cells;      // [row] of float2, float2 (backward), int
  int sums, valid;                // [encoders][2][H] of float (backward), [encoders] of 64 bits
  int first_key[kSvaEncoders];    // of an encoder in a row of weights
  int normed[kSvaEncoders];       // [m * m, C] x^
  int streams[kSvaEncoders];      // [2, H, C] absorbed and grad_pooled (backward), or -1: read again
  int positions[kSvaEncoders];    // [m * m, C], or -1: read where they are
  int64_t bytes;
};

// `most`: bytes a block can have. `preferred`: bytes it should stay below, so that a multiprocessor holds two. The
// positions are the same few rows for every query and stay in the caches by themselves: they never cost the second
// block.
inline AbsorbedLayout absorbed_layout(const std::vector<AbsorbedShape>& encoders, int64_t heads, int64_t element_bytes,
                                      bool aligned, bool backward, int64_t most, int64_t preferred) {
  AbsorbedLayout at = {};
  int64_t bytes = 0;
  const auto take = [&bytes](int64_t wanted) {
    const int64_t offset = bytes;
    bytes += (wanted + 15) / 16 * 16;
    return static_cast<int>(offset);
  };
  // Multiples of 16: where they are staged, a row is one of vectors.
  const auto bytes_of_window = [&](const AbsorbedShape& encoder) {
    return encoder.window * encoder.window * encoder.channels * element_bytes;
  };
  const auto bytes_of_streams = [&](const AbsorbedShape& encoder) {
    return 2 * heads * encoder.channels * element_bytes;
  };
  // 16 after a multiple of 32 floats: a warp stores a tile of 2 x 16 weights, half of them a row or a plane apart.
  const auto spread = [](int64_t floats) { return static_cast<int>((floats + 15) / 32 * 32 + 16); };
  int64_t keys = 0;
  for (size_t i = 0; i < encoders.size(); ++i) {
    at.first_key[i] = static_cast<int>(keys);
    keys += (encoders[i].window * encoders[i].window + kKeysOfTile - 1) / kKeysOfTile * kKeysOfTile;
  }
  at.row = spread(keys);
  at.plane = spread(heads * at.row);
  at.weights = take(at.plane * 4);
  // A tile's other row goes to the next plane in the backward: nothing may lie between.
  if (backward) {
    at.slopes = take(at.plane * 4);
    at.products = take(at.plane * 4);
  }
  at.moments = take(at.row * 8);
  at.cells = take(at.row * 4);
  at.valid = take(static_cast<int64_t>(encoders.size()) * 8);
  if (backward) {
    at.means = take(at.row * 8);
    at.sums = take(static_cast<int64_t>(encoders.size()) * 2 * heads * 4);
  }
  int64_t windows = 0, streams = 0;  // bytes of every encoder's
  for (size_t i = 0; i < encoders.size(); ++i) {
    at.normed[i] = at.streams[i] = at.positions[i] = -1;
    windows += bytes_of_window(encoders[i]);
    streams += bytes_of_streams(encoders[i]);
  }
  at.staged = aligned && bytes + windows <= most;
  const bool streamed = backward && bytes + windows + streams <= most;
  for (size_t i = 0; at.staged && i < encoders.size(); ++i) {
    at.normed[i] = take(bytes_of_window(encoders[i]));
    if (streamed) at.streams[i] = take(bytes_of_streams(encoders[i]));
  }
  const int64_t limit = bytes <= preferred ? preferred : most;
  for (size_t i = 0; at.staged && i < encoders.size(); ++i) {
    const int64_t wanted = bytes_of_window(encoders[i]);
    if (encoders[i].positions && bytes + wanted <= limit) at.positions[i] = take(wanted);
  }
  at.bytes = bytes;
  return at;
}

// Blocks that go from query to query: no more than are resident at a time, since a second wave would read the positions
// once more and leave places empty. Registers hold kAbsorbedBlocks, shared memory what `bytes` and 1 KiB a block leave.
inline int64_t absorbed_blocks(int64_t queries, int64_t multiprocessors, int64_t bytes_of_multiprocessor,
                               int64_t bytes) {
  const int64_t resident = std::clamp<int64_t>(bytes_of_multiprocessor / (bytes + 1024), 1, kAbsorbedBlocks);
  return std::min(queries, multiprocessors * resident);
}

}  // namespace mmoe::sva
