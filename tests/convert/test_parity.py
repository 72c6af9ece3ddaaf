"""Against transformers' LongcatFlashForCausalLM: random checkpoints of odd shapes, imported as a directory."""

import copy
import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from small import batch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LongcatFlashConfig, LongcatFlashForCausalLM

from mmoe.checkpoint.load import fill, weights
from mmoe.convert import to_hf
from mmoe.convert.families import longcat
from mmoe.convert.ingest import read_hf
from mmoe.models.multimodal import MultimodalModel, build
from mmoe.parallel import engine
from mmoe.recipe.model import Model
from mmoe.recipe.schema import Optimizer, Parallel
from mmoe.train.step import Stepper

# hidden, heads, q rank, kv rank, nope, rope, v, dense FFN, vocabulary, layers, N, Z, k, expert width, scaling
SHAPES = {
    "one head, more zero experts than others": (64, 1, 24, 16, 12, 4, 20, 40, 97, 3, 3, 7, 5, 12, 6.0),
    "odd ranks and widths": (36, 3, 21, 11, 9, 6, 13, 50, 131, 2, 5, 3, 4, 20, 1.7),
    "every expert in every token": (20, 5, 12, 28, 3, 2, 5, 18, 64, 1, 4, 2, 6, 8, 2.5),
    "no zero experts": (48, 4, 16, 8, 8, 8, 8, 36, 80, 2, 6, 0, 2, 16, 1.0),
}


class Pair(NamedTuple):
    theirs: LongcatFlashForCausalLM
    ours: MultimodalModel
    model: Model
    folder: Path
    """As transformers saved it."""


def random_model(shape: tuple[Any, ...]) -> LongcatFlashForCausalLM:
    """Weights of a size that makes attention and routing decide; norms and selection bias off their first values."""
    hidden, heads, q, kv, nope, rope, v, ffn, vocabulary, layers, experts, zero, top_k, width, scaling = shape
    config = LongcatFlashConfig(
        vocab_size=vocabulary, hidden_size=hidden, num_layers=layers, num_attention_heads=heads, q_lora_rank=q,
        kv_lora_rank=kv, qk_nope_head_dim=nope, qk_rope_head_dim=rope, head_dim=rope, v_head_dim=v, ffn_hidden_size=ffn,
        expert_ffn_hidden_size=width, n_routed_experts=experts, zero_expert_num=zero, moe_topk=top_k,
        routed_scaling_factor=scaling, max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )  # fmt: skip
    model = LongcatFlashForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(hidden)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            noise = torch.randn(tensor.shape, generator=generator)
            if tensor.ndim == 1:
                tensor.add_((0.02 if "correction_bias" in name else 0.2) * noise)
            else:
                tensor.copy_(noise / tensor.shape[-1] ** 0.5)
    return model


