"""Vision encoders against transformers': features, bitwise export, configurations."""

import dataclasses
import json
import re
import tomllib
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from towers import TIMM, OpenClip, Pair, their_maps

from mmoe.convert.families.clip import from_open_clip, to_open_clip
from mmoe.convert.families.vision import FAMILIES, from_config, table, to_config
from mmoe.errors import UserError
from mmoe.models.encoders import build_encoder
from mmoe.models.encoders.vit import resize_position
from mmoe.recipe import model
from mmoe.recipe.load import typed

SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
STAGES = {"hidden_sizes": [8, 16, 24], "depths": [1, 2, 1], "num_stages": 3, "image_size": 32}


@dataclass(frozen=True)
class Case:
    """One of transformers' encoders: the class without ``Model``, its configuration, and what we want of it."""

    name: str
    fields: dict[str, Any]
    ours: dict[str, Any] = field(default_factory=dict)


CASES = {
    "CLIP": Case("CLIPVision", {**SIZES, "intermediate_size": 48}),
    "CLIP, layer −2 (LLaVA)": Case("CLIPVision", {**SIZES, "intermediate_size": 48}, {"feature_layer": -2}),
    "CLIP, final norm": Case("CLIPVision", SIZES | {"intermediate_size": 48}, {"final_norm": True, "pooling": "none"}),
    "OpenCLIP in CLIP": Case("CLIPVision", {**SIZES, "intermediate_size": 48, "hidden_act": "gelu"}),
    "SigLIP": Case("SiglipVision", {**SIZES, "intermediate_size": 48}),
    "SigLIP, 35 pixels": Case("SiglipVision", {**SIZES, "intermediate_size": 48, "image_size": 35}),
    "SigLIP, no head, no norm": Case(
        "SiglipVision",
        {**SIZES, "intermediate_size": 48, "vision_use_head": False},
        {"final_norm": False, "pooling": "norm"},
    ),
    "DINOv2": Case("Dinov2", SIZES),
    "DINOv2, SwiGLU": Case("Dinov2", {**SIZES, "use_swiglu_ffn": True, "use_mask_token": False}),
    "DINOv2 with registers": Case("Dinov2WithRegisters", {**SIZES, "num_register_tokens": 3, "qkv_bias": False}),
    "DINOv3": Case("DINOv3ViT", {**SIZES, "intermediate_size": 48, "num_register_tokens": 4}),
    "DINOv3, SwiGLU": Case(
        "DINOv3ViT",
        {
            **SIZES,
            "intermediate_size": 48,
            "num_register_tokens": 2,
            "use_gated_mlp": True,
            "hidden_act": "silu",
            "query_bias": False,
            "value_bias": False,
        },
    ),
    "ConvNeXt": Case("ConvNext", STAGES),
    "ConvNeXt, all stages": Case("ConvNext", STAGES, {"feature_stages": (0, 1, 2), "grid": 4}),
    "ConvNeXt, stages 1, 0": Case("ConvNext", STAGES, {"feature_stages": (1, -3), "grid": 4}),
    "ConvNeXt, no layer scale": Case("ConvNext", {**STAGES, "layer_scale_init_value": 0.0}),
}


def pair(case: Case, folder: Path) -> Pair:
    torch.manual_seed(0)
    theirs = getattr(transformers, f"{case.name}Model")(getattr(transformers, f"{case.name}Config")(**case.fields))
    with torch.no_grad():
        for parameter in theirs.parameters():
            # Weights that are all 0 or 1 at first (norms, biases, scales) would hide a swapped pair.
            parameter.add_(0.2 * torch.randn_like(parameter) if parameter.dim() != 2 else 0)
    theirs.eval().save_pretrained(folder)
    read = from_config(json.loads((folder / "config.json").read_text()), "config.json")
    config = dataclasses.replace(read, **case.ours)
    ours = build_encoder(config).eval()
    ours.load_state_dict(table(config).read(load_file(folder / "model.safetensors"), str(folder)))
    return Pair(theirs, folder, config, ours)


def resized(made: Pair, image_size: int, dtype: torch.dtype = torch.float32) -> Any:
    """Our encoder for images of another size."""
    config = dataclasses.replace(made.config, image_size=image_size)
    state = {name: tensor.to(dtype) for name, tensor in made.ours.state_dict().items()}
    if "position" in state:
        state["position"] = resize_position(state["position"], config)
    encoder = build_encoder(config).to(dtype).eval()
    encoder.load_state_dict(state)
    return encoder


