"""A published language model with its own tokenizer becomes a LLaVA: put together, trained, exported, read again."""

import dataclasses
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import sets
import torch
import training
import transformers
from PIL import Image
from tokenizer_kinds import KINDS
from tokenizers import Tokenizer

import mmoe
from mmoe import cli
from mmoe.checkpoint.load import state_dict
from mmoe.convert import read_hf, to_hf
from mmoe.convert.families.fields import read_special
from mmoe.data.document import tokenize
from mmoe.data.tokenizer import load_tokenizer
from mmoe.errors import UserError
from mmoe.evaluate.generate import generate
from mmoe.recipe.model import Special

RECIPE = """
name = "tiny"

[model.backbone]
type = "llama"
vocab_size = {vocab_size}
hidden_size = 32
layers = 2
heads = 4
kv_heads = 2
head_dim = 8
ffn_hidden_size = 48
max_position = 128
rope_theta = 10000.0
norm_eps = 1e-6

[model.special]
pad = {pad}
bos = {bos}
eos = {eos}
image = {image}

[[model.encoders]]
name = "vision"
type = "vit"
image_size = 16
patch_size = 4
width = 16
layers = 2
heads = 2
activation = "quick_gelu"
class_token = true
pre_norm = true
patch_bias = false
feature_layer = -2
final_norm = false
pooling = "norm"

[model.connector]
type = "mlp"
grid = 4

[data]
mixture = "{mixture}"
root = "{root}"
sequence_length = 128
images_per_pack = 6
interpolation = "cubic"
fit = "crop"

[train]
steps = 4
global_batch = 2
micro_batch = 2

[optimizer]
lr = 5e-3
"""


@dataclass(frozen=True)
class Made:
    root: Path
    special: Special
    size: int
    """Of the published vocabulary."""
    language: transformers.LlamaForCausalLM
    told: str
    """By `mmoe train`."""

    @property
    def checkpoint(self) -> Path:
        return self.root / "run/checkpoints/step_00000004"


