"""Data sets that somebody altered on purpose: each has a defined end, and nothing outside of the folder is read."""

import copy
import gzip
import hashlib
import io
import json
import os
import shutil
import tarfile
import time
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sets import record, tokenizer, varied, write_mixture, write_set
from test_source import overwrite

from mmoe import reading
from mmoe.data import index as index_file
from mmoe.data.batch import illustrate
from mmoe.data.document import BadSample
from mmoe.data.index import read_index
from mmoe.data.lint import _record, lint
from mmoe.data.loader import Loader
from mmoe.data.shards import Sample, read_card
from mmoe.data.source import Encoded, Source
from mmoe.data.stats import report
from mmoe.errors import UserError
from mmoe.recipe.schema import Data

pytestmark = pytest.mark.latest
FUZZ = settings(derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("root")
    write_set(root, "a", varied(12, 1))
    write_mixture(root, a=1)
    return root


@pytest.fixture
def path(root: Path, tmp_path: Path) -> Path:
    """A copy of the data set that a test may alter."""
    shutil.copytree(root, tmp_path / "root")
    return tmp_path / "root" / "a"


def arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path / "index.npz") as file:
        return {name: file[name] for name in file.files}


def put(place: int, value: Any) -> Callable[[np.ndarray], np.ndarray]:
    def change(array: np.ndarray) -> np.ndarray:
        array[place] = value
        return array

    return change


INDEXES: dict[str, tuple[str, Callable[[np.ndarray], Any], str]] = {
    "negative shard": ("shard", put(3, -1), "shard is negative at sample-0003"),
    "no such shard": ("shard", put(3, 77), "sample-0003 is in shard 77 of 2"),
    "negative offset": ("json_offset", put(3, -1), "the json of sample-0003 lies outside of its shard"),
    "huge offset": ("json_offset", put(3, 2**63 - 1), "the json of sample-0003 lies outside of its shard"),
    "negative length": ("json_length", put(3, -1), "the json of sample-0003 lies outside of its shard"),
    "huge length": ("json_length", put(3, 2**31 - 1), "the json of sample-0003 lies outside of its shard"),
    "negative image offset": ("image_offset", put(0, -1), "the image of sample-0000 lies outside of its shard"),
    "huge image offset": ("image_offset", put(0, 2**62), "the image of sample-0000 lies outside of its shard"),
    "huge image length": ("image_length", put(0, 2**31 - 1), "the image of sample-0000 lies outside of its shard"),
    "bytes of many members": ("json_length", put(slice(0, 5), 9000), "the members of shard 0 have"),
    "negative tokens": ("prefix_tokens", put(3, -(2**31)), "prefix_tokens is negative at sample-0003"),
    "images not in order": ("image_start", put(3, 0), "image_start does not share out"),
    "more images than there are": ("image_start", put(-1, 2**40), "image_start does not share out"),
    "too few counts": ("image_start", lambda a: a[:-1], "image_start does not share out"),
    "not a number": ("json_offset", lambda a: a * np.nan, "json_offset is float64, expected int64"),
    "other byte order": ("json_offset", lambda a: a.astype(">i8"), "json_offset is >i8, expected int64"),
    "a table": ("json_offset", lambda a: a[:, None], r"json_offset has shape \(12, 1\), expected \(12,\)"),
    "one number": ("json_offset", lambda a: np.array(3), r"json_offset has shape \(\), expected \(12,\)"),
    "no array": ("json_offset", lambda a: None, "no array json_offset"),
    "objects": ("key", lambda a: np.array([print] * 12), "Object arrays cannot be loaded|holds object"),
    "text keys": ("key", lambda a: a.astype(str), "key must be a list of bytes"),
    "one key": ("key", lambda a: np.array(b"x"), "key must be a list of bytes"),
    "a path": ("key", put(3, b"../../x"), "a key holds letters"),
    "control characters": ("key", put(3, b"\x1b[2J\n"), "a key holds letters"),
    "zero within": ("key", put(3, b"a\0b"), "a key holds letters"),
    "no key": ("key", put(3, b""), "a key holds letters"),
    "long keys": ("key", lambda a: a.astype("S200") + b"x" * 120, "a key holds letters"),
    "two tokenizers": ("tokenizer", lambda a: np.array(["a", "b"]), "tokenizer a text"),
    "other format": ("format", lambda a: np.array(7, np.int32), "its format is 7, expected 1"),
    "fewer samples": ("key", lambda a: a[:5], r"shape \(12,\), expected \(5,\)|image_start"),
}


