"""Directories read back: our exports bit for bit, foreign layouts, and what is wrong with a directory."""

import json
import shutil

import pytest
import torch
from exporting import MODEL, RECIPE
from safetensors.torch import load_file, save_file
from transformers import LongcatFlashConfig, LongcatFlashForCausalLM

from mmoe.checkpoint.load import fill, weights
from mmoe.convert import read_hf, to_hf, verify
from mmoe.convert.families import longcat
from mmoe.errors import UserError
from mmoe.models.multimodal import build
from mmoe.parallel import engine
from mmoe.recipe.schema import Parallel


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


def published_mtp(backbone) -> dict[str, torch.Tensor]:
    """Random tensors with the names and shapes that vLLM and SGLang read from the released checkpoints."""
    d, h = backbone.hidden_size, backbone.heads
    qk, kv = backbone.qk_nope_head_dim + backbone.qk_rope_head_dim, backbone.qk_nope_head_dim + backbone.v_head_dim
    layer = {
        "eh_proj": (d, 2 * d), "enorm.m": (d,), "hnorm.m": (d,), "input_layernorm": (d,),
        "post_attention_layernorm": (d,), "self_attn.q_a_proj": (backbone.q_lora_rank, d),
        "self_attn.q_a_layernorm": (backbone.q_lora_rank,), "self_attn.q_b_proj": (h * qk, backbone.q_lora_rank),
        "self_attn.kv_a_proj_with_mqa": (backbone.kv_lora_rank + backbone.qk_rope_head_dim, d),
        "self_attn.kv_a_layernorm": (backbone.kv_lora_rank,), "self_attn.kv_b_proj": (h * kv, backbone.kv_lora_rank),
        "self_attn.o_proj": (d, h * backbone.v_head_dim),
        "transformer_layer.mlp.gate_proj": (backbone.ffn_hidden_size, d),
        "transformer_layer.mlp.up_proj": (backbone.ffn_hidden_size, d),
        "transformer_layer.mlp.down_proj": (d, backbone.ffn_hidden_size),
    }  # fmt: skip
    shapes = {f"layers.0.{name}": shape for name, shape in layer.items()}
    shapes |= {"embed_tokens": (backbone.vocab_size, d), "norm": (d,)}
    generator = torch.Generator().manual_seed(3)
    return {f"model.mtp.{name}.weight": torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def test_multi_token_prediction_survives_the_round_trip(exported, tmp_path):
    shutil.copytree(exported.out / "language", tmp_path / "hf")
    published = published_mtp(MODEL.backbone)
    save_file(published, tmp_path / "hf/more.safetensors")
    imported = read_hf(tmp_path / "hf")
    assert imported.recipe.model.mtp is not None
    assert same({k: v for k, v in imported.state.items() if ".mtp." not in k}, language_of(exported.state))

    engine.start(Parallel(), seed=0, alone=True)
    network = build(imported.recipe)
    fill(network, imported.state)
    to_hf(tmp_path, tmp_path / "again", load=lambda _: (imported.recipe, weights(network), exported.tokenizer))
    tensors = load_file(tmp_path / "again/model.safetensors")
    assert same({name: tensor for name, tensor in tensors.items() if name in published}, published)
    assert json.loads((tmp_path / "again/config.json").read_text())["num_nextn_predict_layers"] == 1
    _, info = LongcatFlashForCausalLM.from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not info["unexpected_keys"]
    assert not info["missing_keys"]


def test_half_a_multi_token_prediction_layer_is_an_error(exported, tmp_path):
    shutil.copytree(exported.out / "language", tmp_path / "hf")
    save_file({"model.mtp.norm.weight": torch.zeros(32)}, tmp_path / "hf/more.safetensors")
    with pytest.raises(UserError, match=r"lacks tensor model\.mtp\."):
        read_hf(tmp_path / "hf")


def test_verify(exported, tmp_path):
    out = exported.out
    assert verify(out, out) == []
    assert verify(out, out / "language") == []
    assert len(verify(out, out.with_name("bf16"))) == len(exported.state) - 4
    shutil.copytree(out, tmp_path / "hf")
    tensors = load_file(tmp_path / "hf/model.safetensors")
    tensors["connector.query"][0, 3] += 0.5
    tensors["language_model.model.norm.weight"][0] = -0.0
    save_file(tensors, tmp_path / "hf/model.safetensors")
    findings = verify(out, tmp_path / "hf")
    assert [line.split(":")[0] for line in findings] == ["connector.query", "language.decoder.final_layernorm.weight"]
    assert findings[0] == "connector.query: differs by up to 0.5"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mistral"}, "model_type is 'mistral'"),
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
