// permute_index on the CPU: a counting sort over chunks of slots, in parallel on torch's own threads.
#include <algorithm>
#include <atomic>
#include <vector>

#include "common/library.h"
#include "permute/permute_index.h"

namespace mmoe {
namespace {

constexpr int64_t kSlotsPerChunk = 16384;

template <typename Id>
PermuteIndex sort_slots(const Tensor& ids, int64_t experts, int64_t align, std::optional<int64_t> max_rows) {
  const Id* id_of_slot = ids.const_data_ptr<Id>();
  const int64_t slots = ids.numel();
  const int64_t chunks = (slots + kSlotsPerChunk - 1) / kSlotsPerChunk;
  const auto for_each_chunk = [&](auto&& body) {
    torch::stable::parallel_for(0, chunks, 1, [&](int64_t first, int64_t last) {
      for (int64_t chunk = first; chunk < last; ++chunk) {
        body(chunk, chunk * kSlotsPerChunk, std::min(slots, (chunk + 1) * kSlotsPerChunk));
      }
    });
  };

  // cursor[chunk][expert]: first the count, then the row of the next slot of that chunk and expert. The rows depend on
  // the slots alone, so any number of threads gives the same result.
  std::vector<int32_t> cursor(chunks * experts, 0);
  std::atomic<bool> negative = false;
  for_each_chunk([&](int64_t chunk, int64_t begin, int64_t end) {
    int32_t* count = cursor.data() + chunk * experts;
    for (int64_t slot = begin; slot < end; ++slot) {
      const Id id = id_of_slot[slot];
      if (id < 0) {
        // Nothing may be thrown through torch's thread pool.
        negative = true;
      } else if (id < experts) {
        ++count[id];
      }
    }
  });
  check_no_negative_id(negative);

  // end_of_run[expert]: behind the last row that a slot takes, before the padding.
  std::vector<int32_t> start_of_run(experts + 1), end_of_run(experts);
  int64_t row = 0;
  for (int64_t expert = 0; expert < experts; ++expert) {
    start_of_run[expert] = static_cast<int32_t>(row);
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      int32_t& place = cursor[chunk * experts + expert];
      const int32_t count = place;
      place = static_cast<int32_t>(row);
      row += count;
    }
    end_of_run[expert] = static_cast<int32_t>(row);
    row = (row + align - 1) / align * align;
  }
  start_of_run[experts] = static_cast<int32_t>(row);
  const int32_t rows = static_cast<int32_t>(max_rows.value_or(row));

  Tensor row_of_slot = torch::stable::new_empty(ids, {ids.size(0), ids.size(1)}, ScalarType::Int);
  Tensor slot_of_row = torch::stable::new_empty(ids, {rows}, ScalarType::Int);
  Tensor offsets = torch::stable::new_empty(ids, {experts + 1}, ScalarType::Int);
  int32_t* to_row = row_of_slot.mutable_data_ptr<int32_t>();
  int32_t* to_slot = slot_of_row.mutable_data_ptr<int32_t>();
  int32_t* offset = offsets.mutable_data_ptr<int32_t>();
  for_each_chunk([&](int64_t chunk, int64_t begin, int64_t end) {
    int32_t* next = cursor.data() + chunk * experts;
    for (int64_t slot = begin; slot < end; ++slot) {
      const Id id = id_of_slot[slot];
      int32_t place = id < experts ? next[id]++ : -1;
      if (place >= rows) place = -1;
      to_row[slot] = place;
      if (place >= 0) to_slot[place] = static_cast<int32_t>(slot);
    }
  });
  const auto pad = [&](int32_t begin, int32_t end) {
    std::fill(to_slot + std::min(begin, rows), to_slot + std::min(end, rows), -1);
  };
  for (int64_t expert = 0; expert < experts; ++expert) {
    offset[expert] = std::min(start_of_run[expert], rows);
    pad(end_of_run[expert], start_of_run[expert + 1]);
  }
  offset[experts] = std::min(start_of_run[experts], rows);
  pad(start_of_run[experts], rows);
  return {row_of_slot, slot_of_row, offsets};
}

PermuteIndex permute_index_cpu(Tensor ids, int64_t experts, int64_t align, std::optional<int64_t> max_rows) {
  check_permute_index(ids, experts, align, max_rows);
  const Tensor contiguous = torch::stable::contiguous(ids);
  return ids.scalar_type() == ScalarType::Int ? sort_slots<int32_t>(contiguous, experts, align, max_rows)
                                              : sort_slots<int64_t>(contiguous, experts, align, max_rows);
}

}  // namespace

MMOE_CPU(m) { m.impl("permute_index", TORCH_BOX(&permute_index_cpu)); }

}  // namespace mmoe