@pytest.mark.parametrize("case", INDEXES)
def test_an_index_that_contradicts_itself_or_its_card(path: Path, case: str) -> None:
    name, change, message = INDEXES[case]
    changed = arrays(path)
    changed[name] = change(changed[name])
    np.savez(path / "index.npz", **{name: array for name, array in changed.items() if array is not None})
    for read in (lambda: Source(path, "a"), lambda: report(path, path / "page.html")):
        with pytest.raises(UserError, match=message):
            read()
    if "object" not in case:
        assert lint(path)[0].where == "index.npz"


def entry(name: str, content: bytes, announced: int, kind: int) -> bytes:
    """A zip of one member whose directory says what it wants."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", kind) as parts:
        parts.writestr(name, content)
        parts.filelist[0].file_size = announced
    return file.getvalue()


def header(shape: str, dtype: str) -> bytes:
    text = f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    text = text.ljust(-(-(len(text) + 11) // 64) * 64 - 11) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


def twice(*names: str) -> bytes:
    """An archive of the same bytes under many names."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as parts, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parts.writestr(names[0], header("(1000,)", "<i4") + bytes(4000))
        first = parts.filelist[0]
        for name in names[1:]:
            parts.filelist.append(copy.copy(first))
            parts.filelist[-1].filename = name
    return file.getvalue()


DEEP = header("(" * 3000, "<i4")
DEFLATED, STORED = zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED
BOMBS: dict[str, tuple[bytes, str]] = {
    "zeros in little room": (
        entry("shard.npy", header("(4,)", "<i4") + bytes(1 << 24), 1 << 24, DEFLATED),
        "compressed, which the writer never does|larger than the file",
    ),
    "more announced than there": (entry("shard.npy", header(f"({2**60},)", "<i4"), 128, STORED), "announces"),
    "nothing, very often": (entry("shard.npy", header(f"({2**60},)", "|S0"), 128, STORED), "not numbers or text"),
    "negative shape": (entry("shard.npy", header("(-1, -4)", "<i4") + bytes(16), 144, STORED), "announces"),
    "objects": (entry("shard.npy", header("(1,)", "|O") + b"cos\nsystem\n(S'false'\ntR.", 152, STORED), "holds object"),
    "a deep header": (entry("shard.npy", DEEP, len(DEEP), STORED), "statement|parenthes|nested|header"),
    "no array": (entry("shard.npy", b"", 0, STORED), "EOF"),
    "an array twice": (twice("shard.npy", "shard.npy"), "an array is there twice"),
    "a name in two forms": (twice("shard.npy", "shard"), "an array is there twice"),
    "the same bytes, often": (twice("shard.npy", "key.npy", "format.npy"), "its arrays are larger than the file"),
    "no archive": (b"PK\x03\x04", "not a zip file"),
    "nothing": (b"", "not a zip file"),
}


@pytest.mark.parametrize("case", BOMBS)
def test_an_archive_that_is_larger_than_its_file(path: Path, case: str) -> None:
    content, message = BOMBS[case]
    (path / "index.npz").write_bytes(content)
    with pytest.raises(UserError, match=f"unreadable index: .*({message})"):
        Source(path, "a")


@FUZZ
@given(changes=st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=4)), min_size=1, max_size=6))
def test_a_fuzzed_index_is_refused_or_whole(root: Path, changes: list[tuple[float, bytes]]) -> None:
    content = bytearray((root / "a" / "index.npz").read_bytes())
    for place, replaced in changes:
        start = int(place * (len(content) - 1))
        content[start : start + len(replaced)] = replaced
    copy = root / "fuzzed"
    shutil.copytree(root / "a", copy, dirs_exist_ok=True)
    (copy / "index.npz").write_bytes(content)
    try:
        found = read_index(copy)
    except UserError:
        return
    assert found["key"].tolist() == arrays(root / "a")["key"].tolist()  # the archive's checksums are good


