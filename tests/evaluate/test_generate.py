"""The loop over tokens, its ends, and the user's errors, on a model that continues its context by rule."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import IMAGE_SIZE, FakeModel, png
from torch import Tensor

import mmoe
from mmoe.errors import UserError
from mmoe.evaluate.generate import generate, next_token
from mmoe.recipe.tokens import OURS


class Continuing(FakeModel):
    """Says the tokens of `says` one after another, then ``<eos>``; remembers what it was given."""

    def __init__(self, says: str) -> None:
        super().__init__()
        self.left = [*self.tokenizer.encode(says), OURS.eos]
        self.contexts: list[list[int]] = []
        self.pixels: Any = None
        self.sizes: Any = None

    def logits(self, input_ids: Tensor, images: Any = None, original_sizes: Tensor | None = None) -> Tensor:
        self.contexts.append(input_ids[0].tolist())
        self.pixels, self.sizes = images, original_sizes
        logits = torch.zeros(1, input_ids.shape[1], self.tokenizer.size)
        logits[0, -1, self.left[len(self.contexts) - 1]] = 9.0
        return logits


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    (tmp_path / "step").mkdir()
    return tmp_path / "step"


def loading(monkeypatch: pytest.MonkeyPatch, says: str) -> Continuing:
    model = Continuing(says)
    monkeypatch.setitem(vars(mmoe), "load", lambda path: model)
    return model


def test_it_continues_the_pictures_and_the_prompt_up_to_eos(monkeypatch: pytest.MonkeyPatch, checkpoint: Path) -> None:
    model = loading(monkeypatch, " zebra zebra")
    (checkpoint / "a.png").write_bytes(png((255, 255, 255)))
    (checkpoint / "b.png").write_bytes(png((0, 0, 0)))
    text = generate(checkpoint, " how many ?", [checkpoint / "a.png", checkpoint / "b.png"])
    assert text == "zebra zebra"
    prompt = model.tokenizer.encode(" how many ?")
    assert model.contexts[0] == [OURS.bos, *[OURS.image] * 2 * model.image_tokens, *prompt]
    assert model.contexts[-1] == model.contexts[0] + model.left[:-1]
    assert model.pixels[IMAGE_SIZE].mean((1, 2, 3)).tolist() == pytest.approx([2.0, -2.0])
    assert model.sizes.tolist() == [[30, 40]] * 2


@pytest.mark.parametrize(
    ("file", "content", "what"),
    [
        ("model.safetensors.index.json", {"weight_map": {"a": "../x.safetensors"}}, "in '../x.safetensors'"),
        ("model.safetensors.index.json", {"weight_map": {"a": "/etc/x.safetensors"}}, "in '/etc/x.safetensors'"),
        ("model.safetensors.index.json", {"weight_map": {"a": "x.bin"}}, "in 'x.bin'"),
        ("model.safetensors.index.json", {"weight_map": {"a": 3}}, "in 3"),
        ("model.safetensors.index.json", {"weight_map": "/x"}, "in '/x'"),
        ("model.safetensors.index.json", [1], "no JSON object"),
        ("config.json", {"transformers_weights": "../x.safetensors"}, "in '../x.safetensors'"),
        ("adapter_config.json", {"base_model_name_or_path": "somebody/else"}, "names weights of elsewhere"),
    ],
)
def test_an_export_with_weights_elsewhere(checkpoint: Path, file: str, content: Any, what: str) -> None:
    (checkpoint / "config.json").write_text("{}")
    (checkpoint / file).write_text(json.dumps(content))
    with pytest.raises(UserError, match=what):
        generate(checkpoint, " how", [])


def test_a_system_prompt_stands_before_the_pictures(monkeypatch: pytest.MonkeyPatch, checkpoint: Path) -> None:
    model = loading(monkeypatch, " zebra")
    (checkpoint / "a.png").write_bytes(png((255, 255, 255)))
    generate(checkpoint, " how many ?", [checkpoint / "a.png"], system_prompt="be brief")
    front, prompt = (model.tokenizer.encode(text) for text in ("be brief", " how many ?"))
    assert model.contexts[0] == [OURS.bos, *front, *[OURS.image] * model.image_tokens, *prompt]


def test_it_ends_after_max_tokens(monkeypatch: pytest.MonkeyPatch, checkpoint: Path) -> None:
    model = loading(monkeypatch, " zebra" * 9)
    assert generate(checkpoint, " how", [], max_tokens=3) == "zebra zebra zebra"
    assert len(model.contexts) == 3
    assert model.pixels is None


def test_tokens_are_drawn_by_their_probability_and_by_the_seed() -> None:
    logits = torch.tensor([1.0, 3.0, 2.0])
    assert next_token(logits, 0.0, torch.Generator()) == 1

    def drawn(seed: int, temperature: float) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return [next_token(logits, temperature, generator) for _ in range(2000)]

    assert drawn(1, 2.0) == drawn(1, 2.0)
    assert drawn(1, 2.0) != drawn(2, 2.0)
    shares = torch.bincount(torch.tensor(drawn(1, 2.0)), minlength=3) / 2000
    # Five standard deviations of a share over 2000 draws are below 0.056.
    assert torch.allclose(shares, (logits / 2).softmax(-1), atol=0.056)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"prompt": "an <image> ?"}, "the prompt holds <image>"),
        ({"system_prompt": "<image>"}, "the prompt holds <image>"),
        ({"path": Path("nowhere")}, "no such checkpoint or export"),
        ({"images": [Path("none.png")]}, "cannot read the image: No such file"),
        ({"images": [Path(__file__)]}, "cannot use the image: not an image"),
        ({"max_tokens": 0}, "max-tokens 1 or more"),
        ({"temperature": -1.0}, "temperature must be 0 or more"),
        ({"max_tokens": 512}, "new ones are more than the model.s 512 positions"),
    ],
)
def test_user_errors(monkeypatch: pytest.MonkeyPatch, checkpoint: Path, options: dict[str, Any], what: str) -> None:
    loading(monkeypatch, " zebra")
    with pytest.raises(UserError, match=what):
        generate(**{"path": checkpoint, "prompt": "how", "images": []} | options)
