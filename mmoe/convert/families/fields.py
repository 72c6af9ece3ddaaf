"""What every ``config.json`` has in common, and what those of language models have."""

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from mmoe import reading
from mmoe.errors import UserError
from mmoe.recipe.model import Special
from mmoe.recipe.tokens import OURS

LARGEST_CONFIG = 1 << 24
"""Bytes."""
LLAVA_IMAGE = 32000
"""A LLaVA's token for images, where its ``config.json`` names none."""


def read_config(directory: Path, name: str = "config.json") -> dict[str, Any]:
    """The object in a directory's ``config.json``.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    try:
        return reading.json_object(reading.text(directory / name, LARGEST_CONFIG))
    except FileNotFoundError:
        raise UserError(f"no {name}", str(directory), "name a Hugging Face model directory") from None
    except (ValueError, OSError) as error:
        raise UserError(f"unreadable {name}: {error}", str(directory), "export the model again") from None


def check_same(
    theirs: Any, ours: Any, path: str, where: str, *, free: Collection[str] = (), names: Mapping[str, str] | None = None
) -> None:
    """Raises :class:`UserError` where two tables of a recipe differ; it names the field on both sides.

    Args:
        theirs: what a directory's configuration tells of.
        ours: the recipe's.
        path: of ``ours`` in the recipe.
        where: the configuration.
        free: fields that may differ.
        names: their names of our fields, where they differ.
    """
    if type(theirs) is not type(ours):
        what = f"it is a {theirs.type}, {path}.type is {getattr(ours, 'type', None)!r} by the recipe"
        raise UserError(what, where, "give a part of that type")
    for field in dataclasses.fields(ours):
        found, wanted = getattr(theirs, field.name), getattr(ours, field.name)
        if field.name not in free and found != wanted:
            there = (names or {}).get(field.name, field.name)
            what = f"{there} is {_shown(found)}, {path}.{field.name} is {_shown(wanted)} by the recipe"
            raise UserError(what, where, "give a part that fits, or change the recipe: see --set")


def token_ids(special: Special) -> dict[str, int]:
    """Their fields of a ``config.json``, but for the image's, which each kind of model calls otherwise."""
    return {"pad_token_id": special.pad, "bos_token_id": special.bos, "eos_token_id": special.eos}


def read_special(config: dict[str, Any], where: str) -> tuple[Special, list[str]]:
    """The special tokens in a ``config.json``, its own, else those of its language model, else transformers' defaults,
    and notes on what of it they are not.

    Of several ends of a text the first counts; what has no beginning or no padding has its end in their place.

    Raises:
        UserError: one is no token.
    """
    text = config.get("text_config")
    places: list[dict[str, Any]] = [config, text if isinstance(text, dict) else {}]
    notes: list[str] = []

    def first(name: str, default: int | None = None) -> int | None:
        found = next((fields[name] for fields in places if fields.get(name) not in (None, -1, [])), None)
        if found is None:
            return None if any(name in fields for fields in places) else default
        if isinstance(found, list):
            if len(found) > 1:
                notes.append(f"{name} is {found} there: training and an export end with {found[0]}")
            found = found[0]
        if type(found) is not int or found < 0:
            raise UserError(f"{name} is {found!r}", where, "give the number of a token")
        return found

    eos = first("eos_token_id", 2)
    if eos is None:
        raise UserError("eos_token_id is missing", where, "give the number of the token that ends a text")
    bos, pad = first("bos_token_id", 1), first("pad_token_id")
    if bos is None:
        notes.append(f"it has no bos_token_id: documents begin with {eos}, which ends them")
    image = first("image_token_id")
    if image is None:
        image = first("image_token_index", LLAVA_IMAGE if config.get("model_type") == "llava" else None)
    special = Special(
        pad=eos if pad is None else pad,
        bos=eos if bos is None else bos,
        eos=eos,
        image=OURS.image if image is None else image,
    )
    return special, notes


def _shown(value: Any) -> str:
    return str(list(value)) if isinstance(value, tuple) else repr(value)


def rope_of(config: dict[str, Any], where: str) -> dict[str, Any]:
    """Its rotary parameters, of whichever name.

    Raises:
        UserError: they are no table, or not of the plain kind.
    """
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise UserError(f"rope_parameters is {rope!r}", where, "export the model again")
    only({"rope_type": rope.get("rope_type", rope.get("type", "default"))}, {"rope_type": "default"}, where)
    return rope


def only(config: dict[str, Any], supported: dict[str, Any], where: str) -> None:
    """Raises :class:`UserError` for a field that is there with another value than the one that is supported."""
    for name, value in supported.items():
        if config.get(name, value) != value:
            raise UserError(f"{name} is {config[name]!r}", where, f"only {value!r} is supported")
