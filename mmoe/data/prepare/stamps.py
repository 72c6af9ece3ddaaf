"""Stamps as samples: the picture on white, and its captions in several languages as branches."""

import io
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from mmoe.data.prepare.catalogue import Catalogue, Stamp
from mmoe.data.prepare.compose import cut
from mmoe.data.shards import Sample

STAMPS_VERSION = 2
"""Of the samples' contents: raise it when the same stamps give other samples."""
LONGEST_SIDE = 256
CAPTION_BYTES = 300
"""Captions of a sample, in UTF-8 together: a stamp with more has several samples, so that each fits a short pack."""


@dataclass(frozen=True)
class StampMaker:
    """Makes sample ``index`` of one side of the split: a stamp with the captions that it holds there."""

    root: Path
    stamps: tuple[Stamp, ...]
    license: str

    def __call__(self, index: int) -> Sample:
        stamp = self.stamps[index]
        with Image.open(self.root / stamp.path) as image:
            whole = cut(image)
        whole.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
        page = Image.new("RGB", whole.size, "white")
        page.paste(whole, mask=whole.getchannel("A"))
        file = io.BytesIO()
        page.save(file, "PNG")
        record = {
            "source": "stamps",
            "license": self.license,
            "category": stamp.category,
            "prefix": [{"image": 0}],
            "branches": [
                {"task": f"caption_{language}", "prompt": f"describe in {language} :", "answer": f" {caption}"}
                for language, caption in stamp.captions.items()
            ],
            "truth": {"stamp": stamp.path},
        }
        return Sample(f"stamps-{index:05d}", record, [("png", file.getvalue())])


def parts(stamp: Stamp) -> list[Stamp]:
    """The stamp, its captions shared out among as many samples as :data:`CAPTION_BYTES` asks for."""
    groups: list[dict[str, str]] = [{}]
    taken = 0
    for language, caption in stamp.captions.items():
        size = len(caption.encode())
        if groups[-1] and taken + size > CAPTION_BYTES:
            groups.append({})
            taken = 0
        groups[-1][language] = caption
        taken += size
    return [replace(stamp, captions=captions) for captions in groups]


def usable(catalogue: Catalogue, *, held_out: bool) -> tuple[tuple[Stamp, ...], list[str]]:
    """The stamps of one side that have a caption and a visible picture; and the others, each with the reason."""
    members = [stamp for stamp in catalogue.stamps if stamp.held_out == held_out]
    paths = {stamp.path for stamp in members}
    good, skipped = [], [line for line in catalogue.skipped if line.partition(":")[0] in paths]
    for stamp in members:
        if not stamp.captions:
            skipped.append(f"{stamp.path}: no caption")
            continue
        try:
            with Image.open(catalogue.root / stamp.path) as image:
                visible = image.convert("RGBA").getchannel("A").getbbox() is not None
        except OSError as error:
            skipped.append(f"{stamp.path}: {error}")
            continue
        if visible:
            good.append(stamp)
        else:
            skipped.append(f"{stamp.path}: fully transparent")
    return tuple(good), skipped