CARDS = {
    "empty": ("format = 1", "samples is None"),
    "of another format": ("format = 'x'", "data set format 'x'"),
    "numbers as text": ("samples = 12", "samples = '12'", "samples is '12', not a number"),
    "negative": ("samples = 12", "samples = -12", "samples is -12"),
    "true": ("samples = 12", "samples = true", "samples is True"),
    "no shards": ("[[shard]]", "[[other]]", "outside|is in shard"),
    "shards that are a number": (
        "format = 1\nsamples = 12\nsamples_per_shard = 6\nskipped = []\nshard = 3",
        "shard is 3, not a list",
    ),
    "shards that are numbers": (
        'format = 1\nname = ""\nsource = ""\nlicense = ""\ntokenizer = ""\nfingerprint = ""\n'
        "samples = 12\nsamples_per_shard = 6\nskipped = []\nshard = [3]",
        "file is None, not a str",
    ),
    "no size": ("bytes =", "octets =", "bytes is None"),
    "deep lists": ("[recipe]", "x = " + "[" * 100_000 + "\n[recipe]", "nested too deeply"),
    "a deep key": ("[recipe]", "a." * 50_000 + "b = 1\n[recipe]", "a key of more than 16 parts"),
    "a deep quoted key": ("[recipe]", "'a' . " * 50_000 + "b = 1\n[recipe]", "a key of more than 16 parts"),
    "a long number": ("samples = 12", "samples = " + "9" * 5000, "unreadable card"),
    "a long hexadecimal number": ("samples = 12", "samples = 0x" + "f" * 5000, "does not fit in 64 bits"),
    "a long format": ("format = 1", "format = 0x" + "f" * 5000, "does not fit in 64 bits"),
    "not UTF-8": ("name =", "\udcff =", "not UTF-8"),
}


@pytest.mark.parametrize("case", CARDS)
def test_a_card_of_another_form(path: Path, case: str) -> None:
    *changes, message = CARDS[case]
    card = path / "dataset.toml"
    text = card.read_text().replace(*changes) if len(changes) == 2 else changes[0]
    card.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=message):
        Source(path, "a")


def test_a_card_without_end(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmoe.data.shards.LARGEST_CARD", 100)
    with pytest.raises(UserError, match="more than 100 bytes"):
        read_card(path)


def test_links_to_files_elsewhere_are_followed(path: Path) -> None:
    """Clusters link a data set's files."""
    (path.parent / "store").mkdir()
    source = Source(path, "a")
    whole, found = source.read(0), lint(path)
    source.close()
    for file in list(path.iterdir()):
        file.rename(path.parent / "store" / file.name)
        file.symlink_to(path.parent / "store" / file.name)
    source = Source(path, "a")
    assert source.read(0) == whole
    source.close()
    assert lint(path) == found


@pytest.mark.parametrize("kind", ["device", "FIFO", "folder", "loop"])
def test_a_shard_that_is_no_file_ends_the_run(path: Path, kind: str) -> None:
    shard = path / "shard-000000.tar"
    shard.rename(path.parent / "outside.tar")
    if kind == "FIFO":
        os.mkfifo(shard)
    elif kind == "folder":
        shard.mkdir()
    else:
        shard.symlink_to(shard if kind == "loop" else "/dev/zero")
    source = Source(path, "a")
    with pytest.raises(UserError, match="a shard of the data set cannot be opened") as caught:
        source.read(0)
    assert caught.value.where == str(shard)
    source.close()
    assert any("shard-000000.tar" in problem.where for problem in lint(path))


def test_a_sample_larger_than_any_is_bad(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Source(path, "a")
    monkeypatch.setattr(index_file, "LARGEST_RECORD", 100)
    with pytest.raises(BadSample, match=r"bytes at \d+ of shard-000000.tar are more than 100"):
        source.read(0)
    source.close()


def hostile_records() -> dict[str, bytes]:
    image = b'{"image": 0}, '
    return {
        "deep": b'{"prefix": ' + b"[" * 3000 + b"]" * 3000 + b"}",
        "a long number": b'{"prefix": [{"image": ' + b"9" * 5000 + b"}]}",
        "a number without an index": b'{"prefix": [{"image": ' + b"9" * 4000 + b"}]}",
        "no number": b'{"prefix": [{"image": NaN}]}',
        "one image, often": b'{"prefix": [' + image * 5000 + b'{"text": "a"}]}',
        "half a character": b'{"prefix": [{"text": "\\ud800"}]}',
        "no list": b'{"prefix": {"image": 0}}',
    }


@pytest.mark.parametrize("case", hostile_records())
def test_a_hostile_record_is_a_bad_sample(root: Path, case: str) -> None:
    content = hostile_records()[case]
    if case in ("deep", "a long number"):
        with pytest.raises(ValueError, match=r"nested too deeply|digits"):
            reading.json_object(content)
        return
    sample = Encoded(record=reading.json_object(content), images=(b"",))
    with pytest.raises(BadSample):
        illustrate(sample, tokenizer(root), 10**9, "k")


WORDS = ["prefix", "branches", "image", "text", "prompt", "answer", "choices", "task", "loss", "source"]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.just("\ud800"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS), inner, max_size=3),
    max_leaves=6,
)


