"""LLaVA both ways, against transformers' own class on tiny random weights."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models

import mmoe
from mmoe.convert import from_hf, read_hf, to_hf, verify
from mmoe.convert.families import llava
from mmoe.convert.weights import INDEX
from mmoe.data.document import tokenize
from mmoe.data.pixels import preprocess
from mmoe.data.tokenizer import load_tokenizer, train_tokenizer
from mmoe.errors import UserError
from mmoe.evaluate.generate import generate
from mmoe.recipe.model import MLP, Model, Special

TOWER = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
CLIP = transformers.CLIPVisionConfig(**TOWER, intermediate_size=48)
LLAMA = transformers.LlamaConfig(
    vocab_size=300,
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    pad_token_id=0,
)
LONGCAT = transformers.LongcatFlashConfig(
    vocab_size=300,
    hidden_size=32,
    num_layers=2,
    num_attention_heads=2,
    ffn_hidden_size=48,
    q_lora_rank=16,
    kv_lora_rank=8,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    head_dim=4,
    v_head_dim=8,
    n_routed_experts=4,
    zero_expert_num=2,
    moe_topk=2,
    expert_ffn_hidden_size=16,
    max_position_embeddings=128,
    pad_token_id=0,
)
CASES = {
    "clip, llama": (CLIP, LLAMA, {}),
    "siglip, tied llama": (
        transformers.SiglipVisionConfig(**TOWER | {"image_size": 36}, intermediate_size=48),
        transformers.LlamaConfig(**LLAMA.to_diff_dict() | {"tie_word_embeddings": True}),
        {"vision_feature_select_strategy": "full", "vision_feature_layer": -1, "tie_word_embeddings": True},
    ),
    "clip, longcat": (CLIP, LONGCAT, {"vision_feature_layer": 2}),
    "dinov2, llama": (transformers.Dinov2Config(**TOWER), LLAMA, {"vision_feature_layer": 3}),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(["how many zebras ?", " 3", "a frog", "left of"], 300).save(str(path))
    return path


class Made:
    """One of transformers' LLaVAs, saved as it is published, imported, and exported again."""

    def __init__(self, name: str, folder: Path, tokenizer: Path) -> None:
        vision, text, more = CASES[name]
        tokens = (vision.image_size // vision.patch_size) ** 2
        config = transformers.LlavaConfig(
            vision_config=vision, text_config=text, image_token_index=3, image_seq_length=tokens, **more
        )
        torch.manual_seed(0)
        self.theirs = transformers.LlavaForConditionalGeneration(config).eval()
        with torch.no_grad():
            for tensor in self.theirs.parameters():
                tensor.add_(0.05 * torch.randn_like(tensor))
        self.hf, self.back = folder / "hf", folder / "back"
        self.theirs.save_pretrained(self.hf)
        publish(self.hf)
        shutil.copy(tokenizer, self.hf)
        from_hf(self.hf, folder / "run")
        self.checkpoint = folder / "run/checkpoints/step_00000000"
        to_hf(self.checkpoint, self.back)
        self.size, self.tokens = vision.image_size, tokens

    @property
    def ids(self) -> torch.Tensor:
        start = [[1, *[3] * self.tokens, 40, 50, 60], [1, 70, *[3] * self.tokens, 80, 90]]
        return torch.tensor(start)


def publish(folder: Path) -> None:
    """The tensors of a directory under the names of the published models."""
    path = folder / "model.safetensors"
    tensors, kind = load_file(path), json.loads((folder / "config.json").read_text())["vision_config"]["model_type"]
    inner = llava.INNER[kind]
    save_file({k.replace("vision_tower.", f"vision_tower.{inner}"): v for k, v in tensors.items()}, path)


@pytest.fixture(scope="module", params=CASES)
def made(request, tmp_path_factory, tokenizer) -> Made:
    return Made(request.param, tmp_path_factory.mktemp("llava"), tokenizer)


def normalised(made: Made, pixels: torch.Tensor, ids: torch.Tensor | None = None) -> torch.Tensor:
    """Our logits of pixels as transformers' model reads them: ours reads (x/255 − 0.5) · 4 and renormalises it."""
    model = mmoe.load(made.checkpoint)
    (encoder,) = model.recipe.model.encoders
    mean, std = (torch.tensor(value)[:, None, None] for value in (encoder.mean, encoder.std))
    return model.logits(made.ids if ids is None else ids, (pixels * std + mean - 0.5) * 4)


def logits(made: Made, pixels: torch.Tensor) -> torch.Tensor:
    """transformers'."""
    with torch.no_grad():
        return made.theirs(input_ids=made.ids, pixel_values=pixels).logits


def test_logits_and_tokens(made):
    pixels = torch.randn(2, 3, made.size, made.size, generator=torch.Generator().manual_seed(1))
    theirs = logits(made, pixels)
    assert (theirs - logits(made, torch.zeros_like(pixels))).abs().max() > 1e-2
    torch.testing.assert_close(normalised(made, pixels), theirs, atol=1e-5, rtol=0)

    reloaded = transformers.AutoModelForImageTextToText.from_pretrained(made.back).eval()
    assert type(reloaded) is transformers.LlavaForConditionalGeneration
    ids = made.ids[:1]
    written = reloaded.generate(input_ids=ids, pixel_values=pixels[:1], max_new_tokens=4, do_sample=False)
    for _ in range(4):
        ids = torch.cat([ids, normalised(made, pixels[:1], ids)[:, -1].argmax(-1, keepdim=True)], 1)
    assert written.tolist() == ids[:, : written.shape[1]].tolist()


def test_every_tensor_comes_back(made):
    before, after = load_file(made.hf / "model.safetensors"), load_file(made.back / "model.safetensors")
    # No computation reads these of zero experts: they are written as zeros.
    unread = {name for name in before if any(f".experts.{i}." in name for i in (4, 5))}
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before.keys() - unread)
    _, info = transformers.LlavaForConditionalGeneration.from_pretrained(made.back, output_loading_info=True)
    assert not info["unexpected_keys"]
    assert not info["missing_keys"]


