"""What is none of the released LLaVAs' and Yi-VLs' layout is refused by its name."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import exporting
import pytest
import torch
from released_llava import CLIP, LLAMA, Made, recipe_of
from safetensors.torch import load_file, save_file

from mmoe.convert import read_hf, to_hf
from mmoe.convert.parts import read_parts
from mmoe.errors import UserError
from mmoe.recipe import model as tables


@pytest.fixture(scope="module")
def yi_vl(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("yi_vl"), "mlp2x_gelu_Norm")


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"connector": tables.MLP(type="mlp", grid=4, newline=True)}, r"model\.connector\.newline"),
        ({"connector": tables.MLP(type="mlp", grid=2)}, r"own grid of 4, not 2 \(model\.connector\.grid\)"),
        ({"connector": exporting.MODEL.connector}, r"model\.connector\.type"),
        ({"backbone": exporting.MODEL.backbone, "moe": exporting.MODEL.moe}, r"model\.backbone\.type"),
        ({"backbone": dataclasses.replace(LLAMA, tied_embeddings=True)}, r"model\.backbone\.tied_embeddings"),
        ({"backbone": dataclasses.replace(LLAMA, head_dim=16)}, r"model\.backbone\.head_dim"),
        ({"encoders": (dataclasses.replace(CLIP, final_norm=True),)}, r"model\.encoders\.0\.final_norm"),
        ({"encoders": (CLIP, dataclasses.replace(CLIP, name="other"))}, "it has one encoder, not 2"),
        ({"encoders": (exporting.MODEL.encoders[1],)}, r"model\.encoders\.0\.type"),
        (
            {"encoders": (dataclasses.replace(CLIP, class_token=False, pre_norm=False, patch_bias=True),)},
            "one of clip_vision_model, not siglip_vision_model",
        ),
    ],
)
def test_what_is_no_llava_is_refused(yi_vl: Made, tmp_path: Path, changes: dict[str, Any], where: str) -> None:
    with pytest.raises(UserError, match=f"LlavaLlamaForCausalLM has no such model.*{where}"):
        to_hf(
            tmp_path,
            tmp_path / "hf",
            form="llava_llama",
            load=lambda _: (recipe_of(**changes), yi_vl.state, yi_vl.tokenizer),
        )
    assert not list(tmp_path.iterdir())


def test_zero_experts_that_are_not_there(yi_vl: Made, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there are no zero experts .*\(--zero-experts drop\)"):
        to_hf(
            tmp_path,
            tmp_path / "hf",
            load=lambda _: (yi_vl.recipe, yi_vl.state, yi_vl.tokenizer),
            zero_experts="drop",
        )


@pytest.mark.parametrize("name", ["x" * 300, "vit/clip/" * 999])
def test_a_long_name_of_the_tower(yi_vl: Made, tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="nothing in it tells of the encoder"):
        read_hf(yi_vl.bare(tmp_path, mm_vision_tower=name))


CHANGES = [
    ({"mm_projector_type": "mlp2x_gelu"}, "mlp2x_gelu", "mlp2x_gelu_Norm"),
    ({"mm_projector_type": "mlp3x_gelu_Norm"}, "mlp3x_gelu_Norm", "mlp2x_gelu_Norm"),
    ({"mm_projector_type": None}, "None", "mlp2x_gelu_Norm"),
    ({"mm_hidden_size": 10**12}, "mm_hidden_size is 1000000000000", "24"),
    ({"mm_vision_select_layer": -1}, "mm_vision_select_layer is -1", "-2"),
]
VARIANTS = [
    ({"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature is 'cls_patch'"),
    ({"mm_patch_merge_type": "spatial_unpad"}, "mm_patch_merge_type is 'spatial_unpad'"),
    ({"s2": True}, "s2 is True"),
    ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio is 'anyres'"),
]


@pytest.mark.parametrize(("change", "there", "here"), CHANGES)
def test_a_configuration_of_another_model(
    yi_vl: Made, tmp_path: Path, change: dict[str, Any], there: str, here: str
) -> None:
    hf = yi_vl.bare(tmp_path, **change)
    with pytest.raises(UserError, match=f"{there}.* makes it '?{here}'? by the recipe"):
        read_parts(yi_vl.recipe, [("connector", hf)], yi_vl.tokenizer)


@pytest.mark.parametrize(("change", "message"), VARIANTS)
def test_variants_that_are_not_read(yi_vl: Made, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    hf = yi_vl.bare(tmp_path, **change)
    with pytest.raises(UserError, match=message):
        read_parts(yi_vl.recipe, [("connector", hf)], yi_vl.tokenizer)
    with pytest.raises(UserError, match=message):
        read_hf(hf)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 10**9}, r"sizes up to 1000000000"),
        ({"num_hidden_layers": 10**9}, r"it tells of 100000000[0-9] layers"),
        ({"vocab_size": None}, "vocab_size"),
        ({"mm_vision_tower": 3}, "mm_vision_tower is 3"),
        ({"mm_vision_tower": "../hf/vit/clip"}, "nothing in it tells of the encoder"),
        ({"mm_vision_select_layer": 9}, r"mm_vision_select_layer is 9.*±3"),
        ({"mm_projector_type": "mlp2x_silu"}, "only linear, mlpNx_gelu and mlpNx_gelu_Norm"),
        ({"mm_projector_type": "mlp2x_gelu"}, r"lacks tensor model\.mm_projector\.2\.bias"),
        ({"mm_projector_type": "linear"}, r"lacks tensor model\.mm_projector\.bias"),
        ({"mm_projector_type": "mlp99x_gelu_Norm"}, "it tells of 10[0-9] layers"),
    ],
)
def test_a_damaged_configuration(yi_vl: Made, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_hf(yi_vl.bare(tmp_path, **change))


def test_an_absolute_path_is_not_followed(yi_vl: Made, tmp_path: Path) -> None:
    hf = yi_vl.bare(tmp_path, mm_vision_tower=str(yi_vl.hf / "vit/clip"))
    with pytest.raises(UserError, match="from-parts"):
        read_hf(hf)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 4}, r"lacks tensor encoder\.layers\.3"),
        ({"hidden_size": 10**9}, "sizes up to 1000000000"),
        ({"model_type": "siglip_vision_model"}, "it is a siglip_vision_model"),
        ({"image_size": 32}, "image_size is 32, there are 17 positions"),
    ],
)
def test_a_damaged_encoder(yi_vl: Made, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    hf = yi_vl.bare(tmp_path)
    path = hf / "vit/clip/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=message):
        read_hf(hf)


def test_tensors_that_are_not_there_or_not_known(yi_vl: Made, tmp_path: Path) -> None:
    hf = yi_vl.bare(tmp_path)
    tensors = load_file(hf / "model.safetensors")
    save_file(tensors | {"model.mm_projector.7.weight": torch.zeros(1)}, hf / "model.safetensors")
    for read in (lambda: read_hf(hf), lambda: read_parts(yi_vl.recipe, [("connector", hf)], yi_vl.tokenizer)):
        with pytest.raises(UserError, match=r"has unread tensor model\.mm_projector\.7\.weight"):
            read()
    last = max(name for name in tensors if "mm_projector" in name)
    save_file({name: tensor for name, tensor in tensors.items() if name != last}, hf / "model.safetensors")
    for read in (lambda: read_hf(hf), lambda: read_parts(yi_vl.recipe, [("connector", hf)], yi_vl.tokenizer)):
        with pytest.raises(UserError, match=f"lacks tensor {last}"):
            read()


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("ffn_hidden_size = 48", "ffn_hidden_size = 1000000000", r"sizes up to 1000000000.*mmoe_recipe"),
        ("kv_heads = 2", "kv_heads = 4", r"num_key_value_heads is 2, model\.backbone\.kv_heads is 4 by the recipe"),
        (
            "\nnorm = true",
            "\nnorm = false",
            r"mm_projector_type is 'mlp2x_gelu_Norm', model\.connector makes it 'mlp2x",
        ),
        ("tied_embeddings = false", "tied_embeddings = true", r"its recipe is none of a LLaVA or Yi-VL"),
    ],
)
def test_a_recipe_that_the_weights_do_not_fill(
    yi_vl: Made, tmp_path: Path, before: str, after: str, message: str
) -> None:
    hf = Path(shutil.copytree(yi_vl.hf, tmp_path / "hf"))
    recipe = hf / "mmoe_recipe.toml"
    assert before in recipe.read_text()
    recipe.write_text(recipe.read_text().replace(before, after, 1))
    with pytest.raises(UserError, match=message):
        read_hf(hf)
