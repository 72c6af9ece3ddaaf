"""The released Cambrian-1's layout both ways: what is exported, put together of transformers' parts and the released
arithmetic in float64, computes what our model does."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import exporting
import pytest
import released_sva
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmoe import cli
from mmoe.checkpoint.load import Loaded, weights
from mmoe.convert import from_hf, read_hf, to_hf, verify
from mmoe.convert.families import cambrian
from mmoe.convert.parts import read_parts
from mmoe.data.tokenizer import train_tokenizer
from mmoe.errors import UserError
from mmoe.recipe import model as tables
from mmoe.recipe.schema import Recipe
from mmoe.recipe.tokens import OURS

LLAMA = dataclasses.replace(exporting.LLAMA, layers=4)
CLIP = exporting.CLIP
CONVNEXT = tables.ConvNeXt(
    name="convnext",
    type="convnext",
    image_size=32,
    widths=(8, 16),
    depths=(1, 1),
    feature_stages=(0, 1),
    grid=8,
    pooling="norm",
)
SVA = tables.SVA(
    grid=4,
    width=32,
    heads=16,
    layers=2,
    groups=(2, 4),
    newline=True,
    mask_padding=True,
    inside=tables.Inside(start=1, stride=2, layers=2),
)
MODEL = tables.Model(backbone=LLAMA, encoders=(CLIP, CONVNEXT), connector=SVA)
RECIPE = dataclasses.replace(exporting.RECIPE, model=MODEL, data=dataclasses.replace(exporting.RECIPE.data, fit="pad"))


class Made:
    """A random model, and its export."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer, self.hf = folder / "tokenizer.json", folder / "hf"
        train_tokenizer(["how many zebras ?"], 300).save(str(self.tokenizer))
        network = exporting.scattered(RECIPE)
        self.ours, self.state = Loaded(RECIPE, network, self.tokenizer), dict(weights(network))
        to_hf(folder, self.hf, form="cambrian", load=lambda _: (RECIPE, self.state, self.tokenizer))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("cambrian"))


def features(hf: Path, images: dict[int, Tensor]) -> list[list[Tensor]]:
    """Maps [n, h, h, c] of every encoder, as transformers computes them, fp64."""
    clip = transformers.CLIPVisionModel.from_pretrained(hf / "encoders/clip").double()
    convnext = transformers.ConvNextModel.from_pretrained(hf / "encoders/convnext").double()
    seen = []
    for encoder, theirs in ((CLIP, clip), (CONVNEXT, convnext)):
        mean, std = (torch.tensor(value, dtype=torch.float64)[:, None, None] for value in (encoder.mean, encoder.std))
        pixels = (images[encoder.image_size].double() / 4 + 0.5 - mean) / std
        seen.append(theirs.eval()(pixels, output_hidden_states=True).hidden_states)
    patches = seen[0][CLIP.feature_layer][:, 1:].unflatten(1, (4, 4))
    return [[patches], [state.permute(0, 2, 3, 1) for state in seen[1][-2:]]]


