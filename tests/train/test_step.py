"""The optimizer step: what decays, and what a step that must not be taken leaves behind."""

import dataclasses

import pytest
import small
import torch

from mmoe.models.multimodal import build
from mmoe.recipe.schema import Optimizer
from mmoe.train.step import Stepper

pytestmark = pytest.mark.latest


def stepper() -> Stepper:
    small.config()
    return Stepper(
        dataclasses.replace(small.RECIPE, optimizer=Optimizer(lr=0.1, weight_decay=0.5)), [build(small.RECIPE)]
    )


def batch(**fields: torch.Tensor) -> dict:
    tokens = torch.randint(4, 60, (2, 32), generator=torch.Generator().manual_seed(0))
    return {**small.batch(tokens, **fields), "samples": [["a"], ["b"]], "skipped": []}


def test_matrices_decay_and_norms_do_not() -> None:
    run = stepper()
    unused = run.models[0].language.embedding.word_embeddings.weight
    norm = run.models[0].language.decoder.layers[0].attention[0].q_a_layernorm.weight
    for group in run.optimizer.param_groups:
        decays = group["weight_decay"]
        for parameter in group["params"]:
            assert decays == (0.5 if parameter.ndim > 1 else 0.0)
    assert any(norm is p for group in run.optimizer.param_groups if not group["weight_decay"] for p in group["params"])
    before = unused[63].clone()
    run.step(iter([batch()]), 0.1)
    torch.testing.assert_close(unused[63], before * (1 - 0.1 * 0.5))


def test_a_step_without_loss_tokens_is_not_taken() -> None:
    run = stepper()
    before = {name: value.clone() for name, value in run.models[0].state_dict().items() if torch.is_tensor(value)}
    outcome = run.step(iter([batch(loss_mask=torch.zeros(2, 32))]), 0.1)
    assert not outcome.taken
    assert outcome.loss != outcome.loss
    assert all(torch.equal(value, run.models[0].state_dict()[name]) for name, value in before.items())
    assert run.step(iter([batch()]), 0.1).taken


def test_interruption_is_asked_after_the_micro_batches() -> None:
    run, asked = stepper(), []

    def data():
        asked.append("batch")
        yield batch()

    outcome = run.step(data(), 0.1, lambda: bool(asked))
    assert outcome.interrupted
