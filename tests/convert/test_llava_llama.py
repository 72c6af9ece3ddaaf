"""The layout of released LLaVAs and Yi-VLs: directories against the parts of transformers that they are made of and the
released projectors (haotian-liu/LLaVA and 01-ai/Yi, ``multimodal_projector/builder.py``), written out."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from released_llava import CLIP, CONNECTORS, LLAMA, Made
from safetensors.torch import load_file, save_file
from torch import Tensor

import mmoe
from mmoe import cli
from mmoe.convert import from_hf, read_hf, to_hf, verify
from mmoe.convert.families import llava_llama
from mmoe.convert.parts import read_parts
from mmoe.errors import UserError
from mmoe.evaluate.generate import generate
from mmoe.recipe import model as tables
from mmoe.recipe.tokens import OURS

STORED = "model.vision_tower.vision_tower.vision_model."


@pytest.fixture(scope="module", params=CONNECTORS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("llava_llama"), request.param)


@pytest.fixture(scope="module")
def yi_vl(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("yi_vl"), "mlp2x_gelu_Norm")


def projected(kind: str, tensors: dict[str, Tensor], x: Tensor) -> Tensor:
    """The released projector, rows [n, width] → [n, d]."""

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, tensors[f"model.mm_projector{name}.weight"], tensors[f"model.mm_projector{name}.bias"])

    def norm(name: str, x: Tensor) -> Tensor:
        weight, bias = (tensors[f"model.mm_projector{name}.{part}"] for part in ("weight", "bias"))
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps=1e-5)

    if kind == "linear":
        return linear("", x)
    if kind == "mlp2x_gelu":
        return linear(".2", F.gelu(linear(".0", x)))
    assert kind == "mlp2x_gelu_Norm"
    return norm(".4", linear(".3", F.gelu(norm(".1", linear(".0", x)))))


@torch.no_grad()
def released(hf: Path, ids: Tensor, images: Tensor, encoder: tables.ViT) -> Tensor:
    """Logits, fp64, from the files of the directory alone."""
    config = json.loads((hf / "config.json").read_text())
    tensors = load_file(hf / "model.safetensors")
    own = {name for name in tensors if name.startswith("model.mm_projector")}
    fields = {key: value for key, value in config.items() if key not in ("architectures", "model_type", "dtype")}
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields)).eval()
    llama.load_state_dict({name: tensor for name, tensor in tensors.items() if name not in own})  # strict: nothing else
    llama = llama.double()
    folder = hf / config["mm_vision_tower"].replace("./", "")
    tower = transformers.CLIPVisionModel.from_pretrained(folder).double().eval()
    mean, std = (torch.tensor(value, dtype=torch.float64)[:, None, None] for value in (encoder.mean, encoder.std))
    seen = tower((images.double() / 4 + 0.5 - mean) / std, output_hidden_states=True).hidden_states
    assert config["mm_vision_select_feature"] == "patch"
    rows = seen[config["mm_vision_select_layer"]][:, 1:].flatten(0, 1)
    embeddings = llama.get_input_embeddings()(ids)
    doubled = {name: tensors[name].double() for name in own}
    embeddings[ids == OURS.image] = projected(config["mm_projector_type"], doubled, rows)
    return llama(inputs_embeds=embeddings).logits


def test_logits(made: Made) -> None:
    picture = [OURS.image] * made.recipe.model.image_tokens
    ids = torch.tensor([[1, *picture, 40, 50, 60], [1, 70, 80, *picture, 90]])
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    wanted = released(made.hf, ids, images, CLIP)
    assert wanted.abs().max() > 0.1
    assert (made.ours.logits(ids, images).double() - wanted).abs().max() < 1e-5
    assert (made.ours.logits(ids, images.flip(0)).double() - wanted).abs().max() > 1e-3


def test_every_tensor_comes_back(made: Made, tmp_path: Path) -> None:
    imported = read_hf(made.hf)
    assert (imported.recipe, imported.notes) == (made.recipe, [])
    assert made.is_same(imported.state)
    from_hf(made.hf, tmp_path / "run")
    checkpoint = tmp_path / "run/checkpoints/step_00000000"
    assert verify(checkpoint, made.hf) == []
    assert cli.main(["convert", "to-hf", str(checkpoint), str(tmp_path / "hf"), "--format", "llava_llama"]) == 0
    for path in made.hf.rglob("*.safetensors"):
        assert (tmp_path / "hf" / path.relative_to(made.hf)).read_bytes() == path.read_bytes()


def test_names_and_fields(made: Made) -> None:
    sequence = {"linear": [""], "mlp2x_gelu": [".0", ".2"], "mlp2x_gelu_Norm": [".0", ".1", ".3", ".4"]}[made.kind]
    tensors = load_file(made.hf / "model.safetensors")
    wanted = {f"model.mm_projector{place}.{part}" for place in sequence for part in ("weight", "bias")}
    assert {name for name in tensors if "mm_projector" in name} == wanted
    fields = {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava" if made.kind.endswith("Norm") else "llava_llama",
        "mm_vision_tower": "./vit/clip",
        "mm_hidden_size": 24,
        "mm_projector_type": made.kind,
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": False,
        "image_aspect_ratio": "pad",
        "use_mm_proj": True,
    }
    assert {key: made.config[key] for key in fields} == fields
    # The names that the transformers of those releases reads.
    assert all(name.startswith("vision_model.") for name in load_file(made.hf / "vit/clip/model.safetensors"))
    processor = json.loads((made.hf / "vit/clip/preprocessor_config.json").read_text())
    assert (processor["image_processor_type"], processor["do_pad"]) == ("CLIPImageProcessor", False)
    assert processor["size"] == {"shortest_edge": 16}  # an old CLIPImageProcessor knows no other


def test_a_published_directory(made: Made, tmp_path: Path) -> None:
    """Yi-VL's: no recipe of ours, and the encoder's folder."""
    imported = read_hf(made.bare(tmp_path))
    model = imported.recipe.model
    assert model.special == tables.Special(pad=2, bos=1, eos=2, image=0)
    assert model == dataclasses.replace(made.recipe.model, special=model.special)
    assert (imported.recipe.data.fit, imported.recipe.data.interpolation) == ("pad", "cubic")
    assert made.is_same(imported.state)
    assert imported.notes == ["it has no token for pictures: model.special.image is 0, <unk>, and pad 2"]


def test_a_published_directory_of_many_image_tokens(tmp_path: Path) -> None:
    """More than a recipe's usual length, as Yi-VL has; in bf16, with the fp32 buffers of old code."""
    encoder = dataclasses.replace(CLIP, image_size=132)
    changes = {"encoders": (encoder,), "backbone": dataclasses.replace(LLAMA, max_position=4096)}
    made = Made(tmp_path, "linear", "bf16", **changes | {"connector": tables.Linear(type="linear", grid=33)})
    hf = made.bare(tmp_path)
    tensors = load_file(hf / "model.safetensors") | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(tensors, hf / "model.safetensors")
    from_hf(hf, tmp_path / "run")
    recipe = mmoe.load(tmp_path / "run/checkpoints/step_00000000").recipe
    assert (recipe.data.sequence_length, recipe.precision.dtype) == (2 * 33**2, "bf16")
    assert verify(tmp_path / "run/checkpoints/step_00000000", hf) == []


