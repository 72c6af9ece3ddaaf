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
        (["model.encoders.1.image_size=36"], "36 is not a multiple of the encoder's stride 8"),
        (["model.encoders.1.image_size=40"], "2 does not divide the grid of encoder 'conv', 5"),
        (["model.connector.groups=[2, 3]"], "model.connector.groups: 3 does not divide the grid of encoder 'vit', 4"),
        (["model.connector.inside.stride=2", "model.connector.inside.layers=2"], "the last of 2 stands behind layer 2"),
        (["model.encoders.0.feature_layer=-3"], "-3 names none of 2 layers"),
        (["model.encoders.0.pooling=norm"], "either the features' or the pooled token's"),
        (["model.encoders.0.position=rope", "model.encoders.0.heads=16"], "heads of 2 are no multiple of 4"),
        (["model.encoders.0.name=/home/me/run"], "model.encoders.0.name: '/home/me/run' is no name of a module"),
        (["model.encoders.0.name=../vit"], "model.encoders.0.name: '../vit' is no name of a module"),
        (["model.encoders.0.name="], "model.encoders.0.name: '' is no name of a module"),
        (["model.backbone.type=mistral"], "model.backbone.type must be one of 'longcat', 'llama', found the string"),
        (["model.encoders.0.type=vits"], "model.encoders.0.type must be one of 'vit', 'convnext', 'convnet', found"),
        (["model.connector.mask_padding=true"], "images are not padded with data.fit = 'stretch'"),
        (["model.connector.type=linear"], "unknown key 'model.connector.width'"),
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


LLAMA = """\
[model.backbone]
type = "llama"
vocab_size = 64
hidden_size = 32
layers = 1
heads = 4
kv_heads = 2
head_dim = 8
ffn_hidden_size = 64

"""
CONVNEXT = """\
[[model.encoders]]
name = "next"
type = "convnext"
image_size = 32
widths = [8, 16]
depths = [1, 1]
grid = 2

"""


def dense(tiny: Path) -> Path:
    """The recipe with a Llama-shaped language model."""
    text = tiny.read_text()
    start, end = text.index("[model.backbone]"), text.index("[[model.encoders]]")
    tiny.write_text(text[:start] + LLAMA + text[end:])
    return tiny


@pytest.mark.parametrize(
    ("overrides", "what"),
    [
        (["model.backbone.kv_heads=3"], "model.backbone.kv_heads: 3 does not divide heads = 4"),
        (["model.backbone.head_dim=7"], "model.backbone.head_dim: 7 is odd"),
        (["model.backbone.q_lora_rank=8"], "unknown key 'model.backbone.q_lora_rank'"),
        (["model.mtp.loss_weight=0.1"], "model.mtp: multi-token prediction stands on a LongCat backbone"),
    ],
)
def test_impossible_dense_models(tiny: Path, overrides: list[str], what: str) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe(dense(tiny), overrides)
    assert what in caught.value.what


def test_backbones_and_experts_go_together(tiny: Path) -> None:
    text = tiny.read_text()
    experts = text[text.index("[model.moe]") : text.index("[[model.encoders]]")]
    tiny.write_text(text.replace(experts, ""))
    with pytest.raises(UserError, match=r"missing key 'model\.moe'"):
        load_recipe(tiny)
    tiny.write_text(text)
    tiny.write_text(dense(tiny).read_text() + experts)
    with pytest.raises(UserError, match="a Llama backbone has no experts"):
        load_recipe(tiny)


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("feature_stages = [0, 1]\ngrid = 2", ""),
        ("feature_stages = [0, 1]", "maps of several stages differ in size"),
        ("feature_stages = [2]", "names no stages of 2"),
        ("feature_stages = []", "names no stages of 2"),
        ("depths = [1]", "1 depths for 2 widths"),
    ],
)
def test_convnext(tiny: Path, line: str, what: str) -> None:
    keys = {row.split(" = ")[0] for row in line.splitlines()} | {"grid"}
    kept = [row for row in CONVNEXT.splitlines() if row.split(" = ")[0] not in keys]
    table = "\n".join([*kept, line, ""])
    tiny.write_text(tiny.read_text().replace("[model.connector]", f"{table}\n[model.connector]"))
    if not what:
        assert load_recipe(tiny).model.image_tokens == 4
        return
    with pytest.raises(UserError) as caught:
        load_recipe(tiny)
    assert what in caught.value.what
