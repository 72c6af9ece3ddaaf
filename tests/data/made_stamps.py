"""Stamps made on the spot: coloured shapes on transparent ground, with captions, laid out as the package's are."""

from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from mmoe.data.prepare.catalogue import Catalogue, load_catalogue

LABELS = ("ant", "bee", "cow", "dog", "elk", "fox", "gnu", "hen")
COLOURS = (
    (250, 0, 0),
    (0, 250, 0),
    (0, 0, 250),
    (250, 250, 0),
    (250, 0, 250),
    (0, 250, 250),
    (250, 250, 250),
    (9, 9, 9),
)
STAMPS_PER_LABEL = 4


def card() -> dict[str, Any]:
    return {
        "name": "made",
        "license": "CC0-1.0",
        "languages": ["en", "de", "ja"],
        "package": {"sha256": "0" * 64},
        "held_out": {"salt": "test", "class_share": 0.25, "other_share": 0.3},
        "class": [{"name": label, "plural": f"{label}s", "files": [f"animals/{label}*.png"]} for label in LABELS],
    }


def draw(path: Path, size: tuple[int, int], colour: tuple[int, int, int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGBA", (size[0] + 6, size[1] + 6))
    ImageDraw.Draw(image).ellipse((3, 3, size[0] + 3, size[1] + 3), fill=(*colour, 255))
    image.save(path)


def make_stamps(root: Path) -> None:
    """Eight classes of four ellipses, a mirrored variant, and stamps of no class."""
    for label, colour in zip(LABELS, COLOURS, strict=True):
        for number in range(STAMPS_PER_LABEL):
            path = root / "animals" / f"{label}{number}.png"
            draw(path, (40, 30 + 10 * number), colour)
            path.with_suffix(".txt").write_text(
                f"A {label}.\nde.utf8=Ein {label}.\nfr.utf8=Le {label}.\nja.utf8=しま\n", encoding="utf-8"
            )
    draw(root / "animals" / "ant0_mirror.png", (40, 30), COLOURS[0])
    for number in range(20):
        path = root / "things" / f"thing{number}.png"
        draw(path, (400, 100), (90, 60, 30))
        path.with_suffix(".txt").write_text(f"Thing {number}.", encoding="utf-8")
    (root / "things" / "thing0.txt").write_bytes(b"Thing 0.\nde.utf8=Ding \xff\xfe\n")
    (root / "things" / "thing1.txt").unlink()
    Image.new("RGBA", (9, 9)).save(root / "things" / "thing2.png")
    (root / "things" / "thing3.png").write_bytes(b"no picture")


def make_catalogue(root: Path) -> Catalogue:
    """The catalogue of :func:`make_stamps` under ``root``."""
    if not root.exists():
        make_stamps(root)
    return load_catalogue(root, card())