@pytest.mark.parametrize("shape", ["square", None])
def test_pictures_as_processed(yi_vl: Made, tmp_path: Path, shape: str | None) -> None:
    assert read_hf(yi_vl.bare(tmp_path, image_aspect_ratio=shape)).recipe.data.fit == "crop"


@pytest.mark.parametrize(("fit", "refused"), [("crop", False), ("stretch", True)])
def test_pictures_that_are_not_padded(
    yi_vl: Made, tmp_path: Path, fit: Any, refused: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = dataclasses.replace(yi_vl.recipe, data=dataclasses.replace(yi_vl.recipe.data, fit=fit))
    to_hf(tmp_path, tmp_path / "hf", form="llava_llama", load=lambda _: (recipe, yi_vl.state, yi_vl.tokenizer))
    assert ("an old CLIPImageProcessor may refuse" in capsys.readouterr().out) == refused
    (tmp_path / "hf/mmoe_recipe.toml").unlink()
    assert json.loads((tmp_path / "hf/config.json").read_text())["image_aspect_ratio"] == "square"
    assert read_hf(tmp_path / "hf").recipe.data.fit == fit


def test_parts(made: Made, tmp_path: Path) -> None:
    """LLaVA's: the encoder is elsewhere."""
    hf = made.bare(tmp_path, mm_vision_tower="openai/clip-vit-large-patch14-336")
    (hf / "vit").rename(tmp_path / "vit")
    with pytest.raises(UserError, match=r"'openai/clip.*mmoe convert from-parts RECIPE OUT .* encoders\.NAME=DIR"):
        read_hf(hf)
    with pytest.raises(UserError, match=r"it has no encoder.*give encoders\.clip the directory of that"):
        read_parts(made.recipe, [("encoders.clip", hf)])
    parts = [("connector", hf), ("language", hf), ("encoders.clip", tmp_path / "vit/clip")]
    imported = read_parts(made.recipe, parts)
    assert imported.notes == []
    assert imported.tokenizer == hf / "tokenizer.json"
    assert made.is_same(imported.state)


def test_parts_of_a_directory_with_its_encoder(yi_vl: Made) -> None:
    imported = read_parts(yi_vl.recipe, [(part, yi_vl.hf) for part in ("connector", "language", "encoders.clip")])
    assert imported.notes == []
    assert yi_vl.is_same(imported.state)


def test_a_tower_that_is_stored_with_the_rest(yi_vl: Made, tmp_path: Path) -> None:
    hf = yi_vl.bare(tmp_path, mm_vision_tower="openai/clip")
    tower = load_file(hf / "vit/clip/model.safetensors")
    changed = {name: tensor + 1 for name, tensor in tower.items()}
    buffers = {
        f"{STORED}embeddings.position_ids": torch.arange(17)[None],
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
    }
    stored = {f"model.vision_tower.vision_tower.{name}": tensor for name, tensor in changed.items()} | buffers
    save_file(load_file(hf / "model.safetensors") | stored, hf / "model.safetensors")
    with pytest.raises(UserError, match=r"encoders\.NAME=\S*/bare"):
        read_hf(hf)
    every = [(part, hf) for part in ("connector", "language", "encoders.clip")]
    imported = read_parts(yi_vl.recipe, every)
    name = "encoders.clip.blocks.0.query.weight"
    assert torch.equal(imported.state[name], yi_vl.state[name] + 1)
    assert torch.equal(imported.state["connector.norms.1.bias"], yi_vl.state["connector.norms.1.bias"])
    assert imported.notes == [
        f"language: left aside in {hf}: model.layers.*.self_attn.rotary_emb.inv_freq",
        "encoders.clip: nothing there tells of its heads, activation and epsilon: taken to be the recipe's",
        f"encoders.clip: left aside in {hf}: vision_model.embeddings",
    ]
    # The released code loads the folder over what is stored, unless the tower was trained along.
    (hf / "config.json").write_text(json.dumps(yi_vl.config))
    for imported in (read_hf(hf), read_parts(yi_vl.recipe, every)):
        assert torch.equal(imported.state[name], yi_vl.state[name])
    assert "left aside" in read_hf(hf).notes[-1]
    (hf / "config.json").write_text(json.dumps(yi_vl.config | {"unfreeze_mm_vision_tower": True}))
    with pytest.raises(UserError, match=r"was trained \(unfreeze_mm_vision_tower\).* in clip .*from-parts"):
        read_hf(hf)
    assert torch.equal(read_parts(yi_vl.recipe, every).state[name], yi_vl.state[name] + 1)
    save_file(load_file(hf / "model.safetensors") | {f"{STORED}more": torch.zeros(1)}, hf / "model.safetensors")
    with pytest.raises(UserError, match=r"has unread tensor vision_model\.more"):
        read_parts(yi_vl.recipe, every)


def test_tokens_around_pictures_are_told_of(yi_vl: Made, tmp_path: Path) -> None:
    hf = yi_vl.bare(tmp_path, mm_use_im_start_end=True)
    assert any("between <im_start> and <im_end>" in note for note in read_hf(hf).notes)


def test_transformers_own_llava_is_another_layout() -> None:
    assert llava_llama.is_release({"model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"]})
    assert llava_llama.is_release({"model_type": "llava_llama"})
    assert not llava_llama.is_release({"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"]})
    assert not llava_llama.is_release({"model_type": "llava", "architectures": "LlavaLlamaForCausalLM"})


def test_generate_names_the_way(made: Made, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"layout of a release.*mmoe convert from-hf .*then generate from OUT"):
        generate(made.hf, "how many zebras ?", [])
    from_hf(made.hf, tmp_path / "run")
    checkpoint = tmp_path / "run/checkpoints/step_00000000"
    assert generate(checkpoint, "how many", [], max_tokens=2) == generate(
        made.hf / "language", "how many", [], max_tokens=2
    )
