"""Directories read back: our exports bit for bit, foreign layouts, and what is wrong with a directory."""

import json
import shutil

import pytest
import torch
from exporting import MODEL, RECIPE
from safetensors.torch import load_file, save_file
from transformers import LongcatFlashConfig, LongcatFlashForCausalLM

from mmoe.convert import read_hf, verify
from mmoe.convert.families import longcat
from mmoe.errors import UserError


def language_of(state):
    return {name: tensor for name, tensor in state.items() if name.startswith("language.")}


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


def test_whole_export_comes_back_bit_for_bit(exported):
    imported = read_hf(exported.out)
    assert imported.recipe == RECIPE
    assert same(imported.state, exported.state)
    assert imported.tokenizer.read_bytes() == exported.tokenizer.read_bytes()
    assert imported.notes == ["gate and up projections of zero experts are not read: no computation uses them"]


def test_language_model_comes_back_bit_for_bit(exported):
    imported = read_hf(exported.out / "language")
    assert imported.recipe.model.backbone == MODEL.backbone
    assert imported.recipe.model.encoders == ()
    assert same(imported.state, language_of(exported.state))


def test_bf16_is_rounded_once(exported):
    state = read_hf(exported.out.with_name("bf16")).state
    for name, tensor in exported.state.items():
        kept = ".moe.router." in name
        assert torch.equal(state[name], tensor if kept else tensor.bfloat16()), name


def test_what_transformers_saves_comes_back(exported, foreign):
    """``save_pretrained`` of the whole model and of the language model, by transformers itself."""
    assert same(read_hf(exported.out.with_name("again")).state, exported.state)
    assert same(read_hf(exported.out.with_name("again-language")).state, language_of(exported.state))


def test_table_has_every_name_and_shape_of_transformers(exported):
    fields = longcat.to_config(MODEL.backbone, MODEL.moe, "float32")
    config = LongcatFlashConfig(**{k: v for k, v in fields.items() if k not in ("architectures", "model_type")})
    theirs = LongcatFlashForCausalLM(config).state_dict()
    ours = longcat.table(MODEL.backbone, MODEL.moe, fused=True).write(language_of(exported.state))
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


def test_zero_experts_projections_are_written_as_zeros_and_never_read(exported, tmp_path):
    shutil.copytree(exported.out / "language", tmp_path / "hf")
    tensors = load_file(tmp_path / "hf/model.safetensors")
    unused = [name for name in tensors if ".experts.4." in name or ".experts.5." in name]
    assert len(unused) == 2 * 2 * 2
    assert not any(tensors[name].any() for name in unused)
    for name in unused:
        del tensors[name]
    save_file(tensors, tmp_path / "hf/model.safetensors")
    assert same(read_hf(tmp_path / "hf").state, language_of(exported.state))


def test_multi_token_prediction_is_left_out_and_said(exported, tmp_path):
    shutil.copytree(exported.out / "language", tmp_path / "hf")
    save_file({"model.mtp.layers.0.weight": torch.zeros(2)}, tmp_path / "hf/more.safetensors")
    imported = read_hf(tmp_path / "hf")
    assert imported.notes[0] == "1 tensors of multi-token prediction are not read"
    assert same(imported.state, language_of(exported.state))


def test_verify(exported, tmp_path):
    out = exported.out
    assert verify(out, out) == []
    assert verify(out, out / "language") == []
    assert len(verify(out, out.with_name("bf16"))) == len(exported.state) - 4
    shutil.copytree(out, tmp_path / "hf")
    tensors = load_file(tmp_path / "hf/model.safetensors")
    tensors["connector.query"][3] += 0.5
    tensors["language_model.model.norm.weight"][0] = -0.0
    save_file(tensors, tmp_path / "hf/model.safetensors")
    findings = verify(out, tmp_path / "hf")
    assert [line.split(":")[0] for line in findings] == ["connector.query", "language.decoder.final_layernorm.weight"]
    assert findings[0] == "connector.query: differs by up to 0.5"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"zero_expert_type": "copy"}, "zero_expert_type is 'copy'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e7}}, "rope_type is 'yarn'"),
        ({"kv_lora_rank": None}, "lacks kv_lora_rank"),
    ],
)
def test_unsupported_configurations(exported, tmp_path, change, message):
    shutil.copytree(exported.out / "language", tmp_path / "hf")
    path = tmp_path / "hf/config.json"
    fields = json.loads(path.read_text()) | change
    path.write_text(json.dumps({k: v for k, v in fields.items() if v is not None}))
    with pytest.raises(UserError, match=message):
        read_hf(tmp_path / "hf")


def test_unreadable_directories(exported, tmp_path):
    with pytest.raises(UserError, match=r"no config\.json"):
        read_hf(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"unreadable config\.json"):
        read_hf(tmp_path)
    shutil.copy(exported.out / "language/config.json", tmp_path)
    with pytest.raises(UserError, match=r"no \.safetensors files"):
        read_hf(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"truncated")
    with pytest.raises(UserError, match="unreadable"):
        read_hf(tmp_path)
