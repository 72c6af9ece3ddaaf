"""The optimizer step: what decays, and what a step that must not be taken leaves behind."""

import dataclasses
import gc
import math
import weakref
from typing import Any, Literal

import pytest
import small
import torch

from mmoe.layers import providers
from mmoe.layers.roles import role_of
from mmoe.models.multimodal import build, build_stages
from mmoe.ops.grouped_linear import grouped_linear
from mmoe.parallel import engine
from mmoe.parallel import optimizer as adam
from mmoe.recipe.model import MTP, Model
from mmoe.recipe.schema import Optimizer, Parallel, Transfer
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


@pytest.mark.parametrize("measure", [False, True])
def test_a_step_leaves_no_graph_behind(measure: bool) -> None:
    run = stepper()
    assert run.step(iter([batch()]), 0.1, measure=measure).taken
    model = weakref.ref(run.models[0])
    del run
    gc.collect()
    assert model() is None


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


def test_transfer_divides_the_rate_of_all_but_embedding_and_norms() -> None:
    """Four times the proxy's width, the same first weights and batch: Adam's first step is the rate times the same."""

    def change(transfer: Transfer | None) -> dict[str, torch.Tensor]:
        small.config()
        settings = Optimizer(lr=0.1, weight_decay=0.0)
        run = Stepper(dataclasses.replace(small.RECIPE, optimizer=settings, transfer=transfer), [build(small.RECIPE)])
        parameters = dict(run.models[0].named_parameters())
        before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        assert run.step(iter([batch()]), 0.01).taken
        return {name: parameter.detach() - before[name] for name, parameter in parameters.items()}

    plain, transferred = change(None), change(Transfer(base_width=8))
    for name, moved in plain.items():
        factor = 1.0 if role_of(name) in ("embedding", "vector") else 0.25
        assert moved.abs().max() > 0.001, name
        torch.testing.assert_close(transferred[name], factor * moved, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize(("eps", "step"), [(1e-16, 0.1), (1e-8, 1e-5)])
def test_adam_keeps_up_with_gradients_far_above_its_epsilon_alone(eps: float, step: float) -> None:
    """Gradients of 1e-12, as deep in a large model: the first step is lr · g / (|g| + ε)."""
    small.config()
    settings = Optimizer(lr=0.1, eps=eps, weight_decay=0.0)
    run = Stepper(dataclasses.replace(small.RECIPE, optimizer=settings), [build(small.RECIPE)])
    weight = run.models[0].language.decoder.layers[0].attention[0].o_proj.weight
    before = weight.detach().clone()
    for parameter in run.models[0].parameters():
        parameter.main_grad.fill_(1e-12)
    assert adam.update(run.optimizer, 0.1)[0]
    torch.testing.assert_close(before - weight, torch.full_like(weight, step), rtol=1e-2, atol=1e-7)


@pytest.mark.parametrize("distributed", [False, True], ids=["", "distributed optimizer"])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_gradients_added_in_the_product_are_those_that_megatron_adds(
    monkeypatch: pytest.MonkeyPatch, recompute: Literal["none", "selective", "full"], distributed: bool
) -> None:
    """Three micro-batches, in one of which no token carries loss; frozen weights get nothing either way."""
    parallel = Parallel(recompute=recompute, distributed_optimizer=distributed)
    train = dataclasses.replace(small.RECIPE.train, global_batch=6)
    recipe = dataclasses.replace(small.RECIPE, parallel=parallel, train=train)
    batches = [
        batch(),
        batch(loss_mask=torch.zeros(2, 32)),
        batch(document=torch.tensor([[1], [2]]).expand(2, 32).int()),
    ]

    def gradients() -> tuple[dict[str, torch.Tensor], dict[str, bool]]:
        engine.start(parallel, 0)
        (model,) = build_stages(recipe)
        frozen: Any = model.language.decoder.layers[1].moe.experts.w1
        frozen.requires_grad_(False)
        run = Stepper(recipe, [model])
        assert run.step(iter(batches), 0.0).taken
        trained: dict[str, Any] = {name: p for name, p in model.named_parameters() if p.requires_grad}
        assert len(trained) == len(list(model.parameters())) - 1
        main = {name: p.main_grad.clone() for name, p in trained.items()}
        return main, {name: p.grad_added_to_main_grad for name, p in trained.items()}

    added, in_product = gradients()
    monkeypatch.setattr(providers, "local_grouped_linear", grouped_linear)
    handed_over, by_hook = gradients()
    assert {name for name, yes in in_product.items() if yes} == {name for name in added if ".experts." in name}
    assert not any(by_hook.values())
    for name, wanted in handed_over.items():
        torch.testing.assert_close(added[name], wanted, rtol=1e-5, atol=1e-6 * wanted.abs().max().item(), msg=name)
    assert all(wanted.any() for name, wanted in handed_over.items() if ".experts." in name)


@pytest.mark.parametrize("loss", ["balance", "hidden z", "ahead"])
@pytest.mark.parametrize("frozen", [True, False])
def test_auxiliary_losses_are_for_what_is_trained(loss: str, frozen: bool) -> None:
    """Each weighs on what lies before frozen layers only where these are trained."""

    def gradient(weight: float) -> torch.Tensor:
        backbone = dataclasses.replace(small.BACKBONE, hidden_z_coefficient=weight * (loss == "hidden z"))
        moe = dataclasses.replace(small.MIXTURE, balance_coefficient=weight * (loss == "balance"))
        mtp = MTP(loss_weight=weight) if loss == "ahead" else None
        names = ("language.decoder.layers", *(("language.mtp",) if loss == "ahead" else ()))
        recipe = dataclasses.replace(
            small.RECIPE,
            model=Model(backbone=backbone, moe=moe, mtp=mtp),
            train=dataclasses.replace(small.RECIPE.train, frozen=names if frozen else ()),
        )
        engine.start(Parallel(), 0)
        run = Stepper(recipe, build_stages(recipe))
        outcome = run.step(iter([batch()]), 0.0)
        assert outcome.taken
        # What is measured all the same, and what does not run.
        assert (outcome.balance_loss > 0) == (loss == "balance")
        assert (outcome.hidden_z_loss > 0) == (loss == "hidden z")
        assert math.isfinite(outcome.mtp_loss) == (loss == "ahead" and not frozen)
        embedding: Any = run.models[0].language.embedding.word_embeddings.weight
        return embedding.main_grad.clone()

    without, with_it = gradient(1e-9), gradient(0.5)
    assert without.any()
    assert torch.allclose(without, with_it, rtol=1e-4, atol=1e-7) == frozen