@torch.no_grad()
def released(hf: Path, ids: Tensor, images: dict[int, Tensor], sizes: Tensor) -> Tensor:
    """Logits, from the files of the directory alone."""
    config = json.loads((hf / "config.json").read_text())
    tensors = load_file(hf / "model.safetensors")
    own = {name for name in tensors if cambrian.CONNECTOR.match(name)}
    fields = {key: value for key, value in config.items() if key not in ("architectures", "model_type", "dtype")}
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields)).eval()
    llama.load_state_dict({name: tensor for name, tensor in tensors.items() if name not in own})  # strict: nothing else
    llama = llama.double()
    connector = {name: tensors[name].double() for name in own}
    side = int(config["image_token_len"] ** 0.5)
    settings = {"grid": side, "sides": [int(number**0.5) for number in config["query_num_list"]]}
    settings |= {"layers": config["connector_depth"], "heads": 16, "joint": True, "masked": True}
    settings["scale"] = (config["vision_hidden_size"] // 16) ** -0.5
    grids = [int(number**0.5) for number in config["mm_vision_tower_aux_token_len_list"]]
    maps = features(hf, images)
    made = [
        released_sva.image(connector, [[part[i] for part in parts] for parts in maps], grids, size.tolist(), **settings)
        for i, size in enumerate(sizes)
    ]
    places = (ids == OURS.image).nonzero().view(len(sizes), -1, 2)
    embeddings = llama.get_input_embeddings()(ids)
    for (row, begin), image in zip(places[:, 0].tolist(), made, strict=True):
        embeddings[row, begin : begin + side * (side + 1)] = image["rows"]

    def behind(number: int) -> Callable[..., None]:
        def hook(_module: Any, _inputs: Any, hidden: Tensor) -> None:
            for (row, begin), image in zip(places[:, 0].tolist(), made, strict=True):
                square = hidden[row, begin : begin + side * (side + 1)].view(side, side + 1, -1)
                name = f"model.vision_sampler_layers.{number}.layers.0"
                square[:, :side] = image["ask"](name, square[:, :side].clone())

        return hook

    for number in range(config["num_of_vision_sampler_layers"]):
        layer = config["start_of_vision_sampler_layers"] + number * config["stride_of_vision_sampler_layers"]
        llama.model.layers[layer].register_forward_hook(behind(number))
    return llama(inputs_embeds=embeddings).logits


def test_logits(made: Made) -> None:
    picture = [OURS.image] * MODEL.image_tokens
    ids = torch.tensor([[1, *picture, 40, 50, 60], [1, 70, 80, *picture, 90]])
    generator = torch.Generator().manual_seed(2)
    images = {side: torch.randn(2, 3, side, side, generator=generator) for side in MODEL.image_sizes}
    sizes = torch.tensor([[40, 64], [64, 20]])
    wanted = released(made.hf, ids, images, sizes)
    assert wanted.abs().max() > 0.1
    assert (made.ours.logits(ids, images, sizes).double() - wanted).abs().max() < 1e-5
    flipped = {side: part.flip(0) for side, part in images.items()}
    for other in (made.ours.logits(ids, flipped, sizes), made.ours.logits(ids, images, sizes.flip(0))):
        assert (other.double() - wanted).abs().max() > 1e-3  # pictures and padding are both seen


def test_every_tensor_comes_back(made: Made, tmp_path: Path) -> None:
    imported = read_hf(made.hf)
    assert imported.recipe == RECIPE
    assert imported.state.keys() == made.state.keys()
    assert all(torch.equal(imported.state[name], tensor) for name, tensor in made.state.items())
    from_hf(made.hf, tmp_path / "run")
    checkpoint = tmp_path / "run/checkpoints/step_00000000"
    assert verify(checkpoint, made.hf) == []
    assert cli.main(["convert", "to-hf", str(checkpoint), str(tmp_path / "hf"), "--format", "cambrian"]) == 0
    for path in made.hf.rglob("*.safetensors"):
        assert (tmp_path / "hf" / path.relative_to(made.hf)).read_bytes() == path.read_bytes()


def test_the_tokens_of_its_language_model() -> None:
    special = tables.Special(pad=10, bos=11, eos=12, image=13)
    config = cambrian.to_config(dataclasses.replace(MODEL, special=special), "float32")
    assert {name: config[f"{name}_token_id"] for name in ("pad", "bos", "eos")} == {"pad": 10, "bos": 11, "eos": 12}


def test_its_code_pads_in_the_colour_of_each_encoder(made: Made, tmp_path: Path, capsys) -> None:
    tinted = (dataclasses.replace(CLIP, mean=(0.25, 0.5, 0.75)), dataclasses.replace(CONVNEXT, mean=(0.5, 0.25, 0.5)))
    recipe = dataclasses.replace(RECIPE, model=dataclasses.replace(MODEL, encoders=tinted))
    to_hf(tmp_path, tmp_path / "hf", form="cambrian", load=lambda _: (recipe, made.state, made.tokenizer))
    noted = [line for line in capsys.readouterr().out.splitlines() if "pads with" in line]
    colours = {"clip": [63, 127, 191], "convnext": [127, 63, 127]}
    assert noted == [
        f"{name}: the released code pads with image_mean, {colour} of 255; training padded with gray, 127.5"
        for name, colour in colours.items()
    ]


def bare(made: Made, folder: Path) -> Path:
    """As it is published: without encoders, and without our recipe."""
    hf = Path(shutil.copytree(made.hf, folder / "bare"))
    shutil.rmtree(hf / "encoders")
    (hf / "mmoe_recipe.toml").unlink()
    return hf


def test_a_released_directory_and_its_encoders(made: Made, tmp_path: Path) -> None:
    hf = bare(made, tmp_path)
    with pytest.raises(UserError, match=r"no encoders in it.*mmoe convert from-parts RECIPE OUT --part connector="):
        read_hf(hf)
    given = [(f"encoders.{name}", made.hf / "encoders" / name) for name in ("clip", "convnext")]
    imported = read_parts(RECIPE, [("connector", hf), ("language", hf), *given])
    assert imported.notes == []
    config = json.loads((hf / "config.json").read_text()) | {
        "mm_vision_tower_aux_list": ["openai/clip", "convnext-XXL"]
    }
    (hf / "config.json").write_text(json.dumps(config))
    (note,) = read_parts(RECIPE, [("connector", hf), *given], made.tokenizer).notes[:1]
    assert note.startswith(
        "connector: made for the encoders openai/clip, convnext-XXL, the recipe's are clip, convnext"
    )
    assert imported.tokenizer == hf / "tokenizer.json"
    assert all(torch.equal(imported.state[name], tensor) for name, tensor in made.state.items())


def test_a_convnext_of_open_clip_goes_in_timms_layout(made: Made, tmp_path: Path) -> None:
    """transformers' has another epsilon."""
    encoders = (CLIP, dataclasses.replace(CONVNEXT, norm_eps=1e-5))
    recipe = dataclasses.replace(RECIPE, model=dataclasses.replace(MODEL, encoders=encoders))
    to_hf(tmp_path, tmp_path / "hf", form="cambrian", load=lambda _: (recipe, made.state, made.tokenizer))
    config = json.loads((tmp_path / "hf/encoders/convnext/config.json").read_text())
    sizes = {"depths": [1, 1], "dims": [8, 16], "patch_size": 4}
    assert config["model_args"] == {**sizes, "norm_eps": 1e-5}
    state = read_hf(tmp_path / "hf").state
    assert all(torch.equal(state[name], tensor) for name, tensor in made.state.items())
    with pytest.raises(UserError, match=r"norm_eps is 1e-05, model\.encoders\.1\.norm_eps is 1e-06 by the recipe"):
        read_parts(RECIPE, [("encoders.convnext", tmp_path / "hf/encoders/convnext")], made.tokenizer)


def changed(**changes: Any) -> Recipe:
    return dataclasses.replace(RECIPE, model=dataclasses.replace(MODEL, **changes))


@pytest.mark.parametrize(
    ("recipe", "where"),
    [
        (changed(connector=dataclasses.replace(SVA, heads=8)), r"it has 16 there, not 8 \(model\.connector\.heads\)"),
        (changed(connector=dataclasses.replace(SVA, mixing="sep")), r"model\.connector\.mixing"),
        (changed(connector=dataclasses.replace(SVA, scale="width")), r"model\.connector\.scale"),
        (changed(connector=dataclasses.replace(SVA, newline=False)), r"model\.connector\.newline"),
        (changed(connector=dataclasses.replace(SVA, mask_padding=False)), r"model\.connector\.mask_padding"),
        (changed(connector=tables.MLP(type="mlp", grid=4), encoders=(CLIP,)), r"model\.connector\.type"),
        (changed(backbone=exporting.MODEL.backbone, moe=exporting.MODEL.moe), r"model\.backbone\.type"),
        (changed(backbone=dataclasses.replace(LLAMA, tied_embeddings=True)), r"model\.backbone\.tied_embeddings"),
        (changed(encoders=(CLIP, exporting.MODEL.encoders[1])), r"model\.encoders\.1\.type"),
        (
            changed(encoders=(dataclasses.replace(CLIP, registers=2), CONVNEXT)),
            r"registers = 2 \(model\.encoders, cl",
        ),
    ],
)
def test_what_is_no_cambrian_is_refused(made: Made, tmp_path: Path, recipe: Recipe, where: str) -> None:
    with pytest.raises(UserError, match=where):
        to_hf(tmp_path, tmp_path / "hf", form="cambrian", load=lambda _: (recipe, made.state, made.tokenizer))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"connector_depth": 3}, r"connector_depth is 3, model\.connector\.layers makes it 2 by the recipe"),
        ({"vision_hidden_size": 10**12}, r"vision_hidden_size is 1000000000000, model\.connector\.width makes it 32"),
        ({"query_num_list": [4, 9]}, r"query_num_list is \[4, 9\], model\.connector\.groups makes it \[4, 16\]"),
        ({"num_of_vision_sampler_layers": 1}, r"model\.connector\.inside\.layers makes it 2"),
        ({"stride_of_vision_sampler_layers": 1}, r"model\.connector\.inside\.stride makes it 2"),
        ({"connector_only": True}, r"connector_only is True, model\.connector\.inside"),
        ({"mm_vision_tower_aux_token_len_list": [16]}, r"model\.encoders\.grid makes it \[16, 64\]"),
        ({"mm_vision_tower_aux_list": ["a"]}, r"mm_vision_tower_aux_list is \['a'\], the recipe has 2 model\.encoders"),
        ({"mm_vision_tower_aux_list": 3}, "mm_vision_tower_aux_list is 3"),
        ({"mm_projector_type": "linear"}, "mm_projector_type is 'linear'"),
    ],
)
def test_a_configuration_of_another_connector(made: Made, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    hf = bare(made, tmp_path)
    config = json.loads((hf / "config.json").read_text()) | change
    (hf / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        read_parts(RECIPE, [("connector", hf)], made.tokenizer)


def test_tensors_that_are_not_there_or_not_known(made: Made, tmp_path: Path) -> None:
    hf = bare(made, tmp_path)
    tensors = load_file(hf / "model.safetensors")
    tuned = {"model.vision_tower_aux_list.0.vision_tower.a": torch.zeros(1)}
    save_file(tensors | tuned, hf / "model.safetensors")
    with pytest.raises(UserError, match=r"has unread tensor model\.vision_tower_aux_list\.0"):
        read_parts(RECIPE, [("language", hf)])
    save_file({k: v for k, v in tensors.items() if k != "model.image_newline"}, hf / "model.safetensors")
    with pytest.raises(UserError, match=r"lacks tensor model\.image_newline"):
        read_parts(RECIPE, [("connector", hf)], made.tokenizer)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("ffn_hidden_size = 48", "ffn_hidden_size = 1000000000", "sizes up to 1000000000"),
        ("layers = 4", "layers = 1000000000", "it tells of 100000000[0-9] layers"),
        ("kv_heads = 2", "kv_heads = 4", r"num_key_value_heads is 2, model\.backbone\.kv_heads is 4 by the recipe"),
        ("heads = 16", "heads = 8", r"its recipe is none of a Cambrian-1.*model\.connector\.heads"),
    ],
)
def test_a_recipe_that_the_weights_do_not_fill(
    made: Made, tmp_path: Path, before: str, after: str, message: str
) -> None:
    hf = Path(shutil.copytree(made.hf, tmp_path / "hf"))
    recipe = hf / "mmoe_recipe.toml"
    assert before in recipe.read_text()
    recipe.write_text(recipe.read_text().replace(before, after, 1))
    with pytest.raises(UserError, match=message):
        read_hf(hf)


def test_an_encoder_of_another_kind(made: Made, tmp_path: Path) -> None:
    hf = Path(shutil.copytree(made.hf, tmp_path / "hf"))
    shutil.rmtree(hf / "encoders/clip")
    (hf / "encoders/clip").symlink_to(hf / "encoders/convnext")
    with pytest.raises(UserError, match=r"it is a convnext, model\.encoders\.0\.type is 'vit'"):
        read_hf(hf)
    (hf / "encoders/clip").unlink()
    with pytest.raises(UserError, match=r"no \.safetensors files"):
        read_hf(hf)
