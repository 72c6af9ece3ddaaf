"""Three steps at one layout, a checkpoint, two steps at another: the curve of five steps in one process, from the same
samples in the same order."""

import shutil
from pathlib import Path
from typing import Any

import pool
import pytest
import sets
import training

CURVE = 2e-6
"""Relative, in fp32 with Adam's ε at 1e-5."""
MICRO_BATCHES = 4
"""Of a step, over all ranks; each rank takes its part of them in one piece."""
SETTINGS = (
    "train.steps=5", "checkpoint.every=3", "train.micro_batch=1", "model.backbone.layers=4",
    "optimizer.lr=1e-3", "optimizer.min_lr=1e-4", "train.log_every=1",
)  # fmt: skip

LAYOUTS: dict[str, tuple[int, str]] = {
    "one process": (1, ""),
    "tp2 sp": (2, "tensor=2 sequence=true"),
    "pp2": (2, "pipeline=2"),
    "pp2 vpp2": (2, "pipeline=2 virtual_pipeline=2"),
    "cp2": (2, "context=2"),
    "dp2": (2, ""),
    "ep2": (2, "expert=2"),
    "dp4": (4, ""),
    "tp2 sp pp2": (4, "tensor=2 sequence=true pipeline=2"),
    "tp2 sp ep2 etp2": (4, "tensor=2 sequence=true expert=2 expert_tensor=2"),
    "pp2 cp2": (4, "pipeline=2 context=2"),
    "cp2 ep2": (4, "context=2 expert=2"),
    "ep4": (4, "expert=4"),
    "one process, distributed optimizer": (1, "distributed_optimizer=true"),
    "dp2 distributed optimizer": (2, "distributed_optimizer=true"),
    "dp4 ep2 distributed optimizer": (4, "expert=2 distributed_optimizer=true"),
}
PAIRS = [
    ("one process", "tp2 sp"),
    ("tp2 sp", "pp2 vpp2"),
    ("pp2", "cp2"),
    ("cp2", "ep2"),
    ("ep2", "one process"),
    ("dp2", "pp2"),
    ("dp2 distributed optimizer", "one process, distributed optimizer"),
]
"""What `make test` runs; every kind of parallelism is left once and entered once."""
MORE_PAIRS = [
    ("one process", "pp2 cp2"),
    ("dp4", "tp2 sp pp2"),
    ("tp2 sp pp2", "dp2"),
    ("tp2 sp ep2 etp2", "ep4"),
    ("ep4", "cp2 ep2"),
    ("cp2 ep2", "tp2 sp ep2 etp2"),
    ("pp2 cp2", "one process"),
    ("ep2", "dp4"),
    ("one process, distributed optimizer", "dp4 ep2 distributed optimizer"),
    ("dp4 ep2 distributed optimizer", "dp2 distributed optimizer"),
]
Rows = list[dict[str, Any]]


class Runs:
    """Runs of one recipe at many layouts; each layout's first five steps are done once."""

    def __init__(self, ranks: pool.Pools, root: Path) -> None:
        self.ranks, self.root = ranks, root
        sets.write_set(root, "varied", sets.varied(40))
        self.recipe = training.write_recipe(root, sets.write_mixture(root, varied=1.0))
        self.done: dict[str, list[list[list[str]]]] = {}

    def folder(self, name: str) -> Path:
        return self.root / name.replace(" ", "-")

    def train(self, layout: str, out: Path) -> list[list[list[str]]]:
        """The samples of each micro-batch, in the order of the data stream."""
        world, parallel = LAYOUTS[layout]
        settings = [*SETTINGS, *(f"parallel.{setting}" for setting in parallel.split())]
        results = self.ranks(world).run("whole_runs", "train", recipe=str(self.recipe), out=str(out), settings=settings)
        by_rank = dict(result for result in results if result is not None)
        here = MICRO_BATCHES // len(by_rank)
        steps = len(by_rank[0]) // here
        return [
            batch
            for step in range(steps)
            for rank in sorted(by_rank)
            for batch in by_rank[rank][step * here : (step + 1) * here]
        ]

    def whole(self, layout: str) -> tuple[Rows, list[list[list[str]]]]:
        """All five steps at one layout."""
        if layout not in self.done:
            self.done[layout] = self.train(layout, self.folder(layout))
        return training.curve(self.folder(layout)), self.done[layout]

    def over(self, first: str, then: str) -> tuple[Rows, list[list[list[str]]]]:
        """Three steps at ``first`` and two at ``then``; the samples are those of the two."""
        self.whole(first)
        out = self.folder(f"{first} to {then}")
        shutil.copytree(self.folder(first), out)
        shutil.rmtree(out / "checkpoints" / "step_00000005")
        (out / "checkpoints" / "latest").write_text("step_00000003\n")
        samples = self.train(then, out)
        return training.curve(out), samples


@pytest.fixture(scope="module")
def runs(ranks: pool.Pools, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(ranks, tmp_path_factory.mktemp("reshard"))


def difference(rows: Rows, expected: Rows) -> float:
    """The largest relative one of losses, gradient norms and the controller's bias."""
    names = ("loss", "grad_norm", "balance_loss", "bias_norm")
    pairs = [(a[name], b[name]) for a, b in zip(rows, expected, strict=True) for name in names]
    return max(abs(a - b) / abs(b) if b else abs(a) for a, b in pairs)


@pytest.mark.parametrize(
    ("first", "then"),
    [pytest.param(*pair, id=" to ".join(pair)) for pair in PAIRS]
    + [pytest.param(*pair, id=" to ".join(pair), marks=pytest.mark.slow) for pair in MORE_PAIRS],
)
def test_goes_on_at_another_layout(runs: Runs, first: str, then: str) -> None:
    expected, stream = runs.whole("one process")
    rows, samples = runs.over(first, then)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert difference(rows, expected) < CURVE
    assert [row["tokens"] for row in rows] == [row["tokens"] for row in expected]
    assert samples == stream[len(stream) * 3 // 5 :]
