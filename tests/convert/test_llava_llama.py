"""The layout of released LLaVAs and Yi-VLs: directories against the parts of transformers that they are made of and the
released projectors (haotian-liu/LLaVA and 01-ai/Yi, ``multimodal_projector/builder.py``), written out."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import exporting
import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmoe import cli
from mmoe.checkpoint.load import Loaded, weights
from mmoe.convert import from_hf, read_hf, to_hf, verify
from mmoe.convert.families import llava_llama
from mmoe.convert.parts import read_parts
from mmoe.data.tokenizer import train_tokenizer
from mmoe.errors import UserError
from mmoe.evaluate.generate import generate
from mmoe.models.multimodal import build
from mmoe.parallel import engine
from mmoe.recipe import model as tables
from mmoe.recipe.schema import Parallel, Recipe
from mmoe.recipe.tokens import OURS

LLAMA = tables.Llama(
    type="llama",
    vocab_size=300,
    hidden_size=32,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=8,
    ffn_hidden_size=48,
    max_position=128,
)
CLIP = tables.ViT(
    name="clip",
    type="vit",
    image_size=16,
    patch_size=4,
    width=24,
    mlp_width=96,
    layers=3,
    heads=2,
    activation="quick_gelu",
    class_token=True,
    pre_norm=True,
    patch_bias=False,
    feature_layer=-2,
    final_norm=False,
    pooling="norm",
)
CONNECTORS = {
    "linear": tables.Linear(type="linear", grid=4),
    "mlp2x_gelu": tables.MLP(type="mlp", grid=4),
    "mlp2x_gelu_Norm": tables.MLP(type="mlp", grid=4, norm=True),
}
STORED = "model.vision_tower.vision_tower.vision_model."


def recipe_of(**changes: Any) -> Recipe:
    shape = tables.Model(backbone=LLAMA, encoders=(CLIP,), connector=CONNECTORS["mlp2x_gelu_Norm"])
    data = dataclasses.replace(exporting.RECIPE.data, fit="pad", interpolation="cubic")
    return dataclasses.replace(exporting.RECIPE, model=dataclasses.replace(shape, **changes), data=data)


class Made:
    """A random model, and its export."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.kind, self.recipe = kind, recipe_of(connector=CONNECTORS[kind])
        self.tokenizer, self.hf = folder / "tokenizer.json", folder / "hf"
        train_tokenizer(["how many zebras ?"], 300).save(str(self.tokenizer))
        engine.start(Parallel(), seed=0, alone=True)
        network = build(self.recipe)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for tensor in network.parameters():
                tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))
        self.ours, self.state = Loaded(self.recipe, network, self.tokenizer), dict(weights(network))
        to_hf(folder, self.hf, form="llava_llama", load=lambda _: (self.recipe, self.state, self.tokenizer))
        self.config = json.loads((self.hf / "config.json").read_text())

    def bare(self, folder: Path, **changes: Any) -> Path:
        """As it is published: without our recipe."""
        hf = Path(shutil.copytree(self.hf, folder / "bare"))
        (hf / "mmoe_recipe.toml").unlink()
        (hf / "config.json").write_text(json.dumps(self.config | changes))
        return hf

    def is_same(self, state: Any) -> bool:
        return state.keys() == self.state.keys() and all(torch.equal(state[k], part) for k, part in self.state.items())


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


def test_a_published_directory(made: Made, tmp_path: Path) -> None:
    """Yi-VL's: no recipe of ours, and the encoder's folder."""
    imported = read_hf(made.bare(tmp_path))
    model = imported.recipe.model
    assert model.special == tables.Special(pad=2, bos=1, eos=2, image=0)
    assert model == dataclasses.replace(made.recipe.model, special=model.special)
    assert (imported.recipe.data.fit, imported.recipe.data.interpolation) == ("pad", "cubic")
    assert made.is_same(imported.state)
    assert imported.notes == ["it has no token for pictures: model.special.image is 0, <unk>, and pad 2"]


@pytest.mark.parametrize(("shape", "fit"), [("square", "stretch"), (None, "stretch")])
def test_pictures_as_processed(yi_vl: Made, tmp_path: Path, shape: str | None, fit: str) -> None:
    assert read_hf(yi_vl.bare(tmp_path, image_aspect_ratio=shape)).recipe.data.fit == fit


def test_pictures_that_are_cut(yi_vl: Made, tmp_path: Path) -> None:
    recipe = dataclasses.replace(yi_vl.recipe, data=dataclasses.replace(yi_vl.recipe.data, fit="crop"))
    to_hf(tmp_path, tmp_path / "hf", form="llava_llama", load=lambda _: (recipe, yi_vl.state, yi_vl.tokenizer))
    (tmp_path / "hf/mmoe_recipe.toml").unlink()
    assert json.loads((tmp_path / "hf/config.json").read_text())["image_aspect_ratio"] == "square"
    assert read_hf(tmp_path / "hf").recipe.data.fit == "crop"


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
    with pytest.raises(UserError, match="from-parts"):
        read_hf(hf)
    assert torch.equal(read_parts(yi_vl.recipe, every).state[name], yi_vl.state[name] + 1)
    save_file(load_file(hf / "model.safetensors") | {f"{STORED}more": torch.zeros(1)}, hf / "model.safetensors")
    with pytest.raises(UserError, match=r"has unread tensor vision_model\.more"):
        read_parts(yi_vl.recipe, every)


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"connector": tables.MLP(type="mlp", grid=4, newline=True)}, r"model\.connector\.newline"),
        ({"connector": tables.MLP(type="mlp", grid=2)}, r"own grid of 4, not 2 \(model\.connector\.grid\)"),
        ({"connector": exporting.MODEL.connector}, r"model\.connector\.type"),
        ({"backbone": exporting.MODEL.backbone, "moe": exporting.MODEL.moe}, r"model\.backbone\.type"),
        ({"backbone": dataclasses.replace(LLAMA, tied_embeddings=True)}, r"model\.backbone\.tied_embeddings"),
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


def test_tensors_that_are_not_there_or_not_known(made: Made, tmp_path: Path) -> None:
    hf = made.bare(tmp_path)
    tensors = load_file(hf / "model.safetensors")
    save_file(tensors | {"model.mm_projector.7.weight": torch.zeros(1)}, hf / "model.safetensors")
    for read in (lambda: read_hf(hf), lambda: read_parts(made.recipe, [("connector", hf)], made.tokenizer)):
        with pytest.raises(UserError, match=r"has unread tensor model\.mm_projector\.7\.weight"):
            read()
    last = max(name for name in tensors if "mm_projector" in name)
    save_file({name: tensor for name, tensor in tensors.items() if name != last}, hf / "model.safetensors")
    for read in (lambda: read_hf(hf), lambda: read_parts(made.recipe, [("connector", hf)], made.tokenizer)):
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
