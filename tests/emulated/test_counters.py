"""The memory traffic that the emulator counts, on kernels where it is known: 3 blocks of a warp each."""

import ctypes

import pytest
import torch

from mmoe.ops.emulated import Counters, build, count, counters

BLOCKS, WARP, SECTOR = 3, 32, 32


@pytest.fixture(scope="module")
def counted(need_emulator) -> dict[str, Counters]:
    library = ctypes.CDLL(str(build("counted", "tests/emulated/traffic.cu")))
    library.run()
    found = counters(library)
    assert counters(library) == {}
    return {kernel.removeprefix("traffic::"): numbers for kernel, numbers in found.items()}


def loads(numbers: Counters) -> tuple[int, int, int]:
    return numbers.load_bytes, numbers.load_sectors, numbers.ideal_load_sectors


def stores(numbers: Counters) -> tuple[int, int, int]:
    return numbers.store_bytes, numbers.store_sectors, numbers.ideal_store_sectors


@pytest.mark.parametrize("kernel", ["vector_copy", "struct_copy"])
def test_vector_copy(counted, kernel):
    size = BLOCKS * WARP * 16
    assert loads(counted[kernel]) == stores(counted[kernel]) == (size, size // SECTOR, size // SECTOR)
    assert counted[kernel].sector_ratio == 1
    assert counted[kernel].bytes == 2 * size


def test_calls_of_an_inlined_function_are_apart(counted):
    """Each reads half of every sector; as one access they would look whole."""
    assert loads(counted["two_vectors"]) == (BLOCKS * WARP * 32, BLOCKS * 2 * WARP, BLOCKS * WARP)


def test_stride_of_two(counted):
    size = BLOCKS * WARP * 4
    assert loads(counted["stride_two"]) == (size, 2 * size // SECTOR, size // SECTOR)
    assert stores(counted["stride_two"]) == (size, size // SECTOR, size // SECTOR)


def test_a_row_off_the_sectors(counted):
    assert loads(counted["shifted"]) == (BLOCKS * 128, BLOCKS * 5, BLOCKS * 4)


def test_one_word_for_all_lanes(counted):
    assert loads(counted["one_word"]) == (BLOCKS * 4, BLOCKS, BLOCKS)
    assert stores(counted["one_word"]) == (BLOCKS * 12, BLOCKS, BLOCKS)


def test_lanes_that_leave_a_loop(counted):
    """The i-th round has the lanes from i on, whose words end at a sector's end."""
    sectors = sum(-(-(WARP - i) // 8) for i in range(WARP))
    assert loads(counted["ragged_loop"]) == (BLOCKS * 4 * 33 * 16, BLOCKS * sectors, BLOCKS * sectors)


@pytest.mark.parametrize(
    ("kernel", "accesses", "conflicts"),
    [
        ("shared_stride<1>", 2, 0),
        ("shared_stride<2>", 2, 2 * 1),
        ("shared_stride<32>", 2, 2 * 31),
        ("shared_broadcast", 2, 0),
        ("transpose<32>", 64, 32 * 31),
        ("transpose<33>", 64, 0),
        # A pass is half a warp for 8 bytes and a quarter for 16.
        ("shared_vectors<float2, 1>", 1, 0),
        ("shared_vectors<float2, 2>", 1, 2 * 1),
        ("shared_vectors<float4, 1>", 1, 0),
        ("shared_vectors<float4, 2>", 1, 4 * 1),
    ],
)
def test_bank_conflicts(counted, kernel, accesses, conflicts):
    assert counted[kernel].shared_accesses == BLOCKS * accesses
    assert counted[kernel].bank_conflicts == BLOCKS * conflicts
    if not kernel.startswith("transpose"):
        assert counted[kernel].bytes == 0


def test_atomics_and_barriers(counted):
    numbers = counted["atomics"]
    assert (numbers.launches, numbers.blocks, numbers.barriers, numbers.atomics) == (1, 3, 6, BLOCKS * 34)
    assert numbers.bytes == 0


def test_operator(need_emulator):
    """hidden_z_loss moves the bytes that its kernel's header promises."""
    tokens, width = 12, 512
    z = torch.randn(tokens, width).bfloat16()
    found = count(lambda operators: operators.hidden_z_loss(z, None, 0.5))
    kernel = found["hidden_z_loss::lse_kernel<__nv_bfloat16, true>"]
    assert (kernel.load_bytes, kernel.store_bytes) == (tokens * width * 2, tokens * 4)
    assert kernel.load_sectors == kernel.ideal_load_sectors
    assert set(found) == {"hidden_z_loss::lse_kernel<__nv_bfloat16, true>", "hidden_z_loss::mean_kernel"}
