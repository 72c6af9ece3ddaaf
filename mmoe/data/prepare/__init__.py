"""Offline preparation: a public source becomes data sets on disk, the same bytes for the same options."""

import argparse
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmoe.data import cv_bench
from mmoe.data.prepare.catalogue import Catalogue, card_hash, load_card, load_catalogue
from mmoe.data.prepare.choices import CHOICES_VERSION, ChoiceMaker, write_files
from mmoe.data.prepare.compose import load_sprites
from mmoe.data.prepare.package import fetch_stamps
from mmoe.data.prepare.parallel import build
from mmoe.data.prepare.questions import wording
from mmoe.data.prepare.scenes import HELD_OUT, SCENES_VERSION, TEST, TRAIN, SceneMaker
from mmoe.data.prepare.stamps import STAMPS_VERSION, StampMaker, parts, usable
from mmoe.data.shards import Description
from mmoe.data.source import MADE
from mmoe.data.tokenizer import read_tokenizer, tokenizer_hash, train_tokenizer
from mmoe.errors import UserError

TOKENIZER = "tokenizer.json"
VOCAB_SIZE = 1024
SAMPLES_PER_SHARD = 2000


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """What the pictures of scenes are drawn with."""

    train: int
    """Scenes to train on."""
    test: int
    """Scenes, or questions in CV-Bench's layout, in each of the other splits."""
    size: int
    """Side of a picture in pixels."""
    seed: int
    """Of everything drawn at random; the number of workers changes nothing."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `mmoe data prepare NAME OUT`, of which :func:`run` takes the parsed ones."""
    parser.add_argument("--train", type=int, default=48_000, help="scenes to train on (default %(default)s)")
    text = "scenes, or questions of cv_bench, in each test split (default %(default)s)"
    parser.add_argument("--test", type=int, default=4_800, help=text)
    parser.add_argument("--size", type=int, default=64, help="side of a scene in pixels (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other scenes (default %(default)s)")
    text = "a published model's tokenizer.json to count tokens with (default: one of 1024 tokens that the data train)"
    parser.add_argument("--tokenizer", type=Path, metavar="FILE", help=text)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")


def run(name: str, out: Path, options: argparse.Namespace) -> None:
    """Prepare the data sets called ``name`` under the data root ``out``.

    Args:
        name: ``"stamps"``, ``"scenes"`` or ``"cv_bench"``.
        out: data root; gets ``NAME/SPLIT/`` and ``tokenizer.json``.
        options: as :func:`add_arguments` defines them.

    Raises:
        UserError: an unknown name, an impossible option, or the source cannot be had.
    """
    if name not in MADE:
        raise UserError(f"nothing is known of a data set called {name!r}", "", f"prepare one of {', '.join(MADE)}")
    for option, least in (("train", 1), ("test", 1), ("size", 16), ("workers", 1)):
        if getattr(options, option) < least:
            raise UserError(f"--{option} must be at least {least}", f"--{option} {getattr(options, option)}")
    card = load_card()
    catalogue = load_catalogue(fetch_stamps(card), card)
    if name == "stamps":
        prepare_stamps(catalogue, out, workers=options.workers, tokenizer=options.tokenizer)
    else:
        drawn = Drawn(train=options.train, test=options.test, size=options.size, seed=options.seed)
        prepare_drawn = prepare_scenes if name == "scenes" else prepare_cv_bench
        prepare_drawn(catalogue, out, drawn, workers=options.workers, tokenizer=options.tokenizer)


def write_tokenizer(catalogue: Catalogue, out: Path, given: Path | None = None) -> Path:
    """Write a tokenizer to the data root, unless it is there; returns its path.

    Without a ``given`` one it depends on the catalogue's training stamps and the scenes' wording alone, so that every
    data set made from it shares one tokenizer.

    Raises:
        UserError: the given one is none that texts can be read with (:func:`mmoe.data.tokenizer.read_tokenizer`).
    """
    if given is not None:
        read_tokenizer(given)
    out.mkdir(parents=True, exist_ok=True)
    path, partial = out / TOKENIZER, out / f".{TOKENIZER}.{os.getpid()}"
    if given is None:
        train_tokenizer(_texts(catalogue), VOCAB_SIZE).save(str(partial))
    else:
        shutil.copyfile(given, partial)
    there = path.is_file()
    if there and tokenizer_hash(path) == tokenizer_hash(partial):
        partial.unlink()
        return path
    if there:
        print(f"{path} is another tokenizer than before: what is prepared with that one has to be prepared again")
    partial.replace(path)
    return path


