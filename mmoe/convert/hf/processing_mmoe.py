"""The exported model's processor: pictures to pixels, text with ``<image>`` placeholders to tokens, as in training."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature, ImageProcessingMixin, ProcessorMixin

from mmoe.data.pixels import Fit, Interpolation, preprocess

IMAGE = "<image>"
Picture = Image.Image | bytes | str | Path


class MmoeImageProcessor(ImageProcessingMixin):
    """Pictures (opened, encoded bytes, or paths) → ``pixel_values`` [n, 3, side, side] float32.

    For encoders of several image sizes: ``pixel_values_<side>`` for each of them. With several or with ``fit`` "pad"
    also ``original_sizes`` [n, 2] int64, the upright pictures' heights and widths.

    Args:
        image_size: the side of the square that a picture becomes, or a list of several.
        fit: how it becomes a square: stretch, pad or crop.
        interpolation: triangular or cubic.
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012 - transformers' own protocol

    def __init__(
        self,
        image_size: int | Sequence[int] = 64,
        fit: Fit = "stretch",
        interpolation: Interpolation = "triangular",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.image_size = image_size
        self.fit: Fit = fit
        self.interpolation: Interpolation = interpolation

    def __call__(self, images: Picture | Sequence[Picture], return_tensors: str | None = "pt") -> BatchFeature:
        pictures = [images] if isinstance(images, Picture) else list(images)
        read = [Path(p).read_bytes() if isinstance(p, (str, Path)) else p for p in pictures]
        sides = [self.image_size] if isinstance(self.image_size, int) else list(self.image_size)
        views = [preprocess(p, sides, self.fit, self.interpolation) for p in read]
        data: dict[str, Any] = {}
        for side in sides:
            name = "pixel_values" if len(sides) == 1 else f"pixel_values_{side}"
            data[name] = np.array([view[side] for view, _ in views], np.float32).reshape(-1, 3, side, side)
        if len(sides) > 1 or self.fit == "pad":
            data["original_sizes"] = np.array([size for _, size in views], np.int64).reshape(-1, 2)
        return BatchFeature(data, tensor_type=return_tensors)


class MmoeProcessor(ProcessorMixin):
    """``processor(text=…, images=…)`` → input_ids, attention_mask and what the image processor makes of the pictures.

    Every :data:`IMAGE` in the texts stands for the next picture and becomes ``image_tokens`` tokens; ``<bos>`` goes in
    front. Each stretch of text between placeholders is tokenised by itself, and the names of special tokens in it are
    plain text. Shorter rows are padded on the left, where generation needs it.

    Args:
        image_processor, tokenizer: as loaded.
        image_tokens: tokens of one image.
        image_token_id: the token, whatever the tokenizer calls it.
    """

    attributes = ["image_processor", "tokenizer"]  # noqa: RUF012
    image_processor_class = "AutoImageProcessor"
    tokenizer_class = "AutoTokenizer"
    image_token = IMAGE
    """The placeholder in texts."""

    def __init__(
        self, image_processor: Any, tokenizer: Any, image_tokens: int = 16, image_token_id: int = 3, **kwargs: Any
    ) -> None:
        super().__init__(image_processor, tokenizer, **kwargs)
        self.image_tokens, self.image_token_id = image_tokens, image_token_id

    def __call__(
        self,
        images: Picture | Sequence[Any] | None = None,
        text: str | Sequence[str] | None = None,
        return_tensors: str | None = "pt",
        **kwargs: Any,
    ) -> BatchFeature:
        """``images``: one picture, all of them in order, or a list for each text.

        Raises:
            ValueError: no text, or another number of pictures than of placeholders.
        """
        if text is None:
            raise ValueError(f"give a text; {IMAGE} in it stands for a picture")
        if kwargs:
            raise ValueError(f"unknown arguments: {', '.join(kwargs)}")
        texts = [text] if isinstance(text, str) else list(text)
        pictures = _flat(images)
        wanted = sum(t.count(IMAGE) for t in texts)
        if len(pictures) != wanted:
            raise ValueError(f"{len(pictures)} pictures for {wanted} {IMAGE} placeholders in the text")
        rows = [self._tokens(t) for t in texts]
        longest = max(map(len, rows), default=0)
        pad = self.tokenizer.pad_token_id
        data: dict[str, Any] = {
            "input_ids": np.array([[pad] * (longest - len(r)) + r for r in rows], np.int64),
            "attention_mask": np.array([[0] * (longest - len(r)) + [1] * len(r) for r in rows], np.int64),
        }
        if pictures:
            data |= self.image_processor(pictures, return_tensors="np")
        return BatchFeature(data, tensor_type=return_tensors)

    def _tokens(self, text: str) -> list[int]:
        ids = [self.tokenizer.bos_token_id]
        for number, piece in enumerate(text.split(IMAGE)):
            ids += [self.image_token_id] * self.image_tokens if number else []
            ids += self.tokenizer.encode(piece, add_special_tokens=False, split_special_tokens=True) if piece else []
        return ids

    def batch_decode(self, ids: torch.Tensor | Sequence[Sequence[int]], **kwargs: Any) -> list[str]:
        return self.tokenizer.batch_decode(ids, **kwargs)

    def decode(self, ids: torch.Tensor | Sequence[int], **kwargs: Any) -> str:
        return self.tokenizer.decode(ids, **kwargs)

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixel_values"]


def _flat(images: Picture | Sequence[Any] | None) -> list[Picture]:
    if images is None:
        return []
    if isinstance(images, Picture):
        return [images]
    return [picture for item in images for picture in _flat(item)]
