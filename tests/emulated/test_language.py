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
    out = (ctypes.c_int * (16 * 32))()
    library.collectives((ctypes.c_int * 32)(*value), out)
    halves = [value[:16], value[16:]]
    wanted = [
        [value[(lane + 1) % 32] for lane in LANES],
        [value[lane // 8 * 8 + 5] for lane in LANES],
        [value[lane ^ 3] for lane in LANES],
        # Of a group of lanes only an earlier one can be read.
        [value[lane ^ 16] if lane >= 16 else value[lane] for lane in LANES],
        [value[lane - 2] if lane >= 2 else value[lane] for lane in LANES],
        [value[lane + 3] if lane % 8 < 5 else value[lane] for lane in LANES],
        [signed(sum(1 << i for i in LANES if value[i] % 2))] * 32,
        [signed(sum(1 << i for i in LANES if value[i] % 3 == value[lane] % 3)) for lane in LANES],
        [sum(value)] * 32,
        [max(halves[lane // 16]) for lane in LANES],
        [min(halves[lane // 16]) for lane in LANES],
        [value[lane] + (value[lane ^ 1] if lane < 16 else 0) for lane in LANES],
        [(40 in value) + 2] * 32,
        *[[value[lane ^ 1] for lane in LANES]] * 3,
    ]
    for row, expected in enumerate(wanted):
        assert out[row * 32 : row * 32 + 32] == expected, row


def signed(bits: int) -> int:
    return bits - (1 << 32) if bits >> 31 else bits


def test_votes_of_a_block(library):
    out = (ctypes.c_int * 64)()
    library.votes(out)
    assert list(out) == [0 if i % 2 else 5 + 1000 for i in range(64)]


def test_intrinsics(library):
    library.largest.restype = ctypes.c_float
    library.reversed.restype = ctypes.c_uint
    for a, b, larger in [(1, 2, 2), (math.nan, 2, 2), (2, math.nan, 2)]:
        assert library.largest(ctypes.c_float(a), ctypes.c_float(b)) == larger
    top = 2**31 - 1
    for value, wanted in [(2.5, 2), (-3.5, -4), (1e20, top), (-1e20, -top - 1), (math.nan, 0)]:
        assert library.to_int(ctypes.c_float(value)) == wanted
    assert library.reversed(0b1011) == 0b1101 << 28