def _texts(catalogue: Catalogue) -> Iterator[str]:
    """What the tokenizer learns from; scenes' sentences weigh so much that each of their words is one token."""
    captions = [f" {text}" for stamp in catalogue.stamps if not stamp.held_out for text in stamp.captions.values()]
    for sentence in wording(catalogue.plurals):
        yield from [sentence] * 300
    yield from captions


def _describe(catalogue: Catalogue, tokenizer: Path, name: str, samples: int, recipe: dict[str, Any]) -> Description:
    return Description(
        name=name,
        source=catalogue.card["name"],
        license=catalogue.card["license"],
        samples=samples,
        samples_per_shard=SAMPLES_PER_SHARD,
        tokenizer=tokenizer_hash(tokenizer),
        recipe=recipe,
    )


def prepare_stamps(catalogue: Catalogue, out: Path, *, workers: int, tokenizer: Path | None = None) -> None:
    """Make ``stamps/train`` and ``stamps/heldout`` under the data root ``out``; ``tokenizer`` as in
    :func:`write_tokenizer`."""
    path = write_tokenizer(catalogue, out, tokenizer)
    for split, held_out in (("train", False), ("heldout", True)):
        found, skipped = usable(catalogue, held_out=held_out)
        members = tuple(part for stamp in found for part in parts(stamp))
        made_with = {"version": STAMPS_VERSION, "card": card_hash(catalogue.card)}
        description = _describe(catalogue, path, f"stamps/{split}", len(members), made_with)
        maker = StampMaker(catalogue.root, members, catalogue.card["license"])
        _report(description, build(out / description.name, description, maker, path, workers=workers, skipped=skipped))
        if skipped:
            print(f"{description.name}: {len(skipped)} skipped, named in {out / description.name / 'dataset.toml'}")


def prepare_scenes(
    catalogue: Catalogue, out: Path, drawn: Drawn, *, workers: int, tokenizer: Path | None = None
) -> None:
    """Make ``scenes/train``, ``scenes/test`` and ``scenes/heldout`` under the data root ``out``.

    Args:
        catalogue: the stamps.
        out: data root.
        drawn: how many, how large.
        workers: processes.
        tokenizer: as in :func:`write_tokenizer`.
    """
    path = write_tokenizer(catalogue, out, tokenizer)
    splits = (
        ("train", drawn.train, TRAIN, False),
        ("test", drawn.test, TEST, False),
        ("heldout", drawn.test, HELD_OUT, True),
    )
    for split, samples, kinds, held_out in splits:
        kind = {f"kind_{kind}": number for kind, number in kinds.items()}
        made_with = {
            "version": SCENES_VERSION,
            "card": card_hash(catalogue.card),
            "seed": drawn.seed,
            "size": drawn.size,
            **kind,
        }
        description = _describe(catalogue, path, f"scenes/{split}", samples, made_with)
        sprites = load_sprites(catalogue, held_out=held_out, side=drawn.size)
        maker = SceneMaker(split, drawn.seed, drawn.size, kinds, sprites, catalogue.plurals, catalogue.card["license"])
        _report(description, build(out / description.name, description, maker, path, workers=workers))


def prepare_cv_bench(
    catalogue: Catalogue, out: Path, drawn: Drawn, *, workers: int, tokenizer: Path | None = None
) -> None:
    """Make ``cv_bench/train``, a data set, and ``cv_bench/test`` and ``cv_bench/heldout`` in CV-Bench's own layout.

    The arguments are those of :func:`prepare_scenes`.

    Raises:
        UserError: there is something else in the folder of a split, or pyarrow is not installed.
    """
    cv_bench.pyarrow()  # missing, it is told before minutes of work
    path = write_tokenizer(catalogue, out, tokenizer)
    for split, samples, held_out in (
        ("train", drawn.train, False),
        ("test", drawn.test, False),
        ("heldout", drawn.test, True),
    ):
        versions = {"version": CHOICES_VERSION, "scenes": SCENES_VERSION, "card": card_hash(catalogue.card)}
        made_with = {**versions, "seed": drawn.seed, "size": drawn.size}
        description = _describe(catalogue, path, f"cv_bench/{split}", samples, made_with)
        sprites = load_sprites(catalogue, held_out=held_out, side=drawn.size)
        scenes = SceneMaker(
            f"cv_bench/{split}", drawn.seed, drawn.size, {}, sprites, catalogue.plurals, catalogue.card["license"]
        )
        maker, folder = ChoiceMaker(scenes), out / description.name
        made = (
            build(folder, description, maker, path, workers=workers)
            if split == "train"
            else write_files(folder, description, maker)
        )
        _report(description, made)


def _report(description: Description, made: bool) -> None:
    print(f"{description.name}: {description.samples} samples, {'written' if made else 'up to date'}")
