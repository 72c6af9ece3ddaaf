"""FP8 under parallelism: Megatron's collectives around quantised GEMMs; delayed scales that are the same everywhere."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import fp8_jobs
import pool
import pytest
import torch

LAYOUTS: dict[str, dict[str, Any]] = {
    "dp2": {},
    "tp2": {"tensor": 2},
    "tp2 sp etp2": {"tensor": 2, "sequence": True, "expert_tensor": 2},
    "ep2": {"expert": 2},
    "cp2": {"context": 2},
    "full recompute": {"recompute": "full"},
}
WIDE = tuple(name for name, layout in LAYOUTS.items() if "tensor" in layout)
"""Layouts that sum in another order than one process, which may round a number to the neighbouring FP8 one, 2^-3 away:
one fp32 batch in two has such a near tie, which ones depends on the CPU. They are asked in fp64, but for FP8."""
LOSS = SCALE = 2e-6
"""Relative, as in fp32: the same numbers are rounded by the same scales."""
LOSS_WIDE = SCALE_WIDE = 1e-12

Result = tuple[list[float], dict[str, torch.Tensor]]


@pytest.mark.parametrize("sequence", [False, True], ids=["tp2", "tp2 sp"])
def test_a_parallel_linears_gemms_are_its_slices(ranks: pool.Pools, sequence: bool) -> None:
    for found in ranks(2).run("fp8_jobs", "linears", sequence=sequence):
        assert len(found) == 6
        for name, (ours, expected) in found.items():
            assert ours is not None, name
            assert torch.equal(ours, expected), name


@pytest.fixture(scope="module")
def single(ranks: pool.Pools) -> Callable[[bool], Result]:
    """One process, in fp32 or wide."""
    return cache(lambda wide: ranks(1).run("fp8_jobs", "train", wide=wide)[0])


@pytest.mark.parametrize("name", LAYOUTS)
def test_scales_are_those_of_one_process(ranks: pool.Pools, single: Callable[[bool], Result], name: str) -> None:
    wide = name in WIDE
    loss, scale = (LOSS_WIDE, SCALE_WIDE) if wide else (LOSS, SCALE)
    losses, scales = single(wide)
    # Context-parallel ranks expand all keys and values themselves: their gradients are parts of a sum, rounded apart.
    parts = name == "cp2"
    columns = slice(2) if parts else slice(3)
    world = 1 if "recompute" in name else 2
    seen: set[str] = set()
    for got, theirs in ranks(world).run("fp8_jobs", "train", wide=wide, **LAYOUTS[name]):
        assert got == pytest.approx(losses, rel=1e-2 if parts else loss, abs=0)
        assert got[0] == pytest.approx(losses[0], rel=loss, abs=0)
        for key, found in theirs.items():
            expected, message = scales[key][columns], lambda m, k=key: f"{k}: {m}"
            torch.testing.assert_close(found[columns], expected, rtol=scale, atol=0, msg=message)
        seen |= theirs.keys()
    assert seen == scales.keys()


@pytest.mark.parametrize("name", ["ep2", "tp2"])
def test_scales_saved_by_one_process_are_gone_on_from(ranks: pool.Pools, tmp_path: Path, name: str) -> None:
    wide, folder = name in WIDE, str(tmp_path)
    loss, scale = (LOSS_WIDE, SCALE_WIDE) if wide else (LOSS, SCALE)
    losses, _ = fp8_jobs.train(saved=folder, wide=wide)
    _, expected = fp8_jobs.train(resumed=folder, wide=wide)
    seen: set[str] = set()
    for got, theirs in ranks(2).run("fp8_jobs", "train", resumed=folder, wide=wide, **LAYOUTS[name]):
        assert got == pytest.approx(losses[1:], rel=loss, abs=0)
        seen |= theirs.keys()
        for key, found in theirs.items():
            torch.testing.assert_close(found[1], expected[key][1], rtol=scale, atol=0)
    assert seen == expected.keys()
