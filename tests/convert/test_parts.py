"""Checkpoints put together of published parts: tiny random ones, as transformers saves them."""

import dataclasses
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from published import LLAMA, LONGCAT, MOE, SVA, TOWERS, Parts, save
from safetensors.torch import load_file, save_file
from towers import TIMM, OpenClip, Pair, their_maps

import mmoe
from mmoe import cli
from mmoe.checkpoint.load import hand_over, weights
from mmoe.convert import to_hf
from mmoe.convert.families import llama, longcat, vision
from mmoe.convert.parts import from_parts, read_parts
from mmoe.data.tokenizer import train_tokenizer
from mmoe.errors import UserError
from mmoe.models.encoders.vit import resize_position
from mmoe.models.multimodal import build, build_stages
from mmoe.parallel import engine
from mmoe.recipe import load_recipe
from mmoe.recipe import model as tables
from mmoe.recipe.model import MTP
from mmoe.recipe.schema import Parallel, Recipe


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    return Parts(tmp_path_factory.mktemp("parts"))


def first(recipe: Recipe) -> dict[str, torch.Tensor]:
    """What `mmoe train` begins with."""
    engine.start(Parallel(), recipe.train.seed, alone=True)
    return weights(build(recipe))


def test_every_encoder_and_a_language_model(parts: Parts, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Features and logits are transformers', every tensor is the part's bit for bit, and the connector's are those that
    `mmoe train` begins with, which begins with all of them."""
    recipe = parts.recipe(*TOWERS)
    from_parts(recipe, tmp_path / "run", [*parts.given(*TOWERS), ("language", parts["llama"])])
    told = capsys.readouterr().out
    assert "connector: no part is given: the first weights that `mmoe train` begins with (seed 0)\n" in told
    assert re.search(
        r"encoders\.clip: left aside in .*: logit_scale, text_model \(\d+ tensors\), text_projection", told
    )
    assert re.search(r"encoders\.siglip: left aside in .*: head \(\d+ tensors\)", told)
    assert "encoders.dino: 17 positions are resized to 37, for 48 pixels\n" in told

    checkpoint = tmp_path / "run/checkpoints/step_00000000"
    model = mmoe.load(checkpoint)
    state, begun = weights(model.network), first(recipe)
    for name in TOWERS:
        encoder = parts.encoder(name)
        theirs = parts.theirs[name].vision_model if name == "clip" else parts.theirs[name]
        pixels = torch.randn(2, 3, encoder.image_size, encoder.image_size, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            ours = model.network.encoders[name](pixels)
        for a, b in zip(ours, their_maps(Pair(theirs, parts[name], encoder, None), theirs, pixels), strict=True):
            assert a.shape == b.shape
            assert (a - b).abs().max() < 1e-5, name
        own = {k.removeprefix(f"encoders.{name}."): v for k, v in state.items() if k.startswith(f"encoders.{name}.")}
        disk = load_file(parts[name] / "model.safetensors")
        written = dict(vision.table(encoder).write(own))
        if name == "dino":
            there = disk.pop("embeddings.position_embeddings")[0]
            wanted = resize_position(there, encoder)
            assert torch.equal(written.pop("embeddings.position_embeddings")[0], wanted)
        for key, tensor in written.items():
            found = disk[key] if key in disk else disk[f"vision_model.{key}"]
            assert torch.equal(tensor, found.view(tensor.shape)), key
    for key, tensor in llama.table(LLAMA).write({k: v for k, v in state.items() if k.startswith("language.")}).items():
        assert torch.equal(tensor, parts.theirs["llama"].get_parameter(key)), key
    rest = [key for key in state if key.startswith("connector.")]
    assert rest
    assert all(torch.equal(state[key], begun[key]) for key in rest)
    ids = torch.arange(4, 44).view(2, 20)
    with torch.no_grad():
        assert (model.logits(ids) - parts.theirs["llama"](ids).logits).abs().max() < 1e-5

    engine.start(Parallel(), seed=5, alone=True)
    trained = build_stages(recipe)
    hand_over(checkpoint, trained)
    assert all(torch.equal(tensor, state[key]) for key, tensor in weights(trained[0]).items())


@pytest.mark.parametrize("name", ["longcat", "longcat and mtp", "llama", "tied llama"])
def test_first_weights(parts: Parts, name: str) -> None:
    """Of a language model and a connector without a part, and of an encoder beside one that has a part: as training
    begins, though they are drawn apart."""
    backbone = LONGCAT if "longcat" in name else dataclasses.replace(LLAMA, tied_embeddings="tied" in name)
    recipe = parts.recipe("clip", "dino3", backbone=backbone)
    model = dataclasses.replace(recipe.model, mtp=MTP() if "mtp" in name else None)
    recipe = dataclasses.replace(recipe, model=model, train=dataclasses.replace(recipe.train, seed=3))
    made, begun = read_parts(recipe, parts.given("clip"), parts.tokenizer), first(recipe)
    assert made.state.keys() == begun.keys()
    for key, tensor in begun.items():
        assert torch.equal(made.state[key], tensor) != key.startswith("encoders.clip."), key
    again = read_parts(recipe, parts.given("clip"), parts.tokenizer)
    assert made.state.fingerprint() == again.state.fingerprint() is not None  # a broken-off write goes on


def test_longcat(parts: Parts, tmp_path: Path) -> None:
    """And another vocabulary; in bf16 each weight is rounded once, and the router stays as it is."""
    backbone = dataclasses.replace(LONGCAT, vocab_size=304)
    recipe = parts.recipe("siglip", backbone=backbone, connector=tables.MLP(type="mlp", grid=4))
    recipe = dataclasses.replace(recipe, precision=dataclasses.replace(recipe.precision, dtype="bf16"))
    given = [*parts.given("siglip"), ("language", parts["longcat"])]
    from_parts(recipe, tmp_path / "run", given, parts.tokenizer)
    state = mmoe.load(tmp_path / "run/checkpoints/step_00000000").network.state_dict()
    table = longcat.table(LONGCAT, MOE, fused=True)
    source = dict(table.read(parts.theirs["longcat"].state_dict(), "it"))
    for key, tensor in source.items():
        kept = tensor if ".router." in key else tensor.bfloat16()
        assert torch.equal(state[key][: len(tensor)], kept), key
    for key in ("language.embedding.word_embeddings.weight", "language.output_layer.weight"):
        assert torch.equal(state[key][300:], source[key].double().mean(0).bfloat16().expand(4, -1))
    (note,) = [note for note in read_parts(recipe, given, parts.tokenizer).notes if "padded" in note]
    assert note.startswith(
        "language: 300 tokens are padded to model.backbone.vocab_size = 304; each new row is the mean"
    )


def test_modules_of_an_export(parts: Parts, tmp_path: Path) -> None:
    """Each comes out of one of ours, whatever the others are."""
    recipe = parts.recipe("clip", "dino3")
    given = [*parts.given("clip", "dino3"), ("language", parts["llama"])]
    made = read_parts(dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, seed=9)), given)
    to_hf(tmp_path, tmp_path / "hf", load=lambda _: (recipe, made.state, parts.tokenizer))
    back = read_parts(recipe, [(module, tmp_path / "hf") for module in ("connector", "encoders.dino3", "language")])
    begun = first(recipe)
    for key in made.state:
        assert torch.equal(back.state[key], begun[key] if key.startswith("encoders.clip.") else made.state[key]), key
    clip, dino = recipe.model.encoders
    gray = dataclasses.replace(clip, mean=(0.5, 0.5, 0.5))
    other = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, encoders=(gray, dino)))
    told = read_parts(other, [("encoders.clip", tmp_path / "hf")], parts.tokenizer).notes
    assert any(
        re.match(r"encoders\.clip: image_mean is \[0\.48.*there, \[0\.5, 0\.5, 0\.5\] by the recipe", note)
        for note in told
    )
    turned = parts.recipe("dino3", "clip")  # of the same shapes: places alone tell whose projector is whose
    with pytest.raises(
        UserError, match=r"connector is made for the encoders clip, dino3, the recipe's are dino3, clip"
    ):
        read_parts(turned, [("connector", tmp_path / "hf")], parts.tokenizer)
    other = dataclasses.replace(recipe.model, connector=dataclasses.replace(SVA, heads=4))
    with pytest.raises(UserError, match=r"heads is 2, model\.connector\.heads is 4 by the recipe"):
        read_parts(dataclasses.replace(recipe, model=other), [("connector", tmp_path / "hf")], parts.tokenizer)


def open_clip(folder: Path, **changes: Any) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    tower = OpenClip(width=32, heads=2, mlp_width=64, layers=2, grid=4, patch=8).state_dict()
    tensors = {f"visual.{name}": tensor for name, tensor in tower.items()}
    folder.mkdir()
    save_file(
        tensors | {"logit_scale": torch.zeros(1), "token_embedding.weight": torch.zeros(2, 2)}, folder / "m.safetensors"
    )
    tower_config = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "mlp_ratio": 2.0}
    config = {"model_cfg": {"vision_cfg": tower_config | changes, "quick_gelu": False}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return tower


def test_open_clip_and_timm(parts: Parts, tmp_path: Path) -> None:
    tower = open_clip(tmp_path / "vit")
    fields = {"layers": 2, "mlp_width": 64, "activation": "gelu", "image_size": 48, "grid": 4}
    vit = dataclasses.replace(parts.encoder("clip"), name="vit", **fields)
    recipe = parts.recipe("convnext")
    both = dataclasses.replace(recipe.model, encoders=(vit, *recipe.model.encoders))
    recipe = dataclasses.replace(recipe, model=both)
    disk = load_file(parts["convnext"] / "model.safetensors")
    names = {name: name for name in disk}
    for pattern, new in TIMM:
        names = {name: re.sub(pattern, new, mine) for name, mine in names.items()}
    (tmp_path / "timm").mkdir()
    trunk = {f"visual.trunk.{names[name]}": tensor for name, tensor in disk.items()}
    save_file(
        trunk | {"text.a": torch.zeros(1), "visual.head.proj.weight": torch.zeros(1)}, tmp_path / "timm/m.safetensors"
    )
    given = [("encoders.vit", tmp_path / "vit"), ("encoders.convnext", tmp_path / "timm")]
    made = read_parts(recipe, given, parts.tokenizer)
    assert made.notes[:4] == [
        "encoders.vit: 17 positions are resized to 37, for 48 pixels",
        f"encoders.vit: left aside in {tmp_path / 'vit'}: logit_scale, token_embedding, visual.proj",
        "encoders.convnext: nothing there tells of its LayerNorms' epsilon: taken to be the recipe's",
        f"encoders.convnext: left aside in {tmp_path / 'timm'}: text, visual.head",
    ]
    rows = tower["transformer.resblocks.1.attn.in_proj_weight"]
    assert torch.equal(made.state["encoders.vit.blocks.1.key.weight"], rows[32:64])
    wanted = resize_position(tower["positional_embedding"], vit)
    assert torch.equal(made.state["encoders.vit.position"], wanted)
    state = vision.table(parts.encoder("convnext"), ours="encoders.convnext.").read(disk, "it")
    assert all(torch.equal(made.state[key], state[key]) for key in state)
    changes: list[tuple[dict[str, Any], str]] = [
        ({"head_width": 8}, r"width / head_width is 4, model\.encoders\.0\.heads is 2 by the recipe"),
        (
            {"norm_kwargs": {"eps": 1e-6}},
            r"norm_kwargs\.eps is 1e-06, model\.encoders\.0\.norm_eps is 1e-05 by the recipe",
        ),
        ({"width": 10**400}, "width is 1000.*give one of OpenCLIP's"),
        ({"mlp_ratio": float("-inf")}, "mlp_ratio -inf"),
    ]
    for number, (change, message) in enumerate(changes):
        open_clip(tmp_path / f"other{number}", **change)
        with pytest.raises(UserError, match=message):
            read_parts(recipe, [("encoders.vit", tmp_path / f"other{number}")], parts.tokenizer)


def test_names_out_of_files_are_text(parts: Parts, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    open_clip(tmp_path / "vit")
    save_file({"\x1b]0;title\x07.a": torch.zeros(1)}, tmp_path / "vit/more.safetensors")
    fields = {"layers": 2, "mlp_width": 64, "activation": "gelu"}
    vit = dataclasses.replace(parts.encoder("clip"), name="vit", **fields)
    recipe = parts.recipe("clip")
    recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, encoders=(vit,)))
    from_parts(recipe, tmp_path / "run", [("encoders.vit", tmp_path / "vit")], parts.tokenizer)
    told = capsys.readouterr().out
    assert "\\x1b]0;title\\x07" in told
    assert "\x1b" not in told


def change(directory: Path, config: dict[str, Any] | None = None, **tensors: torch.Tensor | None) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | (config or {})))
    found = load_file(directory / "model.safetensors") | tensors
    save_file({name: tensor for name, tensor in found.items() if tensor is not None}, directory / "model.safetensors")


def test_buffers_and_heads_are_left_aside(parts: Parts, tmp_path: Path) -> None:
    """As old checkpoints have them, integers among them; pixels normalised in another way are told of."""
    hf, tower = (Path(shutil.copytree(parts[name], tmp_path / name)) for name in ("llama", "convnext"))
    change(hf, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    inside = {f"convnext.{name}": tensor for name, tensor in load_file(tower / "model.safetensors").items()}
    save_file(inside | {"classifier.weight": torch.ones(2, 16, dtype=torch.int64)}, tower / "model.safetensors")
    (tower / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.1, 0.2, 0.3]}))
    tokens = json.loads((hf / "tokenizer.json").read_text()) | {"normalizer": {"type": "Lowercase"}}
    (hf / "tokenizer.json").write_text(json.dumps(tokens))
    made = read_parts(parts.recipe("convnext"), [("encoders.convnext", tower), ("language", hf)])
    assert made.notes[0].startswith("encoders.convnext: image_mean is [0.1, 0.2, 0.3] there, [0.485, 0.456, 0.406] by")
    assert f"encoders.convnext: left aside in {tower}: classifier" in made.notes
    assert f"language: left aside in {hf}: model.layers.*.self_attn.rotary_emb.inv_freq" in made.notes
    assert "with (no tokenizer to train with: its normalizer has a Lowercase: take" in made.notes[-1]
    before = read_parts(parts.recipe("convnext"), [*parts.given("convnext"), ("language", parts["llama"])]).state
    assert all(torch.equal(made.state[key], before[key]) for key in before)


@pytest.mark.parametrize(
    ("module", "name", "config", "tensors", "message"),
    [
        ("encoders.dino3", "dino3", {"hidden_size": 64}, {}, r"hidden_size is 64, model\.encoders\.0\.width is 32 by"),
        ("encoders.dino3", "dino3", {"hidden_act": "gelu_pytorch_tanh"}, {}, "hidden_act is 'gelu_tanh', model"),
        ("encoders.dino3", "dino3", {"num_hidden_layers": 10**9}, {}, "num_hidden_layers is 1000000000, model"),
        ("encoders.dino3", "siglip", {}, {}, "hidden_act is 'gelu_tanh', model"),
        ("encoders.dino3", "convnext", {}, {}, r"it is a convnext, model\.encoders\.0\.type is 'vit'"),
        ("encoders.dino3", "llama", {}, {}, "model_type is 'llama'"),
        ("encoders.dino3", "dino3", {}, {"extra.weight": torch.zeros(1)}, r"has unread tensor extra\.weight"),
        ("encoders.dino3", "dino3", {}, {"norm.weight": None}, r"lacks tensor norm\.weight"),
        ("encoders.dino3", "dino3", {}, {"norm.weight": torch.zeros(32).int()}, r"norm\.weight is torch\.int32"),
        (
            "encoders.dino3",
            "dino3",
            {},
            {"norm.weight": torch.zeros(31)},
            r"norm\.weight is \[31\], by the recipe \[32\]",
        ),
        ("language", "llama", {"num_attention_heads": 2}, {}, r"num_attention_heads is 2, model\.backbone\.heads is 4"),
        ("language", "llama", {"vocab_size": 400}, {}, r"vocab_size is 400, model\.backbone\.vocab_size is 300 by the"),
        ("language", "llama", {"vocab_size": 200}, {}, r"vocab_size is 200, language\.\S+ is \[300, 32\]"),
        ("language", "llama", {}, {"model.norm.bias": torch.zeros(1)}, r"has unread tensor model\.norm\.bias"),
        ("language", "longcat", {}, {}, r"it is a longcat, model\.backbone\.type is 'llama'"),
        ("language", "dino3", {}, {}, "model_type is 'dinov3_vit'"),
        ("connector", "llama", {}, {}, "model_type is 'llama'.*a connector comes of one of mmoe, llava"),
        ("encoders.other", "dino3", {}, {}, "no module 'encoders.other'.*encoders.dino3, connector, language"),
    ],
)
def test_a_part_that_does_not_fit(
    parts: Parts, tmp_path: Path, module: str, name: str, config: dict, tensors: dict, message: str
) -> None:
    hf = Path(shutil.copytree(parts[name], tmp_path / "hf"))
    change(hf, config, **tensors)
    with pytest.raises(UserError, match=message):
        from_parts(parts.recipe("dino3"), tmp_path / "run", [(module, hf)], parts.tokenizer)
    assert not (tmp_path / "run").exists()


def test_sizes_that_the_tensors_cannot_fill(parts: Parts, tmp_path: Path) -> None:
    hf = Path(shutil.copytree(parts["dino"], tmp_path / "hf"))
    for side, message in ((10**12, "image_size is 1000000000000"), (64, "positions|shapes that do not make up")):
        change(hf, {"image_size": side})
        with pytest.raises(UserError, match=message):
            read_parts(parts.recipe("dino"), [("encoders.dino", hf)], parts.tokenizer)


def test_nothing_elsewhere_is_read(parts: Parts, tmp_path: Path) -> None:
    """Not what an index names, no pickles, and what a link leads to only if it is a file."""
    hf = Path(shutil.copytree(parts["dino3"], tmp_path / "hf"))
    recipe = parts.recipe("dino3")
    index = {"weight_map": {"norm.weight": "../../outside.safetensors", "norm.bias": "/etc/passwd"}}
    (hf / "model.safetensors.index.json").write_text(json.dumps(index))
    assert read_parts(recipe, [("encoders.dino3", hf)], parts.tokenizer).state
    (hf / "model.safetensors").rename(tmp_path / "blob")
    (hf / "model.safetensors").symlink_to(tmp_path / "blob")  # as in the hub's cache
    assert read_parts(recipe, [("encoders.dino3", hf)], parts.tokenizer).state
    (hf / "model.safetensors").unlink()
    os.mkfifo(tmp_path / "fifo")
    (hf / "model.safetensors").symlink_to(tmp_path / "fifo")
    with pytest.raises(UserError, match="it is no regular file"):
        read_parts(recipe, [("encoders.dino3", hf)], parts.tokenizer)
    (hf / "model.safetensors").unlink()
    torch.save({"a": print}, hf / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"no \.safetensors files.*pickles are not read"):
        read_parts(recipe, [("encoders.dino3", hf)], parts.tokenizer)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The stage that is named, on the shipped recipe; its run begins with what was written."""
    recipe = load_recipe("llava_tiny").stages[1]
    backbone, (encoder,) = recipe.model.backbone, recipe.model.encoders
    assert isinstance(backbone, tables.Llama)
    assert isinstance(encoder, tables.ViT)
    tower = transformers.AutoConfig.for_model(
        **{k: v for k, v in vision.to_config(encoder).items() if k != "architectures"}
    )
    text = transformers.LlamaConfig.from_dict(llama.to_config(backbone, "float32"))
    clip = save(transformers.CLIPVisionModel(tower), tmp_path / "clip")
    save(transformers.LlamaForCausalLM(text), tmp_path / "vicuna")
    train_tokenizer(["how many zebras ?"], 300).save(str(tmp_path / "tokenizer.json"))
    command = ["convert", "from-parts", "llava_tiny", str(tmp_path / "run"), "--stage", "align"]
    command += ["--part", f"encoders.clip={tmp_path / 'clip'}", f"language={tmp_path / 'vicuna'}"]
    root = ["--set", f"data.root={tmp_path / 'none'}"]
    assert cli.main([*command, *root]) == 2
    assert "no tokenizer.json" in capsys.readouterr().err
    assert cli.main([*command[:-1], "--tokenizer", str(tmp_path / "tokenizer.json")]) == 0
    assert "language: no part is given" in capsys.readouterr().out
    checkpoint = tmp_path / "run/checkpoints/step_00000000"
    assert load_recipe(checkpoint / "recipe.toml") == recipe
    engine.start(Parallel(), seed=0, alone=True)
    (network,) = build_stages(recipe)
    hand_over(checkpoint, [network])
    assert torch.equal(
        network.encoders["clip"].blocks[0].query.weight,
        clip.state_dict()[
            next(name for name in clip.state_dict() if name.endswith("layers.0.self_attn.q_proj.weight"))
        ],
    )
    assert cli.main([*command, "--part", "language"]) == 2
    assert "'language' is no part" in capsys.readouterr().err


def test_a_full_directory_is_told_before_anything_is_read(parts: Parts, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    broken = tmp_path / "broken"
    broken.mkdir()
    with pytest.raises(UserError, match="is not an empty directory"):
        from_parts(parts.recipe("clip"), tmp_path, [("encoders.clip", broken)], parts.tokenizer)
