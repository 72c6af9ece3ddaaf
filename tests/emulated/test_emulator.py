"""The emulator itself: every kind of planted bug is caught and named, clean kernels are silent."""

import math
import subprocess

import pytest
from processes import run_python

from mmoe.ops.emulated import build

SCHEDULES = ["forward", "reverse", "random", "greedy"]
SCRIPT = """
import ctypes, sys
launch = getattr(ctypes.CDLL(sys.argv[1]), sys.argv[2])
launch.restype = ctypes.c_double
print(launch())
"""


@pytest.fixture
def planted(need_emulator):
    def run(variant: str, name: str, **environment: str) -> subprocess.CompletedProcess:
        return run_python(variant, SCRIPT, build(variant, "tests/emulated/planted.cu"), name, **environment)

    return run


# 3 blocks of 64 threads add 4 each and 3 arrivals; 0 + ... + 63, twice.
CLEAN = 3 * 64 * 4 + 3000 + 2 * 2016


@pytest.mark.parametrize("variant", ["plain", "asan", "tsan"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_clean_kernels_are_silent(planted, variant, schedule):
    run = planted(variant, "clean", MMOE_EMULATED_SCHEDULE=schedule, MMOE_EMULATED_SEED="3")
    assert (run.returncode, run.stderr) == (0, "")
    assert float(run.stdout) == CLEAN


def test_blocks_on_several_threads(planted):
    assert float(planted("plain", "clean", MMOE_EMULATED_THREADS="2").stdout) == CLEAN


@pytest.mark.parametrize(
    ("bug", "said"),
    [
        ("misaligned", "misaligned_kernel block (0,0,0) thread (0,0,0): misaligned load of 16 bytes"),
        ("divergent_barrier", "divergent_barrier_kernel block (0,0,0) thread (32,0,0): divergent barrier: __sync"),
        ("deadlock", "deadlock_kernel block (0,0,0): deadlock: 0 threads have exited, 6 at a barrier: __syncthreads"),
        ("divergent_collective", "thread (16,0,0): divergent collective: lane 16 calls __ballot_sync"),
        ("shuffle_from_exited", "thread (31,0,0): __shfl_sync reads lane 0, which has exited"),
        ("outside_mask", "thread (16,0,0): __syncwarp by lane 16, which is not in the mask 0000ffff"),
        ("too_much_shared", "50176 bytes of shared memory, but the launch may have 49152"),
        ("too_much_dynamic", "large_shared_kernel: 204800 bytes of dynamic shared memory, but 49152 are allowed"),
        ("empty_grid", "reverse_kernel<true>: no grid of (0,1,1) blocks"),
        ("large_block", "reverse_kernel<true>: no block of (1025,1,1) threads"),
    ],
)
def test_errors_name_kernel_and_thread(planted, bug, said):
    run = planted("plain", bug)
    assert run.returncode == 86
    (line,) = run.stderr.splitlines()
    assert line.startswith("mmoe emulator: planted::")
    assert said in line


def test_an_error_says_where(planted):
    line = planted("plain", "divergent_collective").stderr
    assert line.count("tests/emulated/planted.cu:") == 2


def test_dynamic_shared_memory_by_leave(planted):
    assert float(planted("plain", "allowed_dynamic").stdout) == 64


@pytest.mark.parametrize("name", ["static_overflow", "dynamic_overflow", "global_overflow"])
def test_out_of_bounds(planted, name):
    run = planted("asan", name)
    assert run.returncode != 0
    assert "ERROR: AddressSanitizer" in run.stderr
    # The first frame is the access itself.
    assert f"{name}_kernel" in run.stderr.split("#0 ", 1)[1].split("#1 ", 1)[0]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", ["missing_syncthreads", "missing_syncwarp", "write_after_syncwarp", "plain_add"])
def test_races(planted, name, schedule):
    """A race is seen in what orders the accesses, not in their result, so under every schedule."""
    run = planted("tsan", name, MMOE_EMULATED_SCHEDULE=schedule)
    assert run.returncode != 0
    assert "WARNING: ThreadSanitizer: data race" in run.stderr
    assert "_kernel" in run.stderr.split("#0 ", 1)[1].splitlines()[0]


def test_schedules_differ(planted):
    """Without its barrier a kernel reads what happens to be there, and what is not yet written is NaN."""
    seen = [planted("plain", "missing_syncthreads", MMOE_EMULATED_SCHEDULE=schedule).stdout for schedule in SCHEDULES]
    assert any(math.isnan(float(value)) for value in seen)


def test_shared_memory_begins_as_nan(planted):
    assert math.isnan(float(planted("plain", "unset_shared").stdout))


@pytest.mark.parametrize(
    ("name", "value"),
    [("SCHEDULE", "sideways"), ("SEED", "-1"), ("THREADS", "0"), ("THREADS", "two")],
)
def test_settings_are_checked(planted, name, value):
    run = planted("plain", "clean", **{f"MMOE_EMULATED_{name}": value})
    assert run.returncode == 86
    assert f"MMOE_EMULATED_{name}={value}: must be" in run.stderr
