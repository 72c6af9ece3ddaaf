"""The emulator's collectives and intrinsics against what CUDA's manual says of them."""

import ctypes
import math

import pytest

from mmoe.ops.emulated import build

LANES = range(32)


@pytest.fixture(scope="module")
def library(need_emulator) -> ctypes.CDLL:
    return ctypes.CDLL(str(build("plain", "tests/emulated/language.cu")))


@pytest.mark.parametrize("schedule", ["forward", "reverse", "random", "greedy"])
def test_collectives(library, monkeypatch, schedule):
    monkeypatch.setenv("MMOE_EMULATED_SCHEDULE", schedule)
    value = [7 * lane % 41 for lane in LANES]
    out = (ctypes.c_int * (13 * 32))()
    library.collectives((ctypes.c_int * 32)(*value), out)
    wanted = [
        [value[(lane + 1) % 32] for lane in LANES],
        [value[lane // 8 * 8 + 5] for lane in LANES],
        [value[lane ^ 3] for lane in LANES],
        # Of a group of lanes only an earlier one can be read.
        [value[lane ^ 16] if lane >= 16 else value[lane] for lane in LANES],
        [value[lane - 2] if lane >= 2 else value[lane] for lane in LANES],
        [value[lane - 3] if lane % 8 >= 3 else value[lane] for lane in LANES],
        [signed(sum(1 << i for i in LANES if value[i] % 2))] * 32,
        [signed(sum(1 << i for i in LANES if value[i] % 3 == value[lane] % 3)) for lane in LANES],
        [signed(sum(1 << i for i in LANES if value[i] % 2 and i // 16 == lane // 16)) for lane in LANES],
        [value[lane] + (value[lane ^ 1] if lane < 16 else 0) for lane in LANES],
        *[[value[lane ^ 1] for lane in LANES]] * 3,
    ]
    for row, expected in enumerate(wanted):
        assert out[row * 32 : row * 32 + 32] == expected, row


def signed(bits: int) -> int:
    return bits - (1 << 32) if bits >> 31 else bits


def test_threads_that_are_left(library):
    out = (ctypes.c_uint * 64)()
    library.left(out)
    low = sum(1 << i for i in range(0, 10, 2))
    assert list(out) == [low if i >= 32 and i % 2 == 0 else 0 for i in range(64)]


def test_intrinsics(library):
    library.largest.restype = ctypes.c_float
    library.divided.restype = ctypes.c_float
    for a, b, larger in [(1, 2, 2), (math.nan, 2, 2), (2, math.nan, 2)]:
        assert library.largest(ctypes.c_float(a), ctypes.c_float(b)) == larger
    # Divisors of more than 2^126 that are not infinite give 0.
    beyond = 2.0**126 * (1 + 2.0**-23)
    for a, b, quotient in [
        (3, 2, 1.5),
        (1, 2.0**126, 2.0**-126),
        (2.0**100, beyond, 0),
        (2, -beyond, 0),
        (1, math.inf, 0),
    ]:
        assert library.divided(ctypes.c_float(a), ctypes.c_float(b)) == quotient
    assert math.isnan(library.divided(ctypes.c_float(math.inf), ctypes.c_float(beyond)))
