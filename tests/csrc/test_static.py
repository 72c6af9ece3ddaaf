"""What can be said of the kernels' speed without a GPU: registers, spills, local memory, wide accesses, occupancy.

After a change of a kernel that is meant, `MMOE_WRITE_GOLDEN=1 python -m pytest tests/csrc/test_static.py` writes
tests/csrc/kernels.toml anew.
"""

import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from sass import SHARED, Kernel, kernels

GOLDEN = Path(__file__).with_name("kernels.toml")

# Kernels without 128-bit loads or stores, by the reason. An instance whose last template argument is false is the
# scalar path of another.
NO_WIDE_LOADS = {
    "hidden_z_loss::backward_kernel<float, true> on sm_100": "nvcc 13.0 makes two 64-bit loads of each there",
    "hidden_z_loss::mean_kernel": "reads a number a token",
    "permute::copy_kernel<unsigned": "the scalar paths",
    "permute_index::": "reads an id a slot; ranks need the lanes in order",
    "router::backward_kernel<1,": "the scalar path",
    "router::sum_kernel": "reads a number a block",
}
NO_WIDE_STORES = {
    "hidden_z_loss::lse_kernel": "writes a number a token",
    "hidden_z_loss::mean_kernel": "writes two numbers",
    "permute::copy_kernel<unsigned": "the scalar paths",
    "permute_index::": "rows and slots are scattered",
    "router::backward_kernel<1,": "the scalar path",
    "router::forward_kernel": "writes k ids and weights a token, a lane each",
    "router::sum_kernel": "writes a number a column",
}
# Dynamic shared memory at the largest shape of docs/targets.md, bytes.
DYNAMIC_SHARED = {
    "permute::fp8_kernel": 6144 // 128 * 4,
    "permute_index::count_kernel": (512 + 2) * 4,
    "permute_index::place_kernel": (512 + 2) * 4,
    "router::backward_kernel": 9 * 768 * 4,
    "router::forward_kernel<1,": 2 * 512 + 32 * (512 + 768),
    "router::forward_kernel<2,": 2 * 1024 + 32 * (1024 + 768),
    "router::forward_kernel<4,": 2 * 2048 + 32 * (2048 + 768),
    "router::forward_kernel<6,": 2 * 3072 + 32 * (3072 + 768),
    "router::forward_kernel<18,": 2 * 9216 + 8 * (9216 + 768),
    "unpermute::backward_kernel": 384 // 32 * (12 + 1) * 4,
}
# Kernels that hold less than half of a multiprocessor's warps, by the reason.
LOW_OCCUPANCY = {
    "router::forward_kernel<18,": "72 columns a lane; each of the 8 warps has a row of up to 9 KB in flight",
    "sva::absorbed_kernel": "a query's absorbed rows and sums stay in registers, up to 128 a thread; 16 warps",
    "sva::absorbed_backward_kernel": "the same with their gradients",
    "sva::projected_backward_kernel": "a key's row, its value's and their gradients in registers, up to 96; 20 warps",
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
    for (name, arch), kernel in compiled.items():
        if is_scalar_path(name):
            continue
        key = f"{name} on {arch}"
        assert kernel.count(r"LDG\..*128") > 0 or entry(NO_WIDE_LOADS, key), key
        assert kernel.count(r"STG\..*128") > 0 or entry(NO_WIDE_STORES, key), key


def test_occupancy(compiled):
    for (name, arch), kernel in compiled.items():
        occupancy = kernel.occupancy(arch, entry(DYNAMIC_SHARED, name) or 0)
        assert occupancy >= 0.5 or entry(LOW_OCCUPANCY, name), f"{name} on {arch}: {occupancy:.0%}"


def test_exceptions_are_of_kernels(compiled):
    for table in (NO_WIDE_LOADS, NO_WIDE_STORES, DYNAMIC_SHARED, LOW_OCCUPANCY):
        for key in table:
            assert any(f"{name} on {arch}".startswith(key) for name, arch in compiled), key


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
    lines = ["# Registers a thread and static shared bytes a block; tests/csrc/test_static.py writes and reads this."]
    lines.append(f'nvcc = "{compiler}"')
    for name in sorted({name for name, _ in compiled}):
        lines.append(f'\n["{name}"]')
        for arch in SHARED:
            kernel = compiled[name, arch]
            lines.append(f"{arch} = {{ registers = {kernel.registers}, shared = {kernel.shared} }}")
    return "\n".join(lines) + "\n"
