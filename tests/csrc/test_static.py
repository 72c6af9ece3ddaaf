"""What can be said of the kernels' speed without a GPU: registers, spills, local memory, wide accesses, occupancy.

After a change of a kernel that is meant, `MMOE_WRITE_GOLDEN=1 python -m pytest tests/csrc/test_static.py` writes
tests/csrc/kernels.toml anew.
"""

import os
import re
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from sass import SHARED, Kernel, kernels

from mmoe import _host

GOLDEN = Path(__file__).with_name("kernels.toml")

# Kernels of whose loads or stores of global memory 128-bit ones do not make up more than half by bytes, an access each,
# by the reason. An instance whose last template argument is false is the scalar path of another.
NARROW_LOADS = {
    "hidden_z_loss::mean_kernel": "its last vector, where the tokens end, is read a number at a time",
    "permute::copy_kernel<unsigned": "the scalar paths",
    "permute_index::": "reads an id a slot; ranks need the lanes in order",
    "router::backward_kernel<1,": "the scalar path",
    "router::backward_kernel<4,": "two vectors at a time, and a token's ten numbers: statistics, ids, gradients",
    "router::forward_kernel<1,": "a vector a lane is the row, beside the bias and a flag",
    "router::sum_kernel": "reads a number a block",
}
NARROW_STORES = {
    "hidden_z_loss::lse_kernel": "writes a number a token",
    "hidden_z_loss::mean_kernel": "writes two numbers",
    "permute::copy_kernel<unsigned": "the scalar paths",
    "permute::fp8_kernel": "16 bytes that were read are 8 or 4, and a scale a block of 128",
    "permute_index::": "rows and slots are scattered",
    "router::backward_kernel<1,": "the scalar path",
    "router::forward_kernel": "writes k ids and weights a token, a lane each",
    "router::sum_kernel": "writes a number a column",
}


# Dynamic shared memory at the largest shape of docs/targets.md, bytes, by the kernel's name and what a block can have.
def fixed(size: int) -> Callable[[str, int], int]:
    return lambda name, most: size


def router_forward(name: str, most: int) -> int:
    vectors = int(re.search(r"<(\d+),", name)[1])
    launch = _host.router_forward_launch(8192, 128 * vectors, not is_scalar_path(name), 132, most)
    assert launch["vectors"] == vectors
    return launch["shared_bytes"]


def sva_projected(name: str, most: int) -> int:
    element_bytes, width = 4 if "<float" in name else 2, int(re.search(r", (\d+),", name)[1])
    return _host.sva_projected_launch(16, width, element_bytes, not is_scalar_path(name), 19)["shared_bytes"]


def sva_absorbed(name: str, most: int) -> int:
    element_bytes, backward = 4 if "<float" in name else 2, "backward" in name
    half = (most + 1024) // 2 - 1024
    aligned = not is_scalar_path(name)
    layout = _host.sva_absorbed_layout([(4, 1024, True)], 16, element_bytes, aligned, backward, most, half)
    assert layout["staged"] == aligned
    return layout["bytes"]


