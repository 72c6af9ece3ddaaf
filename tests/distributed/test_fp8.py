"""FP8 under parallelism: Megatron's collectives around quantised GEMMs; delayed scales that are the same everywhere."""

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
"""Relative, as in fp32: the same numbers are rounded by the same scales. (Steps later a sum in another order may round
to the neighbouring FP8 number, 2^-3 away, and the curves part.)"""

Result = tuple[list[float], dict[str, torch.Tensor]]


@pytest.mark.parametrize("sequence", [False, True], ids=["tp2", "tp2 sp"])
def test_a_parallel_linears_gemms_are_its_slices(ranks: pool.Pools, sequence: bool) -> None:
    for found in ranks(2).run("fp8_jobs", "linears", sequence=sequence):
        assert len(found) == 6
        for name, (ours, expected) in found.items():
            assert ours is not None, name
            assert torch.equal(ours, expected), name


@pytest.fixture(scope="module")
def single(ranks: pool.Pools) -> Result:
    return ranks(1).run("fp8_jobs", "train")[0]


@pytest.mark.parametrize("name", LAYOUTS)
def test_scales_are_those_of_one_process(ranks: pool.Pools, single: Result, name: str) -> None:
    losses, scales = single
    # Context-parallel ranks expand all keys and values themselves: their gradients are parts of a sum, rounded apart.
    parts = name == "cp2"
    columns = slice(2) if parts else slice(3)
    seen: set[str] = set()
    for got, theirs in ranks(1 if "recompute" in name else 2).run("fp8_jobs", "train", **LAYOUTS[name]):
        assert got == pytest.approx(losses, rel=1e-2 if parts else LOSS)
        assert got[0] == pytest.approx(losses[0], rel=LOSS)
        for key, scale in theirs.items():
            expected = scales[key][columns]
            torch.testing.assert_close(scale[columns], expected, rtol=SCALE, atol=0, msg=lambda m, k=key: f"{k}: {m}")
        seen |= theirs.keys()
    assert seen == scales.keys()


@pytest.mark.parametrize("name", ["ep2", "tp2"])
def test_scales_saved_by_one_process_are_gone_on_from(ranks: pool.Pools, tmp_path: Path, name: str) -> None:
    whole, _ = fp8_jobs.train(saved=str(tmp_path))
    _, expected = fp8_jobs.train(resumed=str(tmp_path))
    for losses, scales in ranks(2).run("fp8_jobs", "train", resumed=str(tmp_path), **LAYOUTS[name]):
        assert losses == pytest.approx(whole[1:], rel=LOSS)
        for key, scale in scales.items():
            torch.testing.assert_close(scale[1], expected[key][1], rtol=SCALE, atol=0)
