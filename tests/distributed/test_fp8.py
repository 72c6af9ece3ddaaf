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
LOSS = SCALE = 2e-6
"""Relative, as in fp32: the same numbers are rounded by the same scales."""
SUMS_APART = tuple(name for name, layout in LAYOUTS.items() if "tensor" in layout)
"""Layouts that sum in another order than one process. That may round a number to the neighbouring FP8 one; which
batches have such a near tie hangs on the CPU. The others agree on the first batch."""
BATCHES = 16
"""To find one without a near tie."""
TIE_LOSS, TIE_SCALE = 1e-2, 2**-3
"""Relative, on a batch with a near tie: a largest value is an FP8 number further at most (2^-3), and the losses found
on two CPUs were 7e-4 off at worst."""

Result = tuple[list[float], dict[str, torch.Tensor]]


@pytest.mark.parametrize("sequence", [False, True], ids=["tp2", "tp2 sp"])
def test_a_parallel_linears_gemms_are_its_slices(ranks: pool.Pools, sequence: bool) -> None:
    for found in ranks(2).run("fp8_jobs", "linears", sequence=sequence):
        assert len(found) == 6
        for name, (ours, expected) in found.items():
            assert ours is not None, name
            assert torch.equal(ours, expected), name


@pytest.fixture(scope="module")
def single(ranks: pool.Pools) -> Callable[[int], Result]:
    """One process on the batch of that number and the next."""
    return cache(lambda begin: ranks(1).run("fp8_jobs", "train", begin=begin)[0])


def agrees(name: str, check: Callable[[int, float, float], None]) -> None:
    """``check(batch, bound of losses, bound of scales)`` on the first batch; where sums are apart on the first one
    without a near tie, and those before it within what a tie does.

    Raises:
        AssertionError: a batch is further off than by a tie, or all have one.
    """
    for batch in range(BATCHES if name in SUMS_APART else 1):
        try:
            return check(batch, LOSS, SCALE)
        except AssertionError:
            if name not in SUMS_APART:
                raise
        check(batch, TIE_LOSS, TIE_SCALE)
    pytest.fail(f"{name} is another model than one process on each of {BATCHES} batches")


@pytest.mark.parametrize("name", LAYOUTS)
def test_scales_are_those_of_one_process(ranks: pool.Pools, single: Callable[[int], Result], name: str) -> None:
    # Context-parallel ranks expand all keys and values themselves: their gradients are parts of a sum, rounded apart.
    parts = name == "cp2"
    columns = slice(2) if parts else slice(3)

    @cache
    def results(batch: int) -> list[Result]:
        return ranks(1 if "recompute" in name else 2).run("fp8_jobs", "train", begin=batch, **LAYOUTS[name])

    def check(batch: int, loss: float, scale: float) -> None:
        losses, scales = single(batch)
        seen: set[str] = set()
        for got, theirs in results(batch):
            assert got == pytest.approx(losses, rel=1e-2 if parts else loss)
            assert got[0] == pytest.approx(losses[0], rel=loss)
            for key, found in theirs.items():
                expected, message = scales[key][columns], lambda m, k=key: f"{k}: {m}"
                torch.testing.assert_close(found[columns], expected, rtol=scale, atol=0, msg=message)
            seen |= theirs.keys()
        assert seen == scales.keys()

    agrees(name, check)


@pytest.mark.parametrize("name", ["ep2", "tp2"])
def test_scales_saved_by_one_process_are_gone_on_from(ranks: pool.Pools, tmp_path: Path, name: str) -> None:
    @cache
    def runs(batch: int) -> tuple[Result, Result, list[Result]]:
        folder = tmp_path / str(batch)
        folder.mkdir()
        whole = fp8_jobs.train(batch, saved=str(folder))
        alone = fp8_jobs.train(batch, resumed=str(folder))
        return whole, alone, ranks(2).run("fp8_jobs", "train", begin=batch, resumed=str(folder), **LAYOUTS[name])

    def check(batch: int, loss: float, scale: float) -> None:
        (losses, _), (_, expected), resumed = runs(batch)
        for got, theirs in resumed:
            assert got == pytest.approx(losses[1:], rel=loss)
            for key, found in theirs.items():
                torch.testing.assert_close(found[1], expected[key][1], rtol=scale, atol=0)

    agrees(name, check)
