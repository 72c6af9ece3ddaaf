"""Pictures of a test set that the training set shows as well: equal, or nearly so, by perceptual hashes.

A picture's hash is 64 bits: the signs of its 8 × 8 lowest frequencies (DCT of 32 × 32 gray pixels) about their median
(Zauner, "Implementation and benchmarking of perceptual image hash functions", 2010; as in the package ImageHash). It
hardly changes when a picture is compressed or resized again.
"""

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mmoe.data import cv_bench
from mmoe.data.document import BadSample
from mmoe.data.pixels import BadImage, open_image, to_rgb
from mmoe.data.shards import is_dataset
from mmoe.data.source import Source, name_of
from mmoe.errors import UserError

BITS, SIDE, LOW = 64, 32, 8
THRESHOLD = 4
"""Bits that may differ by default; two unrelated pictures' hashes differ by 32 on average."""
SHOWN = 20
"""Test pictures that are printed; the JSON has all."""
CLOSEST = 5
"""Training pictures that are kept for a test picture; the others are counted. Of equal pictures, a blank one for
instance, two data sets have as many pairs as the product of their numbers."""
LARGEST_STEP = 1 << 22
"""Pairs that are compared at a time."""


@dataclass(frozen=True)
class Close:
    """A training picture; ``bits`` of its hash and of the test picture's differ."""

    train: str
    bits: int


@dataclass(frozen=True)
class Match:
    """A test picture that the training set shows."""

    test: str
    count: int
    """Training pictures within the threshold."""
    closest: list[Close]
    """The first ``CLOSEST`` of them by their bits; of equally close ones, by their places in the data set."""


def _dct() -> NDArray[np.float64]:
    """The first ``LOW`` rows of the orthogonal DCT-II of ``SIDE`` values."""
    k, n = np.arange(LOW)[:, None], np.arange(SIDE)[None]
    scale = np.where(k == 0, math.sqrt(1 / SIDE), math.sqrt(2 / SIDE))
    return scale * np.cos(np.pi * (2 * n + 1) * k / (2 * SIDE))


def perceptual_hash(picture: Image.Image) -> int:
    """64 bits, the lowest frequencies first in the highest bits; a picture of one colour has the first alone."""
    gray = np.asarray(picture.convert("L").resize((SIDE, SIDE), Image.Resampling.LANCZOS), np.float64)
    low = _dct() @ gray @ _dct().T
    # What is 0 but for rounding is no sign.
    low[np.abs(low) < 1e-6] = 0
    return int.from_bytes(np.packbits(low > np.median(low)).tobytes())


Pictures = Iterator[tuple[str, bytes | BadSample]]
"""Encoded, each under its name, or why it cannot be read."""


def open_pictures(folder: Path) -> Pictures:
    """The pictures of a data set, named ``source/key:image``, or of a folder in CV-Bench's layout, a row each, named
    ``source/FILE/ROW:filename``.

    Raises:
        UserError: it is missing or broken; at once, but for what a file says further on.
    """
    name = name_of(folder)
    if is_dataset(folder):
        return _pictures(Source(folder, name))
    if cv_bench.files(folder):
        return ((f"{name}/{key}", picture) for key, picture in cv_bench.pictures(folder))
    fix = "give a folder that `mmoe data prepare` made, or CV-Bench's: test_2d and test_3d as .parquet or .jsonl"
    raise UserError("neither a data set nor CV-Bench's files are there", str(folder), fix)


def _pictures(source: Source) -> Pictures:
    with closing(source):
        for number in range(len(source)):
            key = source.key(number)
            try:
                images = source.read(number).images
            except BadSample as error:
                yield key, error
                continue
            yield from ((f"{key}:{i}", image) for i, image in enumerate(images))


def hashes(pictures: Pictures) -> tuple[NDArray[np.uint64], list[str], list[str]]:
    """The hashes of the pictures, their names, and what could not be read, named."""
    found: list[int] = []
    names: list[str] = []
    bad: list[str] = []
    for name, picture in pictures:
        try:
            if isinstance(picture, BadSample):
                raise picture
            found.append(perceptual_hash(to_rgb(open_image(picture))))
            names.append(name)
        except (BadSample, BadImage) as error:
            bad.append(f"{name}: {error}")
    return np.array(found, np.uint64), names, bad


