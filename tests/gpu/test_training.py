"""The training step on a device: weights, batches and reductions are where they belong, and it learns, twice alike."""

import dataclasses

import pytest
import small
import torch

from mmoe.models.multimodal import build
from mmoe.parallel import engine
from mmoe.recipe.schema import Parallel, Precision
from mmoe.train.step import Stepper

pytestmark = pytest.mark.gpu


def curve() -> list[float]:
    recipe = dataclasses.replace(small.RECIPE, precision=Precision(dtype="bf16"))
    engine.start(Parallel(), seed=0)
    torch.use_deterministic_algorithms(True)
    run = Stepper(recipe, [build(recipe)])
    assert all(parameter.is_cuda for parameter in run.models[0].parameters())
    tokens = torch.randint(4, 60, (2, 32), generator=torch.Generator().manual_seed(0))
    batch = {**small.batch(tokens), "samples": [["a"], ["b"]], "skipped": []}
    return [run.step(iter([batch]), 1e-2).loss for _ in range(8)]


def test_it_learns_and_repeats_bitwise() -> None:
    first = curve()
    assert first[-1] < 0.9 * first[0]
    assert curve() == first
