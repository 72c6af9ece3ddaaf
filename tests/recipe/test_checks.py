"""Impossible values are refused by key; the possible edges are not."""

from pathlib import Path

import pytest

from mmoe.errors import UserError
from mmoe.recipe import load_recipe


@pytest.mark.parametrize(
    ("overrides", "what"),
    [
        (["train.steps=0"], "train.steps: 0 is not positive"),
        (["train.seed=-1"], "train.seed: -1 is negative"),
        (["optimizer.lr=nan"], "optimizer.lr: nan is not a finite number"),
        (["optimizer.betas=[0.9, 1.0]"], "optimizer.betas.1: 1.0 is not in [0, 1)"),
        (["model.encoders.1.widths=[16, 0]"], "model.encoders.1.widths.1: 0 is not positive"),
        (["model.moe.top_k=7"], "model.moe.top_k: 7 is above experts + zero_experts = 6"),
        (["model.moe.active_experts=2.5"], "model.moe.active_experts: 2.5 is above min(top_k, experts) = 2"),
        (["model.moe.zero_experts=1", "model.moe.active_experts=0.5"], "leaves every token at least 1 FFN experts"),
        (["model.moe.balance_coefficient=0.1", "model.moe.active_experts=2"], "leaves nothing to the zero experts"),
        (["model.moe.bias_rate_min=0.1"], "model.moe.bias_rate_min: 0.1 is above model.moe.bias_rate = "),
        (["model.moe.balance_groups=3"], "model.moe.balance_groups: 3 does not divide experts = 4"),
        (["model.backbone.qk_rope_head_dim=7"], "model.backbone.qk_rope_head_dim: 7 is odd"),
        (["model.moe.expert_hidden_size=10"], "model.moe.expert_hidden_size: 10 is not a multiple of 4"),
        (["precision.dtype=bf16", "model.moe.expert_hidden_size=12"], "12 is not a multiple of 8"),
        (["model.backbone.vocab_size=4"], "model.backbone.vocab_size: smaller than"),
        (["model.encoders=[]"], "model.connector: a connector without encoders"),
        (["model.connector.width=30"], "model.connector.width: 30 is not a multiple of heads = 4"),
        (["model.connector.grid=3"], "model.connector.grid: 3 does not divide the grid of encoder 'vit', 4"),
        (["model.encoders.0.width=30"], "model.encoders.0.width: 30 is not a multiple of heads = 4"),
        (["model.encoders.1.image_size=64"], "model.encoders.1.image_size: 64 differs from the first encoder's 32"),
        (
            ["model.encoders.0.patch_size=5"],
            "model.encoders.0.image_size: 32 is not a multiple of the encoder's stride",
        ),
        (["model.encoders.1.widths=[8, 12]"], "model.encoders.1.widths: 12 is not a multiple of 8"),
        (["model.encoders.1.widths=[]"], "model.encoders.1.widths: a ConvNet without stages"),
        (["model.encoders.1.name=vit"], "model.encoders.1.name: 'vit' names two encoders"),
        (["train.global_batch=5"], "train.global_batch: 5 is not a multiple of train.micro_batch = 2"),
        (["optimizer.warmup_steps=11"], "optimizer.warmup_steps: 11 is above train.steps = 10"),
        (["optimizer.min_lr=0.1"], "optimizer.min_lr: 0.1 is above optimizer.lr"),
        (["data.sequence_length=5000"], "data.sequence_length: 5000 is above model.backbone.max_position"),
        (["data.sequence_length=5"], "data.sequence_length: one image's tokens do not fit"),
    ],
)
def test_impossible_values(tiny: Path, overrides: list[str], what: str) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe(tiny, overrides)
    assert what in caught.value.what
    assert caught.value.fix


def test_encoders_need_a_connector(tiny: Path) -> None:
    text = tiny.read_text()
    start, end = text.index("[model.connector]"), text.index("[data]")
    tiny.write_text(text[:start] + text[end:])
    with pytest.raises(UserError, match="encoders without a connector"):
        load_recipe(tiny)


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.moe.zero_experts=0", "model.moe.active_experts=2"],
        ["model.moe.active_experts=2", "model.moe.bias_rate=0"],
        ["optimizer.warmup_steps=10", "optimizer.min_lr=1e-3", "optimizer.weight_decay=0", "optimizer.clip_grad=0"],
        ["train.steps=1", "optimizer.betas=[0, 0]"],
        ["data.tokenizer=/shared/tokenizer.json"],
        ["data.tokenizer=../tokenizer.json"],
    ],
)
def test_possible_edges(tiny: Path, overrides: list[str]) -> None:
    assert load_recipe(tiny, overrides).name == "tiny"
