"""Impossible layouts are refused before any rank starts, with what is possible."""

import dataclasses

import pytest

from mmoe.errors import UserError
from mmoe.parallel import layout
from mmoe.recipe import load_recipe
from mmoe.recipe.schema import Parallel, Recipe, Train


def recipe(parallel: Parallel, **train: int) -> Recipe:
    shape = {"steps": 1, "global_batch": 16, "micro_batch": 4, **train}
    return dataclasses.replace(load_recipe("quickstart"), parallel=parallel, train=Train(**shape))


@pytest.mark.parametrize(("expert", "ranks"), [(1, 1), (1, 2), (2, 2), (4, 4), (2, 4)])
def test_possible(expert: int, ranks: int) -> None:
    layout.check(recipe(Parallel(expert=expert)), ranks)


@pytest.mark.parametrize(
    ("parallel", "ranks", "message"),
    [
        (Parallel(expert=2), 1, "possible here: 1"),
        (Parallel(expert=3), 3, "possible here: 1$"),
        (Parallel(expert=4), 6, "possible here: 1, 2"),
        (Parallel(tensor=2), 3, "tensor × pipeline × context = 2 does not divide 3"),
        (Parallel(tensor=3), 3, "3 does not divide model.backbone.heads = 4 .*possible: 1, 2, 4"),
        (Parallel(pipeline=3), 3, "3 does not divide model.backbone.layers = 2"),
        (Parallel(virtual_pipeline=2), 1, "need more than one pipeline stage"),
        (Parallel(context=3), 3, "6 does not divide data.sequence_length = 256"),
        (Parallel(expert_tensor=2), 1, "pipeline × expert_tensor = 2 does not divide 1"),
        (Parallel(expert_tensor=64), 64, "2 columns of each expert on a rank are no multiple of 4"),
        (Parallel(expert_tensor=3), 3, "3 does not divide model.moe.expert_hidden_size = 128"),
        (Parallel(sequence=True), 1, "needs tensor parallelism"),
    ],
)
def test_impossible(parallel: Parallel, ranks: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        layout.check(recipe(parallel), ranks)


def test_interleaving_wants_whole_rounds_of_micro_batches() -> None:
    settings = recipe(Parallel(pipeline=2, virtual_pipeline=2), global_batch=12)
    backbone = dataclasses.replace(settings.model.backbone, layers=4)
    settings = dataclasses.replace(settings, model=dataclasses.replace(settings.model, backbone=backbone))
    with pytest.raises(UserError, match="3 micro-batches a step are no multiple of 2 pipeline stages"):
        layout.check(settings, 2)


def test_batches_that_do_not_divide_name_the_nearest() -> None:
    with pytest.raises(UserError, match="nearest that fit: 12, 24"):
        layout.check(recipe(Parallel(), global_batch=20, micro_batch=4), 3)
