"""What others read of an export: its types, its index, and the fields and tensors that servers want."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from exporting import MODEL, RECIPE
from transformers import LongcatFlashForCausalLM

from mmoe import cli
from mmoe.checkpoint.load import blank, weights
from mmoe.convert import from_hf, read_hf, to_hf, verify
from mmoe.convert.hf.modeling_mmoe import MmoeForConditionalGeneration
from mmoe.convert.weights import INDEX, Weights
from mmoe.recipe.model import MTP
from mmoe.recipe.schema import Precision

# The widths are those that bf16 is trained with.
MOE = dataclasses.replace(MODEL.moe, expert_hidden_size=16)
HALF = dataclasses.replace(
    RECIPE, model=dataclasses.replace(MODEL, moe=MOE, mtp=MTP()), precision=Precision(dtype="bf16")
)


@pytest.fixture(scope="module")
def half(exported, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in bf16, its router in fp32."""
    folder = tmp_path_factory.mktemp("half")
    torch.manual_seed(0)
    state = {name: torch.randn(t.shape, dtype=torch.float32).to(t.dtype) for name, t in weights(blank(HALF)).items()}
    to_hf(folder, folder / "hf", load=lambda _: (HALF, state, exported.tokenizer))
    from_hf(folder / "hf", folder / "run")
    return folder / "run/checkpoints/step_00000000"


def fields(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "config.json").read_text())


def types(directory: Path) -> dict[str, torch.dtype]:
    return {name: spec.dtype for name, spec in Weights(directory).specs.items()}


def test_types_are_as_stored_unless_others_are_asked_for(half: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "hf"
    assert cli.main(["convert", "to-hf", str(half), str(out)]) == 0
    assert cli.main(["convert", "verify", str(half), str(out)]) == 0
    assert capsys.readouterr().out.endswith(": no differences\n")
    for directory in (out, out / "language"):
        assert fields(directory)["dtype"] == "bfloat16"
        kept = {name for name, dtype in types(directory).items() if dtype != torch.bfloat16}
        assert kept == {name for name in types(directory) if ".router." in name}
        assert {types(directory)[name] for name in kept} == {torch.float32}
    assert fields(out)["text_config"]["dtype"] == "bfloat16"
    for model in (
        MmoeForConditionalGeneration.from_pretrained(out),
        LongcatFlashForCausalLM.from_pretrained(out / "language"),
    ):
        assert model.dtype == torch.bfloat16

    wide = tmp_path / "wide"
    assert cli.main(["convert", "to-hf", str(half), str(wide), "--dtype", "fp32"]) == 0
    for directory in (wide, wide / "language"):
        assert fields(directory)["dtype"] == "float32"
        assert set(types(directory).values()) == {torch.float32}
    assert cli.main(["convert", "verify", str(half), str(wide)]) == 2
    state = read_hf(out).state
    assert f"{len([name for name in state if '.router.' not in name])} differences" in capsys.readouterr().err


def test_parameters_are_counted_as_transformers_does(half: Path, tmp_path: Path) -> None:
    """The selection bias is a buffer there, and it leaves multi-token prediction aside."""
    to_hf(half, tmp_path / "hf", max_shard_size="20KB")
    for model in (
        MmoeForConditionalGeneration.from_pretrained(tmp_path / "hf"),
        LongcatFlashForCausalLM.from_pretrained(tmp_path / "hf/language"),
    ):
        index = json.loads((Path(model.name_or_path) / INDEX).read_text())
        assert index["metadata"]["total_parameters"] == model.num_parameters()
        assert any("mtp" in name for name in index["weight_map"])


def test_zero_experts_are_dropped(half: Path, tmp_path: Path, capsys) -> None:
    """vLLM wants none of their tensors, transformers all; on the way back each of ours is there bit for bit."""
    plain, dropped = tmp_path / "plain", tmp_path / "dropped"
    for out, more in ((plain, []), (dropped, ["--zero-experts", "drop"])):
        assert cli.main(["convert", "to-hf", str(half), str(out), *more]) == 0
    experts, everyone = MOE.experts, MOE.experts + MOE.zero_experts
    gone = {
        f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight"
        for layer in range(MODEL.backbone.layers)
        for expert in range(experts, everyone)
        for part in ("gate", "up")
    }
    assert types(plain / "language").keys() - types(dropped / "language").keys() == gone
    assert types(dropped / "language").keys() <= types(plain / "language").keys()
    assert types(dropped) == types(plain)  # its experts are fused
    LongcatFlashForCausalLM.from_pretrained(plain / "language")
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        LongcatFlashForCausalLM.from_pretrained(dropped / "language")
    assert cli.main(["generate", str(dropped / "language"), "--prompt", "how many"]) == 2
    assert "a LongCat-Flash without --zero-experts drop" in capsys.readouterr().err

    assert verify(half, dropped) == verify(half, dropped / "language") == []
    from_hf(dropped / "language", tmp_path / "run")
    assert verify(half, tmp_path / "run/checkpoints/step_00000000") == []


def test_fields_that_servers_read(exported) -> None:
    """vLLM's LongCat-Flash; transformers has no such fields but the first."""
    wanted = {"zero_expert_num": 2, "zero_expert_type": "identity", "mla_scale_q_lora": True, "mla_scale_kv_lora": True}
    for found in (fields(exported.out / "language"), fields(exported.out)["text_config"]):
        assert {name: found.get(name) for name in wanted} == wanted
