"""permute_index: the CUDA kernels on the emulator against the reference, which they equal exactly."""

import pytest
import torch

from mmoe.reference import permute_index as reference

# No tokens, no slots, one slot, one expert, several chunks of 1024 slots with a ragged last one, more experts than the
# 32 × 32 that the scan takes at a time.
SHAPES = [(0, 3, 4, 2), (5, 0, 4, 2), (1, 1, 1, 0), (333, 3, 1, 1), (700, 6, 33, 7), (1500, 2, 1100, 50)]


def compare(emulated, ids: torch.Tensor, experts: int, align: int = 1, max_rows: int | None = None) -> None:
    got = emulated.permute_index(ids, experts, align, max_rows)
    wanted = reference.permute_index(ids, experts, align, max_rows)
    for name, one, other in zip(wanted._fields, got, wanted, strict=True):
        assert one.dtype == torch.int32, name
        assert torch.equal(one, other), name


def draw(tokens: int, k: int, experts: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.randint(experts, (tokens, k), generator=torch.Generator().manual_seed(tokens + k), dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(("tokens", "k", "experts", "zero_experts"), SHAPES)
def test_equals_reference(emulated, tokens, k, experts, zero_experts, dtype):
    compare(emulated, draw(tokens, k, experts + zero_experts, dtype), experts)


@pytest.mark.parametrize("spare", [None, -40, -1, 0, 50])
@pytest.mark.parametrize("align", [1, 8, 128])
@pytest.mark.parametrize(("tokens", "k", "experts", "zero_experts"), [(0, 2, 3, 1), (40, 3, 5, 3), (900, 3, 70, 20)])
def test_aligned_and_limited(emulated, tokens, k, experts, zero_experts, align, spare):
    ids = draw(tokens, k, experts + zero_experts)
    needed = len(reference.permute_index(ids, experts, align).slot_of_row)
    compare(emulated, ids, experts, align, None if spare is None else max(needed + spare, 0))


@pytest.mark.parametrize("ids", [torch.full((100, 3), 5), torch.full((1000, 2), 2), draw(3, 200, 7).t()])
def test_unusual_ids(emulated, ids):
    compare(emulated, ids, 5)


def test_negative_id(emulated):
    ids = torch.tensor([[0, -1], [4, 2]])
    with pytest.raises(RuntimeError, match="ids must not be negative"):
        emulated.permute_index(ids, 3)
    # Nothing waits for the device here, so nothing can be raised: the slot takes no row.
    row_of_slot, slot_of_row, offsets = emulated.permute_index(ids, 3, max_rows=4)
    assert row_of_slot.tolist() == [[0, -1], [-1, 1]]
    assert slot_of_row.tolist() == [0, 3, -1, -1]
    assert offsets.tolist() == [0, 1, 1, 2]
