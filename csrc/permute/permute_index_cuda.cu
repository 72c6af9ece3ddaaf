// permute_index on CUDA: launch and registration. Without max_rows the host waits for the stream once, because the size
// of slot_of_row is known on the device only; with it nothing waits.
#include "common/launch.h"
#include "common/library.h"
#include "permute/permute_index.h"
#include "permute/permute_index_kernel.cuh"

namespace mmoe {
namespace {

namespace device = permute_index;

template <typename Id>
PermuteIndex sort_slots(const Tensor& ids, int experts, int align, std::optional<int64_t> max_rows) {
  const DeviceScope scope(ids);
  const cudaStream_t stream = scope.stream();
  const Id* id_of_slot = ids.const_data_ptr<Id>();
  const int slots = static_cast<int>(ids.numel());
  const int chunks = static_cast<int>((ids.numel() + device::kSlotsPerChunk - 1) / device::kSlotsPerChunk);
  const int columns = device::columns_of(experts);
  const size_t shared_bytes = columns * sizeof(int);

  // The counts, a number a chunk and column, then scan_kernel's ends and status.
  Tensor scratch = torch::stable::new_empty(ids, {(chunks + int64_t{1}) * columns}, ScalarType::Int);
  Tensor offsets = torch::stable::new_empty(ids, {experts + 1}, ScalarType::Int);
  int* count = scratch.mutable_data_ptr<int32_t>();
  int* ends = count + static_cast<int64_t>(chunks) * columns;
  int* status = ends + experts;
  int* offset = offsets.mutable_data_ptr<int32_t>();
  if (chunks > 0) {
    MMOE_LAUNCH(device::count_kernel<Id>, chunks, kWarp, shared_bytes, stream)(id_of_slot, slots, experts, count);
    check_launch("permute_index: count_kernel");
  }
  const int most = static_cast<int>(max_rows.value_or(std::numeric_limits<int32_t>::max()));
  MMOE_LAUNCH(device::scan_kernel, 1, device::kScanThreads, 0, stream)
  (count, chunks, experts, align, most, offset, ends, status);
  check_launch("permute_index: scan_kernel");

  int rows = most;
  if (!max_rows) {
    int host_status[2];
    wait_for(scope, host_status, status, sizeof(host_status), "permute_index: number of rows");
    check_no_negative_id(host_status[1] > 0);
    rows = host_status[0];
  }
  Tensor row_of_slot = torch::stable::new_empty(ids, {ids.size(0), ids.size(1)}, ScalarType::Int);
  Tensor slot_of_row = torch::stable::new_empty(ids, {rows}, ScalarType::Int);
  const int blocks = chunks + (align > 1 || max_rows ? device::kPadBlocks : 0);
  if (blocks > 0) {
    MMOE_LAUNCH(device::place_kernel<Id>, blocks, kWarp, shared_bytes, stream)
    (id_of_slot, slots, chunks, experts, rows, count, offset, ends, row_of_slot.mutable_data_ptr<int32_t>(),
     slot_of_row.mutable_data_ptr<int32_t>());
    check_launch("permute_index: place_kernel");
  }
  return {row_of_slot, slot_of_row, offsets};
}

PermuteIndex permute_index_cuda(Tensor ids, int64_t experts, int64_t align, std::optional<int64_t> max_rows) {
  check_permute_index(ids, experts, align, max_rows);
  const int64_t max_experts = kSharedByDefault / static_cast<int64_t>(sizeof(int)) - 2;
  check(experts <= max_experts, "permute_index: experts = ", experts, ", but CUDA takes at most ", max_experts);
  const Tensor contiguous = torch::stable::contiguous(ids);
  const auto sort = ids.scalar_type() == ScalarType::Int ? sort_slots<int32_t> : sort_slots<int64_t>;
  return sort(contiguous, static_cast<int>(experts), static_cast<int>(align), max_rows);
}

}  // namespace

MMOE_CUDA(m) { m.impl("permute_index", TORCH_BOX(&permute_index_cuda)); }

}  // namespace mmoe
