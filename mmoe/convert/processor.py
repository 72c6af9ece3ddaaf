"""What stands beside a LLaVA's weights for transformers' own processor: the settings of its image processor, both ways,
and a tokenizer that puts ``<bos>`` in front."""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from mmoe import reading
from mmoe.convert.families.llava import strategy
from mmoe.data.pixels import MEAN, Fit, Interpolation
from mmoe.errors import UserError
from mmoe.recipe.model import Encoder, Special, ViT
from mmoe.recipe.tokens import IMAGE, SPECIAL

RESAMPLE: dict[Interpolation, int] = {"triangular": 2, "cubic": 3}
"""Pillow's numbers of the filters."""
LARGEST = 1 << 26
"""Bytes of a tokenizer or of a processor's settings."""
_NONE = re.compile(rb'("post_processor"\s*:\s*)null')


class Settings(NamedTuple):
    """What an image processor does, in a recipe's words; ``mean`` and ``std`` are None where the file has none."""

    fit: Fit
    interpolation: Interpolation
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    notes: list[str]


def image_processor(encoder: Encoder, fit: Fit, interpolation: Interpolation) -> tuple[dict[str, Any], list[str]]:
    """The ``preprocessor_config.json`` of what training does to pictures, and notes on where it differs."""
    square = {"height": encoder.image_size, "width": encoder.image_size}
    fields = {
        "image_processor_type": "LlavaImageProcessor" if fit == "pad" else "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_pad": fit == "pad",
        "do_resize": True,
        "size": {"shortest_edge": encoder.image_size} if fit == "crop" else square,
        "resample": RESAMPLE[interpolation],
        "do_center_crop": fit == "crop",
        "crop_size": square,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(encoder.mean),
        "image_std": list(encoder.std),
        "processor_class": "LlavaProcessor",
    }
    return fields, other_border(encoder, "LlavaImageProcessor") if fit == "pad" else []


def other_border(encoder: Encoder, who: str) -> list[str]:
    """A note where ``who`` pads pictures in another colour than training did."""
    if _is_gray(encoder.mean):
        return []
    colour = [int(255 * value) for value in encoder.mean]
    return [f"{who} pads with image_mean, {colour} of 255; training padded with gray, {MEAN}"]


def our_border(mean: Sequence[float]) -> list[str]:
    """A note where training pads pictures in another colour than ``mean``, with which they were padded."""
    return [] if _is_gray(mean) else [f"pictures are padded with gray, {MEAN} of 255, not with image_mean"]


def _is_gray(mean: Sequence[float]) -> bool:
    return [int(255 * value) for value in mean] == [int(MEAN)] * 3


def processor(encoder: ViT, image: str) -> dict[str, Any]:
    """The ``processor_config.json``; ``image`` is the name of the token that stands for a picture."""
    return {
        "processor_class": "LlavaProcessor",
        "image_token": image,
        "patch_size": encoder.patch_size,
        "num_additional_image_tokens": int(encoder.class_token),
        "vision_feature_select_strategy": strategy(encoder),
    }


def read_image_processor(directory: Path) -> Settings | None:
    """The settings in a directory's ``processor_config.json`` or ``preprocessor_config.json``; None without either.

    Raises:
        UserError: a file is unreadable, or a setting is none that pictures here can have.
    """
    for name in ("processor_config.json", "preprocessor_config.json"):
        path = directory / name
        try:
            fields = reading.json_object(reading.text(path, LARGEST))
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            raise UserError(f"unreadable: {error}", str(path), "export the model again") from None
        fields = fields.get("image_processor") if name.startswith("processor") else fields
        if fields is not None:
            return _settings(fields, str(path))
    return None


def _settings(fields: Any, where: str) -> Settings:
    if not isinstance(fields, dict):
        raise UserError(f"image_processor is {fields!r}", where, "export the model again")
    for key, supported in (("do_resize", True), ("do_normalize", True), ("do_rescale", True)):
        if fields.get(key, supported) != supported:
            raise UserError(f"{key} is {fields[key]!r}", where, "pictures here are resized and normalised")
    factor = fields.get("rescale_factor", 1 / 255)
    if not isinstance(factor, int | float) or abs(factor * 255 - 1) > 1e-6:
        raise UserError(f"rescale_factor is {factor!r}", where, "only 1/255 is supported")
    cuts = "Siglip" not in str(fields.get("image_processor_type"))
    size = fields.get("size")
    short = not isinstance(size, dict) or "shortest_edge" in size
    fit: Fit = "pad" if fields.get("do_pad") else "stretch"
    if fit == "stretch" and short and fields.get("do_center_crop", cuts):
        fit = "crop"
    names: dict[int, Interpolation] = {number: name for name, number in RESAMPLE.items()}
    number, notes = fields.get("resample", RESAMPLE["cubic"]), []
    if not isinstance(number, int) or number not in names:
        notes.append(f"resample is {number!r}: pictures are resized by the cubic filter")
    mean, std = (_statistics(fields.get(key), key, where) for key in ("image_mean", "image_std"))
    if fit == "pad" and mean:
        notes += our_border(mean)
    return Settings(fit, names.get(number, "cubic"), mean, std, notes)


