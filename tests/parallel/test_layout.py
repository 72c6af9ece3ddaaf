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
        (Parallel(tensor=2), 2, "tensor parallelism is not built yet"),
        (Parallel(sequence=True), 1, "needs tensor parallelism"),
    ],
)
def test_impossible(parallel: Parallel, ranks: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        layout.check(recipe(parallel), ranks)


def test_batches_that_do_not_divide_name_the_nearest() -> None:
    with pytest.raises(UserError, match="nearest that fit: 12, 24"):
        layout.check(recipe(Parallel(), global_batch=20, micro_batch=4), 3)