def close_pairs(
    test: NDArray[np.uint64], train: NDArray[np.uint64], threshold: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]]:
    """All pairs that differ in at most ``threshold`` bits: indices into ``test``, into ``train``, and how many bits, in
    pieces, each pair once.

    Of ``threshold`` + 1 bands of bits, such a pair has one the same (it has too few different bits to spoil all): only
    pairs that share a band are compared, and the first band that they share reports them.
    """
    edges = np.linspace(0, BITS, threshold + 2).astype(int)
    bands = [(int(low), (1 << int(high - low)) - 1) for low, high in itertools.pairwise(edges)]
    for number, (low, mask) in enumerate(bands):
        mine, theirs = ((part >> np.uint64(low)) & np.uint64(mask) for part in (test, train))
        order = np.argsort(theirs, kind="stable")
        ordered = theirs[order]
        first, last = (np.searchsorted(ordered, mine, side) for side in ("left", "right"))
        for rows in _steps(last - first):
            counts = (last - first)[rows]
            i = np.repeat(np.arange(len(test))[rows], counts)
            within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
            j = order[np.repeat(first[rows], counts) + within]
            different = test[i] ^ train[j]
            keep = np.bitwise_count(different) <= threshold
            for before, wide in bands[:number]:
                keep &= (different >> np.uint64(before)) & np.uint64(wide) != 0
            i, j, different = i[keep], j[keep], different[keep]
            yield i, j, np.bitwise_count(different).astype(np.int64)


def _steps(counts: NDArray[np.int64]) -> Iterator[slice]:
    """Rows of at most ``LARGEST_STEP`` pairs together, or one row."""
    total, start = np.cumsum(counts), 0
    while start < len(counts):
        before = int(total[start - 1]) if start else 0
        end = max(start + 1, int(np.searchsorted(total, before + LARGEST_STEP, "right")))
        yield slice(start, end)
        start = end


def _matches(
    names: Sequence[str],
    known: Sequence[str],
    pairs: Iterator[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]],
) -> list[Match]:
    """Of each test picture in ``pairs``, the one with the closest training picture first."""
    counts = np.zeros(len(names), np.int64)
    kept = np.empty((3, 0), np.int64)
    for i, j, bits in pairs:
        counts += np.bincount(i, minlength=len(names))
        kept = np.concatenate([kept, [i, bits, j]], 1)
        kept = kept[:, np.lexsort(kept[::-1])]
        # A picture's pairs stand together: those with one of the same picture CLOSEST places before are too many.
        keep = np.ones(kept.shape[1], bool)
        keep[CLOSEST:] = kept[0, CLOSEST:] != kept[0, :-CLOSEST]
        kept = kept[:, keep]
    matches = {i: Match(names[i], int(counts[i]), []) for i in np.flatnonzero(counts).tolist()}
    for i, bits, j in kept.T.tolist():
        matches[i].closest.append(Close(known[j], bits))
    return sorted(matches.values(), key=lambda match: (match.closest[0].bits, match.test))


def compare(train: Path, tests: Sequence[Path], threshold: int = THRESHOLD) -> list[dict]:
    """For each test set: ``images``, ``leaked`` (its pictures that match one of ``train``), ``matches`` (:class:`Match`
    as JSON) and ``bad``. Each of them, and ``train``, is a folder of :func:`open_pictures`.

    Raises:
        UserError: a folder is missing or broken, or the threshold is no number of bits.
    """
    if not 0 <= threshold < BITS // 2:
        raise UserError(f"{threshold} is no threshold", "--threshold", f"give 0 to {BITS // 2 - 1} bits")
    # All are opened before the first is read, which may take hours.
    opened = [open_pictures(path) for path in (train, *tests)]
    known, known_names, known_bad = hashes(opened[0])
    results = []
    for path, pictures in zip(tests, opened[1:], strict=True):
        asked, names, bad = hashes(pictures)
        matches = _matches(names, known_names, close_pairs(asked, known, threshold))
        results.append(
            {
                "train": str(train),
                "test": str(path),
                "threshold": threshold,
                "images": len(names),
                "leaked": len(matches),
                "matches": [asdict(match) for match in matches],
                "bad": known_bad + bad,
            }
        )
    return results


def run(train: Path, tests: Sequence[Path], out: Path | None, threshold: int) -> None:
    """`mmoe data leakage`: print how many and which, write every number to ``out``."""
    results = compare(train, tests, threshold)
    for result in results:
        share = f"{result['leaked']} of {result['images']} images"
        print(f"{result['test']}: {share} are within {threshold} bits of one in {train}")
        for match in result["matches"][:SHOWN]:
            first, others = match["closest"][0], match["count"] - 1
            more = f", and {others} more" if others else ""
            print(f"  {match['test']} ~ {first['train']} ({first['bits']} bits){more}")
        if result["leaked"] > SHOWN:
            print(f"  and {result['leaked'] - SHOWN} images more")
        if result["bad"]:
            print(f"  {len(result['bad'])} could not be read")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
