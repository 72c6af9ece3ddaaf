"""A data set in memory, and a model whose logits are a fixed function of what the attention mask lets a place see."""

import hashlib
import io
from dataclasses import replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mmoe.data.source import Encoded
from mmoe.data.tokenizer import Vocabulary, train_tokenizer
from mmoe.recipe import load_recipe
from mmoe.recipe.tokens import OURS

IMAGE_TOKENS, IMAGE_SIZE = 4, 32


def png(color: tuple[int, int, int]) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (40, 30), color).save(file, "PNG")
    return file.getvalue()


def record(*branches: tuple[str, str, str, list[str] | None]) -> dict[str, Any]:
    keys = ("task", "prompt", "answer", "choices")
    made = [{k: v for k, v in zip(keys, branch, strict=True) if v is not None} for branch in branches]
    return {"source": "fake", "license": "CC0-1.0", "prefix": [{"image": 0}], "branches": made}


class FakeSource:
    def __init__(self, samples: list[Encoded]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def key(self, number: int) -> str:
        return f"fake/test/{number}"

    def read(self, number: int) -> Encoded:
        return self.samples[number]


class FakeModel:
    def __init__(self, sequence_length: int = 64) -> None:
        recipe = load_recipe("quickstart")
        self.recipe = replace(recipe, data=replace(recipe.data, sequence_length=sequence_length, images_per_pack=3))
        trained = train_tokenizer([" zebra how many ? 1 2 3 12"] * 9, vocab_size=300)
        self.tokenizer = Vocabulary(trained, OURS)
        self.image_tokens, self.image_sizes = IMAGE_TOKENS, (IMAGE_SIZE,)
        self.images: list[Tensor] = []
        self.branches = 0

    def after(self, context: list[int], brightness: float) -> Tensor:
        """Logits [V] of the token after ``context`` in a sample with a picture that bright."""
        digest = hashlib.sha256(repr((context, round(brightness, 3))).encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:6], "big"))
        return 3 * torch.randn(self.tokenizer.size, generator=generator)

    def forward_batch(self, batch: dict[str, Any]) -> Tensor:
        tokens, document, branch = batch["tokens"], batch["document"], batch["branch"]
        pixels = batch["images"][IMAGE_SIZE]
        self.images.append(pixels.clone())
        bright = iter(pixels.mean((1, 2, 3)).tolist())
        logits = torch.zeros(*tokens.shape, self.tokenizer.size)
        for row, (ids, of, within) in enumerate(zip(tokens.tolist(), document.tolist(), branch.tolist(), strict=True)):
            for number in range(1, max(of) + 1):
                places = [p for p, here in enumerate(of) if here == number]
                brightness = next(bright) if any(ids[p] == 3 for p in places) else 0.0
                self.branches += max(within[p] for p in places)
                for place in places:
                    seen = [ids[p] for p in places if p <= place and within[p] in (0, within[place])]
                    logits[row, place] = self.after(seen, brightness)
        return logits