def _statistics(value: Any, key: str, where: str) -> tuple[float, ...] | None:
    if value is None:
        return None
    given: list[Any] = list(value) if isinstance(value, list | tuple) else [value] * 3
    if len(given) != 3 or not all(type(number) in (int, float) and math.isfinite(number) for number in given):
        raise UserError(f"{key} is {value!r}", where, "give a number for each of red, green and blue")
    if min(given) < 0 or (key == "image_std" and min(given) == 0):
        raise UserError(f"{key} is {value!r}", where, "give the mean and the spread of pixels in [0, 1]")
    return tuple(map(float, given))


class Tokens(NamedTuple):
    """Of a tokenizer: its file, and what it calls a model's special tokens."""

    data: bytes
    special: Special
    names: tuple[str, ...]
    """In the order of :class:`Special`'s fields."""
    size: int
    """Tokens that the file has; 0 where it cannot be parsed."""
    knows_image: bool
    """Whether that of a picture is among them, and nothing that a text is read as."""

    @property
    def bos(self) -> str:
        return self.names[1]

    @property
    def image(self) -> str:
        return self.names[-1]


def read_tokens(path: Path, special: Special) -> Tokens:
    """Of any kind: what cannot be parsed goes along with a model all the same, and is taken to have our names.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        data = reading.content(path, LARGEST)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the tokenizer: {error}", str(path), "give a tokenizer.json") from None
    try:
        tokenizer = Tokenizer.from_str(data.decode())
    except Exception:  # tokenizers raises bare Exception for whatever is wrong with the file
        return Tokens(data, special, SPECIAL, 0, False)
    names = [tokenizer.id_to_token(number) for number in _numbers(special)]
    given = (name or ours for name, ours in zip(names, SPECIAL, strict=True))
    known = tokenizer.get_added_tokens_decoder().get(special.image)
    return Tokens(data, special, tuple(given), tokenizer.get_vocab_size(), known is not None and known.special)


def _numbers(special: Special) -> tuple[int, ...]:
    return special.pad, special.bos, special.eos, special.image


def with_image(tokens: Tokens) -> Tokens:
    """A tokenizer that ends right before the token of a picture gets that one, called :data:`IMAGE`."""
    number = tokens.special.image
    if tokens.knows_image or tokens.size != number:
        return tokens
    parts = json.loads(tokens.data)
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    parts["added_tokens"] = [*parts.get("added_tokens", []), {"id": number, "content": IMAGE, **flags, "special": True}]
    data = json.dumps(parts, indent=2, ensure_ascii=False).encode()
    return tokens._replace(data=data, size=number + 1, knows_image=True)


def for_llava(tokens: Tokens) -> bytes:
    """The tokenizer with which transformers' processor reads a whole prompt as training reads its parts.

    It begins with ``<bos>``, and where a text has a blank in front, so has every text behind a picture.
    """
    data = with_bos(tokens)
    try:
        parts = json.loads(data)
    except ValueError:
        return data
    words = parts.get("pre_tokenizer")
    if not isinstance(words, dict) or words.get("prepend_scheme") != "first":
        return data
    parts["pre_tokenizer"] = words | {"prepend_scheme": "always"}
    return json.dumps(parts, indent=2, ensure_ascii=False).encode()


def with_bos(tokens: Tokens) -> bytes:
    """The tokenizer that puts its ``<bos>`` in front of a text; one that has a post-processor stays as it is."""
    return _NONE.sub(lambda found: found[1] + _template(tokens), tokens.data, count=1)


def without_bos(tokens: Tokens) -> bytes:
    """The tokenizer that :func:`with_bos` made this one of, byte for byte."""
    return tokens.data.replace(_template(tokens), b"null", 1)


def _template(tokens: Tokens) -> bytes:
    bos, number = tokens.bos, tokens.special.bos
    front = {"SpecialToken": {"id": bos, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    fields = {
        "type": "TemplateProcessing",
        "single": [front, first],
        "pair": [front, first, second],
        "special_tokens": {bos: {"id": bos, "ids": [number], "tokens": [bos]}},
    }
    return json.dumps(fields).encode()