def test_names_that_transformers_saves_or_keeps_are_read(made, tmp_path):
    wanted = read_hf(made.hf).state
    shutil.copytree(made.hf, tmp_path / "saved")
    made.theirs.save_pretrained(tmp_path / "saved")
    shutil.copytree(tmp_path / "saved", tmp_path / "kept")
    stored = load_file(tmp_path / "saved/model.safetensors")
    kept = {f"model.{name}": tensor for name, tensor in stored.items() if name.startswith("vision_tower.")}
    names = [name for name in made.theirs.state_dict() if not name.startswith("model.vision_tower.")]
    if made.theirs.config.tie_word_embeddings:
        names.remove("lm_head.weight")
    kept |= {name: made.theirs.state_dict()[name].contiguous() for name in names}
    save_file(kept, tmp_path / "kept/model.safetensors")
    for folder in ("saved", "kept"):
        found = read_hf(tmp_path / folder).state
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.fixture(scope="module")
def one(tmp_path_factory, tokenizer) -> Made:
    return Made("clip, llama", tmp_path_factory.mktemp("one"), tokenizer)


def picture(height: int, width: int) -> Image.Image:
    """Noise under a gradient, eight times as fine as a patch."""
    generator = np.random.default_rng(0)
    coarse = Image.fromarray(generator.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("interpolation", ["triangular", "cubic"])
@pytest.mark.parametrize("fit", ["stretch", "pad", "crop"])
def test_processor_is_the_training_pipeline(one, tokenizer, tmp_path, fit, interpolation):
    """transformers rounds and cuts to 8 bits behind each direction of the resize and pads with 127 for 127.5, here
    pixels stay fractions: half a level each, and what the cubic's overshoot makes of it. At the border the filters
    differ: the outermost pixels are not compared."""
    imported = read_hf(one.hf)
    (encoder,) = imported.recipe.model.encoders
    encoder = dataclasses.replace(encoder, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    recipe = dataclasses.replace(
        imported.recipe,
        model=dataclasses.replace(imported.recipe.model, encoders=(encoder,)),
        data=dataclasses.replace(imported.recipe.data, fit=fit, interpolation=interpolation),
    )
    to_hf(tmp_path, tmp_path / "hf", load=lambda _: (recipe, imported.state, tokenizer))
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "hf")
    assert type(processor) is transformers.LlavaProcessor
    shown = picture(96, 136)
    inputs = processor(text="<image>how many zebras ?", images=shown, return_tensors="pt")
    sample = {"prefix": [{"image": 0}], "branches": [{"prompt": "how many zebras ?", "answer": ""}]}
    tokens = tokenize(sample, load_tokenizer(tokenizer), 16).tokens[:-1]
    assert inputs["input_ids"].tolist() == [tokens.tolist()]
    assert inputs["attention_mask"].all()
    ours = torch.from_numpy(preprocess(shown, (32,), fit, interpolation)[0][32])
    levels = (inputs["pixel_values"][0] - ours) * 255 / 4
    assert levels[:, 2:-2, 2:-2].abs().max() < (2 if fit == "pad" else 1.6)
    again = read_hf(tmp_path / "hf")
    assert (again.recipe.data, again.recipe.model) == (recipe.data, recipe.model)


def test_the_tokenizer_comes_back(one, tokenizer, tmp_path):
    """Data sets record its hash."""
    assert (one.back / "tokenizer.json").read_bytes() != tokenizer.read_bytes()
    assert Tokenizer.from_file(str(one.back / "tokenizer.json")).encode("a frog").ids[0] == 1
    from_hf(one.back, tmp_path / "run")
    assert (tmp_path / "run/checkpoints/step_00000000/tokenizer.json").read_bytes() == tokenizer.read_bytes()


def test_answers_are_the_same_from_either_side(one, tmp_path):
    picture(32, 32).save(tmp_path / "picture.png")
    shown = [tmp_path / "picture.png"]
    answers = [generate(path, "how many zebras ?", shown, max_tokens=4) for path in (one.checkpoint, one.back)]
    assert answers[0] == answers[1]
    alone = [generate(path, "how many", [], max_tokens=4) for path in (one.checkpoint, one.back, one.back / "language")]
    assert alone[0] == alone[1] == alone[2]


def test_configurations_as_published(one, tmp_path):
    """Defaults are left out; the settings of pictures lie in one of two files."""
    shutil.copytree(one.hf, tmp_path / "hf")
    config = json.loads((one.hf / "config.json").read_text())
    for key in ("projector_hidden_act", "multimodal_projector_bias", "vision_feature_layer"):
        del config[key]
    for key in ("num_channels", "hidden_act", "layer_norm_eps", "model_type"):
        del config["vision_config"][key]
    del config["text_config"]["model_type"]
    (tmp_path / "hf/config.json").write_text(json.dumps(config | {"image_token_index": 299}))
    published = {"crop_size": 32, "size": 32, "do_center_crop": True, "do_resize": True, "resample": 3}
    statistics = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (tmp_path / "hf/preprocessor_config.json").write_text(json.dumps(published | statistics))
    imported, plain = read_hf(tmp_path / "hf"), read_hf(one.hf).recipe.model
    assert imported.notes == []
    recipe = imported.recipe
    assert recipe.model.special == Special(pad=0, bos=1, eos=2, image=299)
    assert (recipe.data.fit, recipe.data.interpolation) == ("crop", "cubic")
    (encoder,) = recipe.model.encoders
    assert (encoder.mean, encoder.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert dataclasses.replace(encoder, mean=plain.encoders[0].mean, std=plain.encoders[0].std) == plain.encoders[0]
    nested = {"image_processor": {"image_processor_type": "SiglipImageProcessor", "size": {"height": 32, "width": 32}}}
    (tmp_path / "hf/processor_config.json").write_text(json.dumps(nested))
    assert read_hf(tmp_path / "hf").recipe.data.fit == "stretch"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_std": [0.5, 0.0, 0.5]}, "image_std is"),
        ({"image_mean": [0.5, 0.5]}, "image_mean is"),
        ({"image_mean": [float("nan")] * 3}, "image_mean is|unreadable"),
        ({"do_resize": False}, "do_resize is False"),
        ({"rescale_factor": 1.0}, "rescale_factor is 1.0"),
    ],
)
def test_settings_of_pictures_that_cannot_be(one, tmp_path, settings, message):
    shutil.copytree(one.hf, tmp_path / "hf")
    (tmp_path / "hf/preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=message):
        read_hf(tmp_path / "hf")


def test_a_tokenizer_of_another_kind_names_its_own_tokens(one, tmp_path):
    """As Llama's, which ends right before the token of a picture."""
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, "<0x00>": 3, "how": 4}
    Tokenizer(models.WordLevel(words, "<unk>")).save(str(tmp_path / "tokenizer.json"))
    shutil.copytree(one.hf, tmp_path / "published")
    config = json.loads((one.hf / "config.json").read_text()) | {"image_token_index": 5}
    (tmp_path / "published/config.json").write_text(json.dumps(config))
    imported = read_hf(tmp_path / "published")
    given = (imported.recipe, imported.state, tmp_path / "tokenizer.json")
    to_hf(tmp_path, tmp_path / "hf", load=lambda _: given)
    assert transformers.AutoConfig.from_pretrained(tmp_path / "hf").image_token_id == 5
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "hf")
    inputs = processor(text="<image>how", images=picture(32, 32), return_tensors="pt")
    assert inputs["input_ids"].tolist() == [[1, *[5] * 16, 4]]
    assert processor.tokenizer.eos_token == "</s>"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"projector_hidden_act": "relu"}, "projector_hidden_act is 'relu'"),
        ({"multimodal_projector_bias": False}, "multimodal_projector_bias is False"),
        ({"vision_feature_layer": [-2, -1]}, r"vision_feature_layer is \[-2, -1\]"),
        ({"vision_feature_layer": -4}, "vision_feature_layer is -4"),
        ({"vision_feature_select_strategy": "full"}, "the class token would be an image token"),
        ({"vision_config": {"model_type": "vit"}}, "model_type is 'vit'"),
        ({"vision_config": 3}, "model_type is 3"),
        ({"text_config": {"model_type": "mistral"}}, "model_type is 'mistral'"),
        ({"text_config": "llama"}, "model_type is 'llama'"),
        ({"text_config": {}}, r"lacks tensor language_model\.model\.layers\.10\."),
    ],
)
def test_unsupported_configurations(one, tmp_path, change, message):
    shutil.copytree(one.hf, tmp_path / "hf")
    config = json.loads((one.hf / "config.json").read_text()) | change
    (tmp_path / "hf/config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        read_hf(tmp_path / "hf")


@pytest.mark.parametrize(
    ("part", "change", "where"),
    [
        ("connector", {"norm": True}, "model.connector.norm"),
        ("connector", {"newline": True}, "model.connector.newline"),
        ("connector", {"layers": 3}, "model.connector.layers"),
        ("connector", {"grid": 2}, "model.connector.grid"),
        ("encoder", {"grid": 2}, "model.encoders.0.grid"),
        ("encoder", {"final_norm": True, "pooling": "none"}, "model.encoders.0.final_norm"),
        ("encoder", {"registers": 2}, "model.encoders, vision"),
    ],
)
def test_what_is_no_llava_is_refused_or_exported_with_its_code(one, part, change, where):
    model = read_hf(one.hf).recipe.model
    changed: Model = (
        dataclasses.replace(model, connector=dataclasses.replace(model.connector, **change))
        if part == "connector"
        else dataclasses.replace(model, encoders=(dataclasses.replace(model.encoders[0], **change),))
    )
    assert isinstance(model.connector, MLP)
    assert not list(llava.problems(model))
    assert where in [path for path, _, _ in llava.problems(changed)]


def test_formats(one, tokenizer, tmp_path):
    imported = read_hf(one.hf)
    given = {"load": lambda _: (imported.recipe, imported.state, tokenizer)}
    to_hf(tmp_path, tmp_path / "ours", form="mmoe", **given)
    assert json.loads((tmp_path / "ours/config.json").read_text())["model_type"] == "mmoe"
    back = read_hf(tmp_path / "ours")
    assert back.recipe == imported.recipe
    language = dataclasses.replace(imported.recipe.model, encoders=(), connector=None)
    recipe = dataclasses.replace(imported.recipe, model=language)
    with pytest.raises(UserError, match=r"it has one encoder, not 0 \(model\.encoders\): .*--format mmoe"):
        to_hf(tmp_path, tmp_path / "none", form="llava", load=lambda _: (recipe, imported.state, tokenizer))


def test_parameters_are_counted_as_transformers_does(made, tmp_path):
    to_hf(made.checkpoint, tmp_path / "hf", max_shard_size="20KB")
    index = json.loads((tmp_path / "hf" / INDEX).read_text())
    assert index["metadata"]["total_parameters"] == made.theirs.num_parameters()


@pytest.mark.parametrize("made", ["clip, longcat"], indirect=True)
def test_zero_experts_are_dropped_from_the_whole_model(made, tmp_path):
    to_hf(made.checkpoint, tmp_path / "hf", zero_experts="drop")
    assert json.loads((tmp_path / "hf/config.json").read_text())["model_type"] == "llava"
    gone = set(load_file(made.back / "model.safetensors")) - set(load_file(tmp_path / "hf/model.safetensors"))
    places = [(layer, expert, part) for layer in (0, 1) for expert in (4, 5) for part in ("gate", "up")]
    assert gone == {f"language_model.model.layers.{a}.mlp.experts.{b}.{c}_proj.weight" for a, b, c in places}
    assert verify(made.checkpoint, tmp_path / "hf") == []


def test_a_tokenizer_without_the_image_token(one, tmp_path):
    """Is refused before anything is written, or the export has its own code."""
    plain = tmp_path / "tokenizer.json"
    Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1}, "<unk>")).save(str(plain))
    imported = read_hf(one.hf)
    given = {"load": lambda _: (imported.recipe, imported.state, plain)}
    with pytest.raises(UserError, match="it has no token 3, which stands for a picture"):
        to_hf(tmp_path, tmp_path / "hf", form="llava", **given)
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]
    to_hf(tmp_path, tmp_path / "hf", **given)
    assert json.loads((tmp_path / "hf/config.json").read_text())["model_type"] == "mmoe"


def test_a_border_of_another_colour_is_told(one, tokenizer, tmp_path, capsys):
    imported = read_hf(one.hf)
    data = dataclasses.replace(imported.recipe.data, fit="pad")
    recipe = dataclasses.replace(imported.recipe, data=data)
    to_hf(tmp_path, tmp_path / "hf", load=lambda _: (recipe, imported.state, tokenizer))
    wanted = "LlavaImageProcessor pads with image_mean, [122, 116, 104] of 255; training padded with gray, 127.5\n"
    assert capsys.readouterr().out == wanted