@pytest.fixture(scope="module", params=SHAPES.values(), ids=SHAPES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("parity")
    theirs = random_model(request.param)
    theirs.save_pretrained(folder)
    imported = read_hf(folder)
    engine.start(Parallel(), seed=0, alone=True)
    ours = build(imported.recipe).eval()
    fill(ours, imported.state)
    return Pair(theirs, ours, imported.recipe.model, folder)


def tokens(pair: Pair) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(pair.model.backbone.vocab_size, (3, 33), generator=generator)


def their_loss(model: LongcatFlashForCausalLM, ids: Tensor) -> Tensor:
    return cross_entropy(model(ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten())


def gradients(model: torch.nn.Module, loss: Tensor) -> dict[str, Tensor]:
    names = dict(model.named_parameters())
    return dict(zip(names, torch.autograd.grad(loss, list(names.values())), strict=True))


def as_theirs(pair: Pair, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return longcat.table(pair.model.backbone, pair.model.moe, fused=True).write(tensors)


def as_ours(pair: Pair, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return longcat.table(pair.model.backbone, pair.model.moe, fused=True).read(tensors, "transformers' model")


@torch.no_grad()
def test_logits(pair: Pair) -> None:
    ids = tokens(pair)
    wanted = pair.theirs(ids).logits
    assert wanted.std() > 0.5
    torch.testing.assert_close(pair.ours.logits(batch(ids)), wanted, rtol=0, atol=1e-4)


def test_gradients(pair: Pair) -> None:
    """Every parameter's, through the table: relative to transformers in fp64, ours in fp32 are off by at most twice
    what theirs in fp32 are off by at worst, and that is no more than 1e-5."""
    ids = tokens(pair)
    exact = copy.deepcopy(pair.theirs).double()
    theirs = gradients(pair.theirs, their_loss(pair.theirs, ids))
    truth = gradients(exact, their_loss(exact, ids))
    gradient = gradients(pair.ours, pair.ours(batch(ids[:, :-1], labels=ids[:, 1:])).mean())
    ours = as_theirs(pair, weights(pair.ours) | gradient)

    def error(found: dict[str, Tensor], name: str) -> float:
        return float((found[name].double() - truth[name]).norm() / truth[name].norm())

    worst = max(error(theirs, name) for name in truth)
    assert worst < 1e-5
    for name in truth:
        assert error(ours, name) < 2 * worst, f"{name}: {error(ours, name):.1e}, transformers' worst {worst:.1e}"


def test_export_gives_every_tensor_back(pair: Pair, tmp_path: Path) -> None:
    """Bit for bit, but for the projections that transformers allocates for zero experts: nothing reads them, so they
    are zeros."""
    imported = read_hf(pair.folder)
    (tmp_path / "tokenizer.json").write_text("{}")
    to_hf(tmp_path, tmp_path / "hf", load=lambda _: (imported.recipe, imported.state, tmp_path / "tokenizer.json"))
    saved, ours = load_file(pair.folder / "model.safetensors"), load_file(tmp_path / "hf/model.safetensors")
    moe = pair.model.moe
    unread = {
        f"model.layers.{layer}.mlp.experts.{expert}.{half}_proj.weight"
        for layer in range(pair.model.backbone.layers)
        for expert in range(moe.experts, moe.experts + moe.zero_experts)
        for half in ("gate", "up")
    }
    assert ours.keys() == saved.keys()
    for name, tensor in saved.items():
        assert torch.equal(ours[name], torch.zeros_like(tensor) if name in unread else tensor), name


def test_ten_steps_of_adamw(pair: Pair) -> None:
    """Our optimizer step against torch's AdamW on transformers' model, same settings: the losses, and how
    far every weight went.

    ε = 1e-5 as in the comparisons of layouts: below it Adam takes the sign of rounding for a step.
    """
    settings = Optimizer(lr=1e-3, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.1, clip_grad=1.0)
    imported = read_hf(pair.folder)
    recipe = dataclasses.replace(imported.recipe, optimizer=settings)
    engine.start(Parallel(), seed=0, alone=True)
    ours = Stepper(recipe, [build(recipe)])
    fill(ours.models[0], imported.state)
    theirs = copy.deepcopy(pair.theirs)
    matrices = [parameter for parameter in theirs.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in theirs.parameters() if parameter.ndim == 1]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, settings.lr, settings.betas, settings.eps, settings.weight_decay)
    generator = torch.Generator().manual_seed(2)
    for _ in range(10):
        ids = torch.randint(pair.model.backbone.vocab_size, (1, 33), generator=generator)
        wanted = their_loss(theirs, ids)
        adam.zero_grad()
        wanted.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), settings.clip_grad)
        adam.step()
        data = batch(ids[:, :-1], labels=ids[:, 1:]) | {"samples": [["a"]], "skipped": []}
        outcome = ours.step(iter([data]), settings.lr, bias_rate=0.0)
        assert outcome.loss == pytest.approx(wanted.item(), rel=2e-6)
    trained, wanted = weights(ours.models[0]), as_ours(pair, theirs.state_dict())
    for name, first in imported.state.items():
        moved = (wanted[name] - first).norm()
        assert (trained[name] - wanted[name]).norm() <= 1e-3 * moved, name
        assert moved > 0 or name.endswith("correction_bias")
