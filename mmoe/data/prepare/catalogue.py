"""The stamps of an unpacked package: captions, classes, and which stamps are held out."""

import fnmatch
import hashlib
import json
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmoe.data.shipped import shipped
from mmoe.errors import UserError

VARIANTS = ("_mirror", "_flip")


@dataclass(frozen=True)
class Stamp:
    """One picture with its captions.

    Attributes:
        path: of the PNG, relative to the stamps' root, with forward slashes.
        category: its folder, relative to the root.
        captions: language code → text, in the card's order.
        label: the scene class it belongs to, or ``""``.
        held_out: kept away from training.
    """

    path: str
    category: str
    captions: dict[str, str]
    label: str
    held_out: bool


@dataclass(frozen=True)
class Catalogue:
    """All stamps under ``root``, sorted by path; ``skipped`` names what could not be used and why."""

    root: Path
    card: dict[str, Any]
    stamps: tuple[Stamp, ...]
    skipped: tuple[str, ...] = field(default=())

    @property
    def plurals(self) -> dict[str, str]:
        """Scene class → its plural, in the card's order."""
        return {entry["name"]: entry["plural"] for entry in self.card["class"]}

    def members(self, label: str, *, held_out: bool) -> list[Stamp]:
        """The stamps of one scene class on one side of the split."""
        return [stamp for stamp in self.stamps if stamp.label == label and stamp.held_out == held_out]


def load_card(path: Path | None = None) -> dict[str, Any]:
    """Read a source card; by default the shipped ``stamps`` card."""
    return tomllib.loads((path or shipped("sources", "stamps")).read_text(encoding="utf-8"))


def card_hash(card: dict[str, Any]) -> str:
    """Identity of a card: SHA-256 of its values, hexadecimal; it names the package by checksum and the split's rule."""
    return hashlib.sha256(json.dumps(card, sort_keys=True).encode()).hexdigest()


def original(path: str) -> str:
    """The path without a mirrored or flipped variant's suffix: what the split goes by."""
    stem, dot, suffix = path.rpartition(".")
    for variant in VARIANTS:
        stem = stem.removesuffix(variant)
    return stem + dot + suffix


def _rank(salt: str, path: str) -> float:
    """A number in [0, 1) that depends on the original's path alone."""
    return int.from_bytes(hashlib.sha256(f"{salt}/{original(path)}".encode()).digest()[:8], "big") / 2**64


def _held_out(labels: dict[str, str], rule: dict[str, Any]) -> set[str]:
    """The paths to hold out, see ``[held_out]`` of the card; ``labels`` maps each path to its class or ``""``."""
    ranks = {path: _rank(rule["salt"], path) for path in labels}
    chosen = {path for path, label in labels.items() if not label and ranks[path] < rule["other_share"]}
    for label in sorted(set(labels.values()) - {""}):
        originals = sorted({original(path) for path in labels if labels[path] == label}, key=lambda p: (ranks[p], p))
        first = set(originals[: max(1, round(rule["class_share"] * len(originals)))])
        chosen |= {path for path in labels if labels[path] == label and original(path) in first}
    return chosen


def _captions(path: Path, name: str, languages: list[str]) -> tuple[dict[str, str], list[str]]:
    """Captions of one stamp in the wanted languages, and what was left out."""
    found: dict[str, str] = {}
    skipped = []
    for number, line in enumerate(path.read_bytes().splitlines()):
        try:
            text = line.decode("utf-8").strip()
        except UnicodeDecodeError:
            skipped.append(f"{name}: line {number + 1} of {path.name} is not UTF-8")
            continue
        language, separator, caption = ("en", "=", text) if number == 0 else text.partition("=")
        language = language.removesuffix(".utf8")
        if separator and language in languages and caption.strip():
            found[language] = caption.strip()
    return {language: found[language] for language in languages if language in found}, skipped


def load_catalogue(root: Path, card: dict[str, Any]) -> Catalogue:
    """List the stamps under ``root``.

    Args:
        root: folder that holds the stamps' category folders.
        card: a source card as :func:`load_card` reads it.

    Raises:
        UserError: a class of the card has fewer than two stamps here, so that none can be held out.
    """
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.png"))
    patterns = [(entry["name"], pattern) for entry in card["class"] for pattern in entry["files"]]
    labels = {
        name: next((label for label, pattern in patterns if fnmatch.fnmatchcase(original(name), pattern)), "")
        for name in names
    }
    for entry in card["class"]:
        if len({original(name) for name in names if labels[name] == entry["name"]}) < 2:
            raise UserError(f"class {entry['name']!r} has fewer than two stamps", str(root), "unpack the package again")
    held_out = _held_out(labels, card["held_out"])
    stamps, skipped = [], []
    for name in names:
        texts = root / f"{original(name)[: -len('.png')]}.txt"
        captions, bad = _captions(texts, name, card["languages"]) if texts.is_file() else ({}, [])
        skipped += bad
        stamps.append(Stamp(name, name.rpartition("/")[0], captions, labels[name], name in held_out))
    return Catalogue(root, card, tuple(stamps), tuple(skipped))