@FUZZ
@given(change=st.dictionaries(st.sampled_from(["prefix", "branches", "source", "category"]), VALUES, min_size=1))
def test_any_record_is_tokens_or_a_bad_sample(root: Path, change: dict[str, Any]) -> None:
    made = {**record(1), **change}
    try:
        found = illustrate(Encoded(record=made, images=(b"",)), tokenizer(root), 4, "k")
    except BadSample:
        return
    assert len(found.document.images) <= 1


@FUZZ
@given(branch=st.dictionaries(st.sampled_from(["prompt", "answer", "choices", "task"]), VALUES), prefix=VALUES)
def test_lint_reads_any_record(branch: dict[str, Any], prefix: Any) -> None:
    made = {**record(1), "prefix": prefix, "branches": [{"task": "t", "prompt": "p", "answer": " a", **branch}]}
    assert all(found for found in _record(Sample("k", made, [("", b"")])))


def test_lint_reads_many_words_and_choices_in_no_time() -> None:
    words = [f"w{i}" for i in range(50_000)]
    branch = {"task": "t", "prompt": " ".join(words), "answer": "w0", "choices": words}
    begin = time.process_time()
    assert not list(_record(Sample("k", {**record(1), "branches": [branch]}, [("", b"")])))
    assert time.process_time() - begin < 5


def test_lint_names_a_text_that_is_none(path: Path) -> None:
    overwrite(
        path, 3, "json", json.dumps({**record(1, branches=1), "prefix": [{"image": 0}, {"text": "\ud800"}]}).encode()
    )
    lines = iter((path / "dataset.toml").read_text().splitlines())
    digests = iter(hashlib.sha256(shard.read_bytes()).hexdigest() for shard in sorted(path.glob("*.tar")))
    sealed = [f'sha256 = "{next(digests)}"' if line.startswith("sha256") else line for line in lines]
    (path / "dataset.toml").write_text("\n".join(sealed))
    assert "sample-0003: a text is no Unicode" in map(str, lint(path))


TARS: dict[str, Callable[[tarfile.TarInfo], Any]] = {
    "a link": lambda member: setattr(member, "type", tarfile.SYMTYPE),
    "a device": lambda member: setattr(member, "type", tarfile.CHRTYPE),
    "a size below 0": lambda member: setattr(member, "size", -512),
    "a size beyond the file": lambda member: setattr(member, "size", 2**40),
    "a name that leads out": lambda member: setattr(member, "name", "../../k.json"),
}


@pytest.mark.parametrize("case", TARS)
def test_lint_walks_hostile_tars(path: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = path / "shard-000000.tar"
    content = bytearray(shard.read_bytes())
    member = tarfile.TarInfo.frombuf(bytes(content[:512]), "utf-8", "strict")
    TARS[case](member)
    content[:512] = member.tobuf(tarfile.GNU_FORMAT)
    shard.write_bytes(content)
    monkeypatch.setattr("mmoe.data.lint._files", lambda path, card: iter(()))  # the checksum would tell it first
    (problem,) = lint(path)
    assert problem.where == str(shard)
    assert "no regular file" in problem.what or "truncated" in problem.what or "the index has" in problem.what


def test_a_compressed_tar_is_not_unpacked(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (path / "shard-000000.tar").write_bytes(gzip.compress((path / "shard-000000.tar").read_bytes()))
    monkeypatch.setattr("mmoe.data.lint._files", lambda path, card: iter(()))
    assert "unreadable tar" in lint(path)[0].what


def test_the_stream_goes_on_over_a_hostile_sample(path: Path) -> None:
    """The picture and the record of one sample are noise; the others come through."""
    made = arrays(path)
    noise = np.random.default_rng(0)
    for part, row in (("json", 2), ("image", 0)):
        shard = path / f"shard-{int(made['shard'][2 if part == 'json' else 0]):06d}.tar"
        with shard.open("r+b") as file:
            file.seek(int(made[f"{part}_offset"][row]))
            file.write(noise.bytes(int(made[f"{part}_length"][row])))
    values = {"mixture": str(path.parent / "mixture.toml"), "root": str(path.parent)}
    data = Data(**values, sequence_length=256, images_per_pack=6)
    with Loader(data, image_tokens=4, image_sizes=(16,), micro_batch=2, global_batch=4, seed=0) as loader:
        skipped = {line.partition(":")[0] for _ in range(4) for line in next(loader)["skipped"]}
    owner = int(np.searchsorted(made["image_start"], 0, side="right")) - 1
    assert skipped == {"a/sample-0002", f"a/sample-{owner:04d}"}
