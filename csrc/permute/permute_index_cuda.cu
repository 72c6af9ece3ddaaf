// permute_index on CUDA: launch and registration. The host waits for the stream once, because the size of slot_of_row
// is known on the device only.
#include "common/launch.h"
#include "common/library.h"
#include "permute/permute_index.h"
#include "permute/permute_kernel.cuh"

namespace mmoe {
namespace {

constexpr int64_t kMaxSharedBytes = 48 * 1024;

template <typename Id>
PermuteIndex sort_slots(const Tensor& ids, int experts) {
  const DeviceScope scope(ids);
  const cudaStream_t stream = scope.stream();
  const Id* id_of_slot = ids.const_data_ptr<Id>();
  const int slots = static_cast<int>(ids.numel());
  const int chunks = static_cast<int>((ids.numel() + permute::kSlotsPerChunk - 1) / permute::kSlotsPerChunk);
  const size_t shared_bytes = (experts + 2) * sizeof(int);

  Tensor counts = torch::stable::new_empty(ids, {chunks, experts + 2}, ScalarType::Int);
  Tensor offsets = torch::stable::new_empty(ids, {experts + 1}, ScalarType::Int);
  Tensor status = torch::stable::new_empty(ids, {2}, ScalarType::Int);
  int* count = counts.mutable_data_ptr<int32_t>();
  if (chunks > 0) {
    MMOE_LAUNCH(permute::count_kernel<Id>, chunks, permute::kLanes, shared_bytes, stream)(id_of_slot, slots, experts,
                                                                                          count);
    check_launch("permute_index: count_kernel");
  }
  MMOE_LAUNCH(permute::scan_kernel, 1, permute::kLanes, 0, stream)(
      count, chunks, experts, offsets.mutable_data_ptr<int32_t>(), status.mutable_data_ptr<int32_t>());
  check_launch("permute_index: scan_kernel");

  int host_status[2];
  wait_for(scope, host_status, status.const_data_ptr(), sizeof(host_status), "permute_index: number of rows");
  check_no_negative_id(host_status[1] > 0);

  Tensor row_of_slot = torch::stable::new_empty(ids, {ids.size(0), ids.size(1)}, ScalarType::Int);
  Tensor slot_of_row = torch::stable::new_empty(ids, {host_status[0]}, ScalarType::Int);
  if (chunks > 0) {
    MMOE_LAUNCH(permute::place_kernel<Id>, chunks, permute::kLanes, shared_bytes, stream)(
        id_of_slot, slots, experts, count, row_of_slot.mutable_data_ptr<int32_t>(),
        slot_of_row.mutable_data_ptr<int32_t>());
    check_launch("permute_index: place_kernel");
  }
  return {row_of_slot, slot_of_row, offsets};
}

PermuteIndex permute_index_cuda(Tensor ids, int64_t experts) {
  check_permute_index(ids, experts);
  const int64_t max_experts = kMaxSharedBytes / static_cast<int64_t>(sizeof(int)) - 2;
  check(experts <= max_experts, "permute_index: experts = ", experts, ", but CUDA takes at most ", max_experts);
  const Tensor contiguous = torch::stable::contiguous(ids);
  return ids.scalar_type() == ScalarType::Int ? sort_slots<int32_t>(contiguous, static_cast<int>(experts))
                                              : sort_slots<int64_t>(contiguous, static_cast<int>(experts));
}

}  // namespace

MMOE_CUDA(m) { m.impl("permute_index", TORCH_BOX(&permute_index_cuda)); }

}  // namespace mmoe