@pytest.fixture(scope="module", params=KINDS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    root = tmp_path_factory.mktemp(request.param)
    special = KINDS[request.param](root / "tokenizer.json")
    size = Tokenizer.from_file(str(root / "tokenizer.json")).get_vocab_size()
    config = transformers.LlamaConfig(
        vocab_size=size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=special.bos,
        eos_token_id=special.eos,
    )
    torch.manual_seed(0)
    language = transformers.LlamaForCausalLM(config)
    language.save_pretrained(root / "published")
    shutil.copy(root / "tokenizer.json", root / "published")
    sets.write_set(root, "varied", sets.varied(40))
    mixture = sets.write_mixture(root, varied=1.0)
    text = RECIPE.format(vocab_size=size + 8, mixture=mixture, root=root, **vars(special))
    (root / "tiny.toml").write_text(text)
    put = ["convert", "from-parts", str(root / "tiny.toml"), str(root / "first")]
    assert cli.main([*put, "--part", f"language={root / 'published'}"]) == 0
    first = root / "first/checkpoints/step_00000000"
    done = training.run(root / "tiny.toml", root / "run", "--from", str(first))
    assert done.returncode == 0, done.stderr
    return Made(root, special, size, language, done.stderr)


def test_the_parts_know_their_tokens(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, first, tokenizer = state_dict(made.root / "first/checkpoints/step_00000000")
    assert recipe.model.special == made.special
    assert tokenizer.read_bytes() == (made.root / "tokenizer.json").read_bytes()
    embedding = first["language.embedding.word_embeddings.weight"]
    assert torch.equal(embedding[: made.size], made.language.get_input_embeddings().weight)
    assert "as other tokens" not in made.told


def test_training_with_other_tokens_is_told(made: Made, tmp_path: Path) -> None:
    """The weights are taken all the same."""
    sets.write_set(tmp_path, "varied", sets.varied(40))
    text = (made.root / "tiny.toml").read_text().replace(str(made.root), str(tmp_path))
    for name, number in (("pad", 0), ("bos", 1), ("eos", 2), ("image", 3)):
        text = text.replace(f"\n{name} = {getattr(made.special, name)}\n", f"\n{name} = {number}\n")
    sets.write_mixture(tmp_path, varied=1.0)
    (tmp_path / "tiny.toml").write_text(text)
    done = training.run(
        tmp_path / "tiny.toml", tmp_path / "run", "--from", str(made.root / "first/checkpoints/step_00000000")
    )
    assert done.returncode == 0, done.stderr
    assert "reads texts as other tokens than" in done.stderr


def test_an_export_is_transformers_llava_with_its_tokens(made: Made, tmp_path: Path) -> None:
    to_hf(made.checkpoint, tmp_path / "hf")
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert config["model_type"] == "llava"
    ids = {name: config[f"{name}_token_id"] for name in ("pad", "bos", "eos")}
    assert Special(**ids, image=config["image_token_index"]) == made.special
    assert {name: config["text_config"][f"{name}_token_id"] for name in ids} == ids

    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "hf")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    picture.save(tmp_path / "picture.png")
    inputs = processor(text=f"{processor.image_token}how many ?", images=picture, return_tensors="pt")
    assert f'text="{processor.image_token}how' in (tmp_path / "hf/README.md").read_text()
    sample = {"prefix": [{"image": 0}], "branches": [{"prompt": "how many ?", "answer": ""}]}
    document = tokenize(sample, load_tokenizer(made.root / "tokenizer.json", made.special), 16)
    assert inputs["input_ids"].tolist() == [document.tokens[:-1].tolist()]

    theirs = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf").eval()
    model = mmoe.load(made.checkpoint)
    (encoder,) = model.recipe.model.encoders
    mean, std = (torch.tensor(value)[:, None, None] for value in (encoder.mean, encoder.std))
    pixels = inputs["pixel_values"]
    with torch.no_grad():
        wanted = theirs(**inputs).logits
    found = model.logits(inputs["input_ids"], (pixels * std + mean - 0.5) * 4)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    shown = [tmp_path / "picture.png"]
    answers = [generate(path, "how many ?", shown, max_tokens=6) for path in (made.checkpoint, tmp_path / "hf")]
    assert answers[0] == answers[1]
    places = (made.checkpoint, tmp_path / "hf", tmp_path / "hf/language")
    alone = [generate(path, "how many ?", [], max_tokens=6) for path in places]
    assert alone[0] == alone[1] == alone[2]

    (tmp_path / "hf/mmoe_recipe.toml").unlink()
    again = read_hf(tmp_path / "hf")
    assert again.recipe.model.special == made.special
    _, state, _ = state_dict(made.checkpoint)
    assert again.state.keys() == state.keys()
    assert all(torch.equal(again.state[name], tensor) for name, tensor in state.items())


def test_the_language_model_alone(made: Made, tmp_path: Path) -> None:
    """No ordinary token of it becomes a special one, and its ends and beginnings are its own."""
    config = json.loads((made.root / "published/config.json").read_text())
    shutil.copytree(made.root / "published", tmp_path / "published")
    ends = {"eos_token_id": [made.special.eos, 5], "bos_token_id": None}
    (tmp_path / "published/config.json").write_text(json.dumps(config | ends))
    assert cli.main(["convert", "from-hf", str(tmp_path / "published"), str(tmp_path / "run")]) == 0
    to_hf(tmp_path / "run/checkpoints/step_00000000", tmp_path / "hf")
    written = json.loads((tmp_path / "hf/config.json").read_text())
    ids = {name: written[f"{name}_token_id"] for name in ("pad", "bos", "eos")}
    assert ids == dict.fromkeys(ids, made.special.eos)
    theirs = transformers.AutoTokenizer.from_pretrained(made.root / "published")
    reloaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert reloaded.all_special_ids == [made.special.eos]
    text = "cost $5 <0x00> and a frog"
    tokens = theirs.encode(text, add_special_tokens=False)
    assert reloaded.encode(text, add_special_tokens=False) == tokens
    assert reloaded.decode(tokens, skip_special_tokens=True) == theirs.decode(tokens, skip_special_tokens=True)


def test_what_an_import_takes_otherwise_is_told(made: Made) -> None:
    _, notes = read_special({"eos_token_id": [7, 8], "bos_token_id": None}, "config.json")
    assert notes[0] == "eos_token_id is [7, 8] there: training and an export end with 7"
    assert notes[1].startswith("it has no bos_token_id: documents begin with 7")
    with pytest.raises(UserError, match="pad_token_id is 'x'"):
        read_special({"pad_token_id": "x"}, "config.json")


def test_an_image_at_an_ordinary_token_is_refused(made: Made, tmp_path: Path) -> None:
    """As an import from before recipes told of special tokens has it: the export would read texts as pictures."""
    recipe, state, tokenizer = state_dict(made.checkpoint)
    ordinary = Tokenizer.from_file(str(tokenizer)).token_to_id("a")
    special = dataclasses.replace(made.special, image=ordinary)
    old = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, special=special))
    with pytest.raises(UserError, match=rf"model\.special\.image is {ordinary}, 'a', as which texts are read"):
        to_hf(made.checkpoint, tmp_path / "hf", load=lambda _: (old, state, tokenizer))
    assert not (tmp_path / "hf").exists()


def test_an_export_without_the_numbers_in_its_recipe(made: Made, tmp_path: Path) -> None:
    """Has them in its configuration."""
    to_hf(made.checkpoint, tmp_path / "hf")
    path = tmp_path / "hf/mmoe_recipe.toml"
    text = path.read_text()
    start = text.index("[model.special]")
    path.write_text(text[:start] + text[text.index("[", start + 1) :])
    assert read_hf(tmp_path / "hf").recipe.model.special == made.special


@pytest.mark.usefixtures("modules")
def test_our_own_class_has_them_too(made: Made, tmp_path: Path) -> None:
    to_hf(made.checkpoint, tmp_path / "hf", form="mmoe")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    picture.save(tmp_path / "picture.png")
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    model = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "hf", trust_remote_code=True).eval()
    inputs = processor(text="<image>how many ?", images=picture, return_tensors="pt")
    assert (inputs["input_ids"] == made.special.image).sum() == 16
    assert processor.image_token == "<image>"
    with torch.no_grad():
        logits = model(**inputs).logits
    ours = mmoe.load(made.checkpoint).logits(inputs["input_ids"], inputs["pixel_values"])
    torch.testing.assert_close(logits, ours, atol=1e-5, rtol=0)
    answers = [
        generate(path, "how many ?", [tmp_path / "picture.png"], max_tokens=6)
        for path in (made.checkpoint, tmp_path / "hf")
    ]
    assert answers[0] == answers[1]
