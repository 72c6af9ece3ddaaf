"""Mixtures, tokenizers and pictures that somebody altered on purpose: each has a defined end."""

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pictures import encode, smooth
from sets import tokenizer

from mmoe.data.decoders import Decoder, View
from mmoe.data.decoders.dali import DaliDecoder
from mmoe.data.decoders.threads import ThreadDecoder
from mmoe.data.mixture import load_mixture
from mmoe.data.pixels import MAX_SCANS, MAX_SEGMENTS, BadImage, open_image
from mmoe.data.shipped import shipped
from mmoe.data.tokenizer import load_tokenizer
from mmoe.errors import UserError

pytestmark = pytest.mark.latest


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[[source]]\npath = "../a"', "leads out of data.root"),
        ('[[source]]\npath = "/etc"', "leads out of data.root"),
        ('[[source]]\npath = "a\\u001b[2J"', "leads out of data.root"),
        ('[[source]]\npath = "a"\nweight = 1e300', "at most 1e9"),
        (f"[[source]]\npath = 'a'\nweight = {'9' * 400}", "does not fit in 64 bits"),
        (f"[[source]]\npath = 'a'\nweight = 0x{'f' * 5000}", "does not fit in 64 bits"),
        ("source = [3]", "a source is 3"),
        ("x = " + "[" * 100_000, "nested too deeply"),
        ("#" * (1 << 18) + "\n", "more than 262144 bytes"),
    ],
)
def test_a_hostile_mixture(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "m.toml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        load_mixture(str(path))


def test_a_mixture_that_is_no_file_and_a_name_that_is_a_path(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "m.toml")
    with pytest.raises(UserError, match="no regular file"):
        load_mixture(str(tmp_path / "m.toml"))
    with pytest.raises(UserError, match="no shipped mixture"):
        shipped("mixtures", "../sources/stamps")


TOKENIZERS: dict[str, tuple[dict[str, Any], str]] = {
    "a pattern alone": (
        {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "a+$b"}, "behavior": "Isolated", "invert": False}},
        "its pre_tokenizer has no ByteLevel",
    ),
    "texts that grow": (
        {"normalizer": {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 99}},
        "its normalizer makes 99 characters of one",
    ),
    "padding without bound": (
        {
            "padding": {
                "strategy": {"Fixed": 2**40},
                "direction": "Right",
                "pad_to_multiple_of": None,
                "pad_id": 0,
                "pad_type_id": 0,
                "pad_token": "<pad>",
            }
        },
        "its padding is not absent",
    ),
    "texts cut": (
        {"truncation": {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}},
        "its truncation is not absent",
    ),
    "tokens drawn at random": (
        {"model": {"type": "BPE", "dropout": 0.5, "vocab": {"<pad>": 0}, "merges": []}},
        "its model.dropout is 0.5",
    ),
    "other texts": ({"normalizer": {"type": "Lowercase"}}, "its normalizer has a Lowercase"),
    "sequences without end": (
        {"normalizer": json.loads('{"type": "Sequence", "normalizers": [' * 9 + '{"type": "NFC"}' + "]}" * 9)},
        "its normalizer has a Sequence",
    ),
    "other texts back": (
        {"decoder": {"type": "CTC", "pad_token": "", "word_delimiter_token": "", "cleanup": True}},
        "its decoder has a CTC",
    ),
    "another model": (
        {"model": {"type": "WordLevel", "vocab": {"<pad>": 0}, "unk_token": "<pad>"}},
        "its model is a WordLevel",
    ),
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    tokenizer(tmp_path / "root")
    return tmp_path / "root"