def difference(made: Pair, image_size: int, dtype: torch.dtype) -> float:
    """The largest of any feature, absolute."""
    pixels = torch.randn(2, 3, image_size, image_size, generator=torch.Generator().manual_seed(1)).to(dtype)
    theirs = made.theirs.to(dtype)
    with torch.no_grad():
        ours = resized(made, image_size, dtype)(pixels)
    maps = their_maps(made, theirs, pixels)
    theirs.float()
    assert [part.shape for part in ours] == [part.shape for part in maps]
    assert sum(part.shape[-1] for part in ours) == made.ours.channels
    return max(float((a - b).abs().max()) for a, b in zip(ours, maps, strict=True))


@pytest.fixture(scope="module", params=CASES)
def made(request, tmp_path_factory) -> Pair:
    return pair(CASES[request.param], tmp_path_factory.mktemp("encoder"))


def test_features(made):
    assert difference(made, made.config.image_size, torch.float32) < 1e-5
    assert difference(made, made.config.image_size, torch.float64) < 1e-10


@pytest.mark.parametrize("image_size", [16, 48])
def test_features_at_another_size(made, image_size):
    assert difference(made, image_size, torch.float32) < 1e-5


def test_export_is_bitwise(made, tmp_path):
    written, disk = dict(table(made.config).write(made.ours.state_dict())), made.disk
    assert written.keys() == disk.keys()
    for name, tensor in disk.items():
        assert written[name].shape == tensor.shape, name
        assert torch.equal(written[name].view(torch.int32), tensor.view(torch.int32)), name
    config = to_config(made.config)
    save_file(written, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    again, found = type(made.theirs).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(found.values()), found
    pixels = torch.randn(1, 3, made.config.image_size, made.config.image_size)
    for a, b in zip(their_maps(made, again.eval(), pixels), their_maps(made, made.theirs, pixels), strict=True):
        assert torch.equal(a, b)
    picked = {"grid", "feature_layer", "feature_stages", "final_norm", "pooling"}
    read = from_config(config, "config.json")
    unlike = {key for key, value in vars(read).items() if value != getattr(made.config, key)}
    assert unlike <= picked


def test_prefixes(made):
    there = {f"vision_model.{name}": tensor for name, tensor in made.disk.items()}
    names = table(made.config, ours="encoders.a.", theirs="vision_model.")
    state = names.read(there, "a checkpoint")
    assert state.keys() == {f"encoders.a.{name}" for name in made.ours.state_dict()}
    assert names.write(state).keys() == there.keys()


def test_what_the_features_do_not_use_takes_no_gradient(made):
    maps = made.ours(torch.randn(2, 3, made.config.image_size, made.config.image_size))
    sum(part.square().sum() for part in maps).backward()
    for name, parameter in made.ours.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None and bool(parameter.grad.any())), name


@pytest.mark.parametrize("kind", FAMILIES)
def test_defaults_are_transformers(kind):
    family = FAMILIES[kind]
    defaults = transformers.AutoConfig.for_model(kind).to_dict()
    for key, value in {**family.defaults, **family.only}.items():
        assert defaults[key] == (tuple(value) if isinstance(defaults[key], tuple) else value), key


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "swin"}, "model_type is 'swin'"),
        ({"model_type": ["clip_vision_model"]}, "model_type is"),
        ({"model_type": "clip_vision_model", "hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"model_type": "clip_vision_model", "num_channels": 4}, "num_channels is 4"),
        ({"model_type": "clip_vision_model", "image_size": [224, 336]}, "image_size is"),
        ({"model_type": "clip_vision_model", "hidden_size": "768"}, "width"),
        ({"model_type": "siglip_vision_model", "attention_dropout": 0.1}, "attention_dropout is 0.1"),
        ({"model_type": "dinov2", "mlp_ratio": 4.5}, "mlp_ratio is 4.5"),
        ({"model_type": "dinov2", "drop_path_rate": 0.1}, "drop_path_rate is 0.1"),
        ({"model_type": "dinov2_with_registers", "num_register_tokens": 0}, "num_register_tokens is 0"),
        ({"model_type": "dinov3_vit", "use_gated_mlp": True}, "hidden_act is 'gelu'"),
        ({"model_type": "dinov3_vit"}, "num_register_tokens is 0"),
        ({"model_type": "dinov3_vit", "num_register_tokens": 4, "value_bias": False}, "value_bias is False"),
        ({"model_type": "dinov3_vit", "num_register_tokens": 4, "mlp_bias": False}, "mlp_bias is False"),
        ({"model_type": "convnext", "num_stages": 3}, "num_stages is 3"),
        ({"model_type": "convnext", "hidden_act": "relu"}, "hidden_act is 'relu'"),
    ],
)
def test_an_unsupported_variant_is_the_users_error(fields, message):
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        from_config(fields, "config.json")
    assert "config.json" in str(caught.value)


