"""Packed documents with their images → the batch that the model takes."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mmoe.data.decoders import Decoded, Decoder
from mmoe.data.document import BadSample, Document, tokenize
from mmoe.data.features import Cached
from mmoe.data.pack import assemble
from mmoe.data.source import Encoded
from mmoe.data.tokenizer import Vocabulary
from mmoe.errors import UserError

Batch = dict[str, Any]
"""The dict that `docs/architecture.md` describes."""


@dataclass(frozen=True, kw_only=True)
class Illustrated:
    """A document with the images of its sample, still encoded."""

    document: Document
    images: tuple[bytes, ...] = ()
    first: tuple[int, int] = (0, 0)
    """The place of its data set in the mixture, and the number in it of the sample's first image."""
    problem: str = ""
    """Why the sample is bad, where that is known before decoding; the document then holds its place."""


def illustrate(sample: Encoded, tokenizer: Vocabulary, image_tokens: int, key: str) -> Illustrated:
    """The document of a sample as it was read.

    Raises:
        BadSample: the record is not of the right form, or shows an image that the sample does not have or one twice.
    """
    prefix, there = sample.record.get("prefix"), len(sample.images)
    parts = prefix if isinstance(prefix, list) else []
    shown = [part["image"] for part in parts if isinstance(part, dict) and "image" in part]
    for i in shown:
        if type(i) is not int:
            raise BadSample("an image is named by something else than a number")
        if not 0 <= i < there:
            raise BadSample(f"image {i} is named but not there, of {there}")
    # Before its tokens are made: 12 bytes of JSON that show an image again would become image_tokens of them.
    if len(shown) > len(set(shown)):
        raise BadSample("it shows an image twice")
    return Illustrated(document=tokenize(sample.record, tokenizer, image_tokens, key=key), images=sample.images)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors, those of its images among them, on ``device``."""

    def moved(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: moved(part) for name, part in value.items()}
        if isinstance(value, list):
            return [moved(part) for part in value]
        return value.to(device) if torch.is_tensor(value) else value

    return moved(batch)


def pictures(packs: Sequence[Sequence[Illustrated]]) -> list[bytes]:
    """The images of packed documents, in the order of their ``<image>`` runs."""
    return [item.images[i] for pack in packs for item in pack for i in item.document.images]


def places(packs: Sequence[Sequence[Illustrated]]) -> list[tuple[int, int]]:
    """Where the features of their :func:`pictures` are cached: data set and number in it."""
    return [(item.first[0], item.first[1] + i) for pack in packs for item in pack for i in item.document.images]


def collate(
    packs: Sequence[Sequence[Illustrated]], sequence_length: int, decoded: Decoded, cached: Cached | None = None
) -> tuple[Batch, list[str]]:
    """One batch of documents that are already packed.

    A document with a bad image keeps its tokens, but nothing of it is trained on and its images become zeros.

    Args:
        packs: the documents.
        sequence_length: tokens in a pack.
        decoded: their :func:`pictures`, or none where every encoder's features are cached.
        cached: features of the images at their :func:`places`.

    Returns:
        the batch, and for each document in order what is wrong with it, ``""`` for nothing. The batch's ``skipped``
        names the documents with something wrong, ``key: reason``.
    """
    images, sizes, bad = decoded
    if cached is not None:
        sizes, bad = cached.sizes, bad | cached.bad
    rows: list[list[Document]] = []
    problems: list[str] = []
    skipped: list[str] = []
    start = 0
    for pack in packs:
        rows.append([])
        for item in pack:
            document, problem = item.document, item.problem
            here = range(start, start := start + len(document.images))
            culprit = next((i for i in here if i in bad), None)
            if culprit is not None:
                problem = f"image {document.images[culprit - here.start]}: {bad[culprit]}"
                document = document.without_loss()
                for pixels in images.values():
                    pixels[here.start : here.stop] = 0
                if cached is not None:
                    cached.clear(here)
            if problem:
                skipped.append(f"{document.key}: {problem}")
            rows[-1].append(document)
            problems.append(problem)
    batch = {**assemble(rows, sequence_length), "images": images, "original_sizes": sizes, "skipped": skipped}
    if cached is not None:
        batch["features"] = cached.features
    return batch, problems


def batches_from_documents(
    documents: Iterable[Illustrated], *, decoder: Decoder, sequence_length: int, packs: int, images_per_pack: int
) -> Iterator[Batch]:
    """Packs documents in the order in which they come, for evaluation; every batch but the last has ``packs`` packs.

    Raises:
        UserError: a document fits in no pack.
    """
    rows: list[list[Illustrated]] = [[]]
    tokens = images = 0
    for item in documents:
        length, shown = len(item.document), len(item.document.images)
        if length > sequence_length or shown > images_per_pack:
            raise UserError(
                f"a document has {length} tokens and {shown} images, a pack holds {sequence_length} and"
                f" {images_per_pack}",
                item.document.key,
                "raise data.sequence_length or data.images_per_pack",
            )
        if tokens + length > sequence_length or images + shown > images_per_pack:
            if len(rows) == packs:
                yield collate(rows, sequence_length, decoder(pictures(rows)))[0]
                rows = []
            rows.append([])
            tokens = images = 0
        rows[-1].append(item)
        tokens, images = tokens + length, images + shown
    if rows[-1]:
        yield collate(rows, sequence_length, decoder(pictures(rows)))[0]