DYNAMIC_SHARED = {
    "permute::fp8_kernel": fixed(6144 // 128 * 4),
    "permute_index::count_kernel": fixed((512 + 2 + 6) * 4),
    "permute_index::place_kernel": fixed((512 + 2 + 6) * 4),
    "router::backward_kernel": fixed(_host.router_backward_launch(8192, 768, 132)["shared_bytes"]),
    "router::forward_kernel": router_forward,
    "sva::absorbed": sva_absorbed,
    "sva::projected_backward_kernel": sva_projected,
    "unpermute::backward_kernel": fixed(384 // 32 * (12 + 1) * 4),
}
# Kernels that hold less than half of a multiprocessor's warps: what they hold at least, and the reason.
LOW_OCCUPANCY = {
    "router::forward_kernel<18,": (0.125, "72 columns a lane; each of 8 warps has a row of up to 9 KB in flight"),
    "sva::absorbed_kernel": (0.25, "absorbed rows and sums stay in registers, up to 128 a thread"),
    "sva::absorbed_backward_kernel<float, true> on sm_90a": (0.125, "x̂, absorbed and grad_pooled are 196 KB a query"),
    "sva::absorbed_backward_kernel<float, true> on sm_100": (0.125, "as on sm_90a"),
    "sva::absorbed_backward_kernel<__half, true> on sm_80": (0.125, "they are 100 KB, and a multiprocessor has 164"),
    "sva::absorbed_backward_kernel<__nv_bfloat16, true> on sm_80": (0.125, "as in float16"),
    "sva::absorbed_backward_kernel": (0.25, "as the forward, with the gradients"),
    "sva::projected_backward_kernel": (0.3125, "a key's row, its value's and their gradients, up to 96 registers"),
}

Kernels = dict[tuple[str, str], Kernel]


@pytest.fixture(scope="module")
def compiled(cuda_build) -> Kernels:
    found = kernels(cuda_build)
    assert {arch for _, arch in found} == set(SHARED)
    return found


def entry(table: dict, name: str):
    """The value of the first key that the kernel's name starts with."""
    return next((value for key, value in table.items() if name.startswith(key)), None)


def is_scalar_path(name: str) -> bool:
    return name.endswith("false>")


def test_no_spills_and_no_local_memory(compiled):
    """A spilled register is a local access, of a stack frame."""
    for key, kernel in compiled.items():
        assert (kernel.stack, kernel.local, kernel.count("LDL|STL")) == (0, 0, 0), key


def test_wide_accesses(compiled):
    """A main loop that an unlucky spelling splits into narrow accesses stands out beside any single wide one."""
    for (name, arch), kernel in compiled.items():
        if is_scalar_path(name):
            continue
        for kind, exceptions in (("LD", NARROW_LOADS), ("ST", NARROW_STORES)):
            bits = {width: width * number for width, number in kernel.accesses(kind).items()}
            wide = 2 * bits.get(128, 0) > sum(bits.values())
            assert wide or entry(exceptions, name), f"{name} on {arch}: {kind} {bits}"


def dynamic_shared(name: str, arch: str) -> int:
    bytes_of = entry(DYNAMIC_SHARED, name) or fixed(0)
    return bytes_of(name, SHARED[arch] - 1024)


def test_occupancy(compiled):
    for (name, arch), kernel in compiled.items():
        key = f"{name} on {arch}"
        occupancy = kernel.occupancy(arch, dynamic_shared(name, arch))
        least, _ = entry(LOW_OCCUPANCY, key) or (0.5, "")
        assert occupancy >= least, f"{key}: {occupancy:.1%}"


def test_absorbed_blocks(compiled):
    """sva_heuristics.h counts on the blocks that the registers hold."""
    for (name, arch), kernel in compiled.items():
        if name.startswith("sva::absorbed"):
            assert kernel.blocks(arch, 0) == _host.sva_absorbed_blocks(100, 1, SHARED[arch], 0), (name, arch)


def test_exceptions_are_of_kernels(compiled):
    keys = [f"{name} on {arch}" for name, arch in compiled]
    for table in (NARROW_LOADS, NARROW_STORES, DYNAMIC_SHARED, LOW_OCCUPANCY):
        for key in table:
            assert any(name.startswith(key) for name in keys), key


def test_golden(compiled):
    said = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    compiler = re.search(r"V(\d[\d.]+)", said)[1]
    text = written(compiled, compiler)
    if "MMOE_WRITE_GOLDEN" in os.environ:
        GOLDEN.write_text(text)
    golden = tomllib.loads(GOLDEN.read_text())
    if golden["nvcc"] != compiler:
        pytest.skip(f"{GOLDEN.name} is of nvcc {golden['nvcc']}, this is {compiler}")
    now = tomllib.loads(text)
    assert now.keys() == golden.keys(), "kernels came or went: see the top of this file"
    for name, numbers in now.items():
        assert numbers == golden[name], f"{name}: see the top of this file where this is meant"


def written(compiled: Kernels, compiler: str) -> str:
    lines = [
        "# Registers a thread, static shared bytes a block, and how many loads and stores of global memory of how many",
        "# bits stand in the kernel; tests/csrc/test_static.py writes and reads this.",
    ]
    lines.append(f'nvcc = "{compiler}"')
    for name in sorted({name for name, _ in compiled}):
        lines.append(f'\n["{name}"]')
        for arch in SHARED:
            kernel = compiled[name, arch]
            loads, stores = (
                " ".join(f"{number}x{bits}" for bits, number in kernel.accesses(kind).items()) for kind in ("LD", "ST")
            )
            lines.append(
                f"{arch} = {{ registers = {kernel.registers}, shared = {kernel.shared},"
                f' loads = "{loads}", stores = "{stores}" }}'
            )
    return "\n".join(lines) + "\n"
