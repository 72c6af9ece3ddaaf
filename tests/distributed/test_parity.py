"""`mmoe train` on one process and on two ranks at some layouts: the same model on the same stream of samples."""

import shutil
from pathlib import Path

import pytest
import sets
import training

pytestmark = pytest.mark.latest

LAYOUTS = {
    "dp2": (),
    "ep2": ("--set", "parallel.expert=2"),
    "tp2": ("--set", "parallel.tensor=2", "parallel.sequence=true", "parallel.expert=2"),
    "pp2": ("--set", "parallel.pipeline=2"),
}
TOLERANCE = 2e-6


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict]]:
    root = tmp_path_factory.mktemp("parity")
    sets.write_set(root, "varied", sets.varied(60))
    recipe = training.write_recipe(root, sets.write_mixture(root, varied=1.0))
    done = training.run(recipe, root / "single")
    assert done.returncode == 0, done.stderr
    return recipe, training.curve(root / "single")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_follows_the_single_process_curve(single: tuple[Path, list[dict]], layout: str) -> None:
    recipe, expected = single
    out = recipe.parent / layout
    done = training.run(recipe, out, *LAYOUTS[layout], ranks=2)
    assert done.returncode == 0, done.stderr
    rows = training.curve(out)
    assert [row["step"] for row in rows] == list(range(1, 11))
    for row, other in zip(rows, expected, strict=True):
        assert row["samples"] == other["samples"]
        assert row["tokens"] == other["tokens"]
        assert row["loss"] == pytest.approx(other["loss"], rel=TOLERANCE)
        assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=2e-5)
        assert row["active_experts_mean"] == pytest.approx(other["active_experts_mean"], rel=1e-3)


def test_two_expert_parallel_ranks_are_resumed_by_one(single: tuple[Path, list[dict]], tmp_path: Path) -> None:
    recipe, expected = single
    half = training.run(recipe, tmp_path, *LAYOUTS["ep2"], "--set", "checkpoint.every=5", ranks=2)
    assert half.returncode == 0, half.stderr
    shutil.rmtree(tmp_path / "checkpoints" / "step_00000010")
    done = training.run(recipe, tmp_path, "--resume")
    assert done.returncode == 0, done.stderr
    assert [row["samples"] for row in training.curve(tmp_path)] == [row["samples"] for row in expected]
    for row, other in zip(training.curve(tmp_path), expected, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=TOLERANCE)


def test_the_curve_falls(single: tuple[Path, list[dict]]) -> None:
    rows = single[1]
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]
