import subprocess
import sys

import pytest
import torch
from ops import threads

from mmoe.ops import load_library
from mmoe.ops.permute_index import permute_index
from mmoe.reference import permute_index as reference

pytestmark = pytest.mark.latest
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
IMPLEMENTATIONS = [permute_index, reference.permute_index]

# Enough slots for several chunks on either device (16384 and 1024 slots), with a ragged last one; one expert; more
# experts than a warp has lanes; shapes without slots.
SHAPES = [(0, 3, 4, 2), (5, 0, 4, 2), (1, 1, 1, 0), (1, 4, 8, 2), (333, 3, 1, 1), (700, 6, 33, 7), (9001, 4, 130, 20)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(("tokens", "k", "experts", "zero_experts"), SHAPES)
def test_equals_reference(tokens, k, experts, zero_experts, dtype, device):
    generator = torch.Generator().manual_seed(tokens + k)
    ids = torch.randint(experts + zero_experts, (tokens, k), generator=generator, dtype=dtype)
    assert_equal(permute_index(ids.to(device), experts), reference.permute_index(ids, experts))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("spare", [None, -40, -1, 0, 50])
@pytest.mark.parametrize("align", [1, 8, 128])
@pytest.mark.parametrize(("tokens", "k", "experts", "zero_experts"), [(0, 2, 3, 1), (40, 3, 5, 3), (6000, 4, 70, 20)])
def test_aligned_and_limited(tokens, k, experts, zero_experts, align, spare, device):
    """``spare``: rows beyond those needed; where negative, the last rows are dropped."""
    ids = torch.randint(experts + zero_experts, (tokens, k), generator=torch.Generator().manual_seed(k))
    needed = len(reference.permute_index(ids, experts, align).slot_of_row)
    rows = None if spare is None else max(needed + spare, 0)
    got = permute_index(ids.to(device), experts, align=align, max_rows=rows)
    assert_equal(got, reference.permute_index(ids, experts, align, rows))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_aligned_by_hand(implementation):
    ids = torch.tensor([[2, 0], [3, 2], [0, 4]])
    result = implementation(ids, 3, align=4)
    assert result.offsets.tolist() == [0, 4, 4, 8]
    assert result.slot_of_row.tolist() == [1, 4, -1, -1, 0, 3, -1, -1]
    assert result.row_of_slot.tolist() == [[4, 0], [-1, 5], [1, -1]]
    result = implementation(ids, 3, align=4, max_rows=10)
    assert result.offsets.tolist() == [0, 4, 4, 8]
    assert result.slot_of_row.tolist() == [1, 4, -1, -1, 0, 3, -1, -1, -1, -1]
    result = implementation(ids, 3, align=4, max_rows=5)
    assert result.offsets.tolist() == [0, 4, 4, 5]
    assert result.slot_of_row.tolist() == [1, 4, -1, -1, 0]
    assert result.row_of_slot.tolist() == [[4, 0], [-1, -1], [1, -1]]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("name", "ids"),
    [
        ("all zero experts", torch.full((100, 3), 5)),
        ("all to one expert", torch.full((20000, 2), 2)),
        ("not contiguous", torch.arange(600).reshape(3, 200).remainder(7).t()),
        ("expanded", torch.tensor([[0], [6], [3]]).expand(3, 4)),
    ],
)
def test_unusual_ids(name, ids, device):
    assert_equal(permute_index(ids.to(device), 5), reference.permute_index(ids, 5))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_by_hand(implementation):
    result = implementation(torch.tensor([[2, 0], [3, 2], [0, 4]]), 3)
    assert result.row_of_slot.tolist() == [[2, 0], [-1, 3], [1, -1]]
    assert result.slot_of_row.tolist() == [1, 4, 0, 3]
    assert result.offsets.tolist() == [0, 2, 2, 4]


def test_any_number_of_threads_gives_the_same_bits():
    ids = torch.randint(40, (30000, 4), generator=torch.Generator().manual_seed(0))
    threads.check_bits(lambda: permute_index(ids, 32))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_negative_id(implementation):
    with pytest.raises(RuntimeError, match="ids must not be negative"):
        implementation(torch.tensor([[0, -1]]), 3)


@pytest.mark.gpu
def test_negative_id_on_the_gpu():
    with pytest.raises(RuntimeError, match="ids must not be negative"):
        permute_index(torch.tensor([[0, -1]], device="cuda"), 3)


@pytest.mark.parametrize(
    ("ids", "experts", "error", "message"),
    [
        (torch.zeros(2, 2), 3, TypeError, r"ids is torch\.float32"),
        (torch.zeros(2, dtype=torch.int64), 3, ValueError, "ids has shape"),
        (torch.zeros(2, 2, dtype=torch.int64), 0, ValueError, "experts is 0"),
    ],
)
def test_wrong_arguments(ids, experts, error, message):
    with pytest.raises(error, match=message):
        permute_index(ids, experts)
    # The compiled operator can be called without the wrapper and says the same in its own words.
    with pytest.raises(RuntimeError, match=r"^permute_index: "):
        torch.ops.mmoe.permute_index(ids, experts)


@pytest.mark.parametrize("arguments", [{"align": 0}, {"max_rows": -1}])
def test_wrong_rows(arguments):
    ids = torch.zeros(2, 2, dtype=torch.int64)
    (name,) = arguments
    with pytest.raises(ValueError, match=f"{name} is"):
        permute_index(ids, 3, **arguments)
    with pytest.raises(RuntimeError, match=rf"^permute_index: {name} must"):
        torch.ops.mmoe.permute_index(ids, 3, **arguments)


def test_more_rows_than_int32_counts():
    with pytest.raises(RuntimeError, match="do not fit in int32"):
        permute_index(torch.zeros(2, 2, dtype=torch.int64), 2**20, align=2**20)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [(), (8,), (8, 200)])
def test_opcheck(device, rows):
    ids = torch.randint(6, (50, 3), device=device)
    results = torch.library.opcheck(torch.ops.mmoe.permute_index.default, (ids, 4, *rows))
    assert set(results.values()) == {"SUCCESS"}


def test_library_is_built():
    assert load_library()


def test_missing_library_is_announced_once_and_falls_back(root, tmp_path):
    script = """
import warnings, pathlib, torch, mmoe.ops
mmoe.ops.LIBRARY = pathlib.Path("no_such_folder/_C.so")
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from mmoe.ops.permute_index import permute_index
    for _ in range(2):
        print(permute_index(torch.tensor([[1, 0]]), 2).slot_of_row.tolist())
print([str(w.message) for w in caught])
"""
    run = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == [
        "[1, 0]",
        "[1, 0]",
        "['mmoe: operators run as PyTorch references: _C.so is not built']",
    ]


def assert_equal(result, expected):
    for name, got, wanted in zip(expected._fields, result, expected, strict=True):
        assert got.dtype == torch.int32, name
        assert torch.equal(got.cpu(), wanted), name