def altered(root: Path, tmp_path: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    parts = json.loads((root / "tokenizer.json").read_text())
    change(parts)
    (tmp_path / "tokenizer.json").write_text(json.dumps(parts))
    return tmp_path / "tokenizer.json"


@pytest.mark.parametrize("case", TOKENIZERS)
def test_a_tokenizer_of_other_parts(root: Path, tmp_path: Path, case: str) -> None:
    parts, message = TOKENIZERS[case]
    with pytest.raises(UserError, match=message):
        load_tokenizer(altered(root, tmp_path, lambda made: made.update(parts)))


@pytest.mark.parametrize("number", [2**32 - 1, 5])
def test_a_token_beyond_the_vocabulary_or_twice(root: Path, tmp_path: Path, number: int) -> None:
    with pytest.raises(UserError, match="not numbered from 0 without gaps"):
        load_tokenizer(altered(root, tmp_path, lambda made: made["model"]["vocab"].update(zzz=number)))


@pytest.mark.parametrize("content", [b"[]", b"[" * 100_000, b"\xff\0", b"{}", b"9" * 5000])
def test_a_tokenizer_of_something_else(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "t.json").write_bytes(content)
    with pytest.raises(UserError, match="cannot read the tokenizer"):
        load_tokenizer(tmp_path / "t.json")


FORMS = [("JPEG", {}), ("JPEG", {"progressive": True}), *((form, {}) for form in ("PNG", "WEBP", "BMP", "TIFF", "PPM"))]
SEEDS = {f"{form} {options}": encode(smooth(1, 48, 40), form, **options) for form, options in FORMS}


@pytest.fixture(scope="module", params=["dali", "simplejpeg"])
def decoder(request: pytest.FixtureRequest) -> Decoder:
    return DaliDecoder(View((32,))) if request.param == "dali" else ThreadDecoder(View((32,)), 1, "simplejpeg")


@settings(derandomize=True, deadline=None, max_examples=300, suppress_health_check=list(HealthCheck))
@given(
    seed=st.sampled_from(sorted(SEEDS)),
    changes=st.lists(st.tuples(st.floats(0, 1), st.booleans(), st.binary(max_size=4)), min_size=1, max_size=5),
    end=st.none() | st.floats(0, 1),
)
def test_a_fuzzed_picture_costs_no_other(
    decoder: Decoder, seed: str, changes: list[tuple[float, bool, bytes]], end: float | None
) -> None:
    content = bytearray(SEEDS[seed])
    for place, early, replaced in changes:
        start = int(place * min(len(content) - 1, 100 if early else len(content)))
        content[start : start + len(replaced)] = replaced
    if end is not None:
        content = content[: int(end * len(content))]
    good = SEEDS["JPEG {}"]
    images, _, bad = decoder([good, bytes(content), good])
    pixels = images[32]
    assert set(bad) <= {1}
    assert pixels[0].any()
    assert (pixels[0] == pixels[2]).all()
    assert not bad or not pixels[1].any()


def test_a_jpeg_of_endless_scans_is_bad(decoder: Decoder) -> None:
    """100 scans of 31 bytes each took 6 s at 16 million pixels."""
    content = encode(smooth(1, 64, 64), "JPEG", progressive=True)
    scan = content[content.rfind(b"\xff\xda") : -2]
    *_, bad = decoder([content, content[:-2] + scan * MAX_SCANS + content[-2:]])
    assert list(bad) == [1]
    assert "scans" in bad[1]


@pytest.mark.parametrize("progressive", [False, True])
def test_what_is_no_scan_of_a_jpeg_is_not_counted(progressive: bool) -> None:
    """A motion photo's film, and an application's segment, hold any bytes."""
    content = encode(smooth(1, 64, 64), "JPEG", progressive=progressive)
    film = random.Random(0).randbytes(1 << 22)
    assert film.count(b"\xff\xda") > MAX_SCANS
    inside = b"\xff\xda" * 1000
    held = content[:2] + b"\xff\xef" + (len(inside) + 2).to_bytes(2) + inside + content[2:]
    assert open_image(content + film).size == open_image(held).size == (64, 64)


def test_a_jpeg_of_endless_segments_is_bad() -> None:
    content = encode(smooth(1, 64, 64), "JPEG")
    with pytest.raises(BadImage, match="segments"):
        open_image(content[:-2] + b"\xff\xfe\0\2" * MAX_SEGMENTS + content[-2:])