@pytest.mark.parametrize("kind", FAMILIES)
def test_any_value_is_read_or_the_users_error(kind):
    family = FAMILIES[kind]
    sound = {"model_type": kind, "num_register_tokens": 4}
    for key in {**family.defaults, **family.only}:
        for value in (None, True, -1, 0, 1.5, float("nan"), 10**30, "x", "", [], [1], [None], {}, {"a": 1}):
            with suppress(UserError):
                assert isinstance(from_config({**sound, key: value}, "config.json"), family.table)


CLIP, DINOV2, CONVNEXT = (from_config({"model_type": kind}, "") for kind in ("clip_vision_model", "dinov2", "convnext"))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dataclasses.replace(CLIP, registers=4), "registers = 4"),
        (dataclasses.replace(CLIP, pooling="none"), "without final_norm"),
        (dataclasses.replace(DINOV2, class_token=False), "class_token = False"),
        (model.ConvNet(name="a", type="convnet", image_size=32, widths=(8,)), "no convnet"),
        (dataclasses.replace(CONVNEXT, norm_eps=1e-5), "norm_eps = 1e-05"),
        (dataclasses.replace(DINOV2, mlp_width=100), "mlp_width = 100"),
        (dataclasses.replace(DINOV2, key_bias=False), "query, key and value"),
    ],
)
def test_what_transformers_has_not_is_not_exported(config, message):
    with pytest.raises(UserError, match=re.escape(message)):
        to_config(config)


def test_open_clip():
    torch.manual_seed(0)
    theirs = OpenClip(width=32, heads=2, mlp_width=64, layers=2, grid=4, patch=8)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    state = theirs.state_dict()
    fields = {**SIZES, "num_hidden_layers": 2, "intermediate_size": 64, "hidden_act": "gelu"}
    read = from_config({"model_type": "clip_vision_model", **fields}, "")
    config = dataclasses.replace(read, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    named = from_open_clip(state, "open_clip")
    ours = build_encoder(config)
    ours.load_state_dict(table(config).read(named, "open_clip"))
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert (ours(pixels)[0].flatten(1, 2) - theirs(pixels)).abs().max() < 1e-5
    back = to_open_clip(table(config).write(ours.state_dict()))
    assert back.keys() == state.keys() - {"proj"}
    assert all(torch.equal(back[name], state[name]) for name in back)
    with pytest.raises(UserError, match=r"unread tensor attn_pool\.probe"):
        from_open_clip({"attn_pool.probe": torch.zeros(1)}, "open_clip")
    with pytest.raises(UserError, match="in_proj_bias is"):
        from_open_clip({"transformer.resblocks.0.attn.in_proj_bias": torch.zeros(4)}, "open_clip")


def test_timm(tmp_path):
    """timm's ConvNeXt has transformers' tensors under names of its own."""
    made = pair(CASES["ConvNeXt"], tmp_path)
    names = {name: name for name in made.disk}
    for pattern, new in TIMM:
        names = {name: re.sub(pattern, new, mine) for name, mine in names.items()}
    tensors = {names[name]: tensor for name, tensor in made.disk.items()}
    layout = table(made.config, layout="timm")
    state = layout.read(tensors, "timm")
    assert state.keys() == made.ours.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in made.ours.state_dict().items())
    assert layout.write(state).keys() == tensors.keys()


PAGE = (Path(__file__).parents[2] / "docs/systems/encoders.md").read_text()
PUBLISHED = re.findall(r"([\d,]{9,}) parameters[^`]*```toml\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize(("parameters", "text"), PUBLISHED, ids=[text.split('"')[1] for _, text in PUBLISHED])
def test_published_encoders_are_theirs(parameters, text):
    """The documented tables are read, and have as many parameters as transformers' models of those configurations."""
    (fields,) = tomllib.loads(text)["encoders"]
    config = typed(model.AnyEncoder, fields, "the page")
    with torch.device("meta"):
        ours = build_encoder(config)
        layout = "timm" if config.norm_eps == 1e-5 and config.type == "convnext" else "transformers"
        names = table(config, layout=layout)
        count = sum(parameter.numel() for parameter in ours.parameters())
        assert count == int(parameters.replace(",", ""))
        assert len(names.entries) == len(ours.state_dict())
        if layout == "transformers":
            their_config = transformers.AutoConfig.for_model(**to_config(config))
            theirs = getattr(transformers, to_config(config)["architectures"][0])(their_config)
            assert count == sum(parameter.numel() for parameter in theirs.parameters())


def test_every_published_encoder_is_found():
    assert len(PUBLISHED) == PAGE.count("[[encoders]]") == 7
