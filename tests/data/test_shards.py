"""The format on disk: what is written is found again, by offset and by any tar reader."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer
from webdataset import tariterators

from mmoe.data.document import tokenize
from mmoe.data.index import read_arrays, read_index, read_sample
from mmoe.data.shards import (
    DatasetWriter,
    Description,
    Sample,
    is_dataset,
    read_card,
    shard_name,
    text_tokens,
    token_counter,
    write_shard,
)
from mmoe.data.tokenizer import Vocabulary, read_tokenizer, train_tokenizer
from mmoe.errors import UserError
from mmoe.recipe.tokens import OURS


def picture(value: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 6), (value, 0, 255)).save(file, "PNG")
    return file.getvalue()


def sample(number: int, images: int) -> Sample:
    record = {
        "source": "made",
        "license": "CC0-1.0",
        "category": "ungerade" if number % 2 else "gerade",
        "prefix": [{"text": "Zahl α :"}, *({"image": i} for i in range(images))],
        "branches": [{"task": "n", "prompt": f"welche {i} ?", "answer": f" {number}"} for i in range(number % 3)],
        "truth": {"number": number},
    }
    return Sample(f"made-{number:03d}", record, [("png", picture(10 * number + i)) for i in range(images)])


SAMPLES = [sample(number, images) for number, images in enumerate([1, 0, 3, 1, 0, 2, 1])]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(["Zahl α : welche 0 ?"], 280).save(str(path))
    return read_tokenizer(path)


def describe(**changes: Any) -> Description:
    values: dict[str, Any] = {
        "name": "made/train",
        "source": "made",
        "license": "CC0-1.0",
        "samples": len(SAMPLES),
        "samples_per_shard": 3,
        "tokenizer": "f" * 64,
        "recipe": {"version": 1},
    }
    return Description(**values | changes)


def write(out: Path, tokenizer: Tokenizer) -> DatasetWriter:
    writer = DatasetWriter(out, describe())
    writer.open()
    count = token_counter(tokenizer)
    for number in writer.missing:
        shard = writer.description.shards[number]
        write_shard(writer.folder / shard_name(number), (SAMPLES[i] for i in shard), count)
    writer.finish(["x.png: no caption", 'a "quoted" näme'])
    return writer


@pytest.fixture
def path(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    write(tmp_path / "made" / "train", tokenizer)
    return tmp_path / "made" / "train"


def test_every_sample_is_found_by_its_offsets(path: Path) -> None:
    index = read_index(path)
    assert [key.decode() for key in index["key"]] == [made.key for made in SAMPLES]
    assert index["shard"].tolist() == [0, 0, 0, 1, 1, 1, 2]
    for number, made in enumerate(SAMPLES):
        found = read_sample(path, index, number)
        assert found.record == made.record
        assert [content for _, content in found.images] == [content for _, content in made.images]


def test_the_tars_are_webdataset(path: Path) -> None:
    found: list[dict[str, Any]] = []
    for number in range(3):
        with (path / shard_name(number)).open("rb") as file:
            members = tariterators.tar_file_expander([{"url": file.name, "stream": file}])
            found += tariterators.group_by_keys(members)
    assert [entry["__key__"] for entry in found] == [made.key for made in SAMPLES]
    for entry, made in zip(found, SAMPLES, strict=True):
        assert json.loads(entry["json"]) == made.record
        assert [entry[f"{i}.png"] for i in range(len(made.images))] == [content for _, content in made.images]


def test_the_index_counts_the_documents_tokens(path: Path, tokenizer: Tokenizer) -> None:
    index = read_index(path)
    for number, made in enumerate(SAMPLES):
        for image_tokens in (0, 16):
            text = int(index["prefix_tokens"][number] + index["branch_tokens"][number])
            document = tokenize(made.record, Vocabulary(tokenizer, OURS), image_tokens)
            assert len(document) == 1 + len(made.images) * image_tokens + text
    assert text_tokens(SAMPLES[2].record, len) == (len("Zahl α :"), 2 * (len("welche 0 ?") + len(" 2") + 1))


def test_the_card_says_what_was_made(path: Path) -> None:
    card = read_card(path)
    assert (card["samples"], card["license"], card["tokenizer"]) == (len(SAMPLES), "CC0-1.0", "f" * 64)
    assert card["skipped"] == ["x.png: no caption", 'a "quoted" näme']
    assert [shard["bytes"] for shard in card["shard"]] == [(path / shard_name(n)).stat().st_size for n in range(3)]
    assert sorted(file.name for file in path.iterdir()) == ["dataset.toml", "index.npz", *map(shard_name, range(3))]


def test_the_same_samples_give_the_same_bytes(path: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    write(tmp_path / "again", tokenizer)
    for file in path.iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes(), file.name


def test_a_description_tells_what_is_up_to_date(path: Path) -> None:
    assert DatasetWriter(path, describe()).up_to_date
    for changes in ({"samples": 6}, {"tokenizer": "0" * 64}, {"recipe": {"version": 2}}, {"name": "other"}):
        assert not DatasetWriter(path, describe(**changes)).up_to_date


@pytest.mark.parametrize("what", ["a damaged card", "no data set", "a file"])
def test_what_cannot_be_read_is_not_removed(path: Path, what: str) -> None:
    if what == "a damaged card":
        (path / "dataset.toml").write_text("samples = ")
    elif what == "no data set":
        (path / "dataset.toml").unlink()
    else:
        path = path / "dataset.toml"
    with pytest.raises(UserError, match="move it away"):
        assert DatasetWriter(path, describe()).up_to_date


def test_nothing_is_not_up_to_date(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("empty", "none"):
        assert not DatasetWriter(tmp_path / name, describe()).up_to_date


def test_a_data_set_is_not_there_before_all_of_it_is(tmp_path: Path, tokenizer: Tokenizer) -> None:
    out = tmp_path / "set"
    writer = DatasetWriter(out, describe())
    writer.open()
    write_shard(writer.folder / shard_name(1), (SAMPLES[i] for i in range(3, 6)), token_counter(tokenizer))
    assert writer.missing == [0, 2]
    assert not is_dataset(out)
    with pytest.raises(FileNotFoundError):
        writer.finish()
    assert not out.exists()


def test_a_shard_that_fails_leaves_no_tar(tmp_path: Path, tokenizer: Tokenizer) -> None:
    def failing():
        yield SAMPLES[0]
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        write_shard(tmp_path / shard_name(0), failing(), token_counter(tokenizer))
    assert not (tmp_path / shard_name(0)).exists()
    assert not (tmp_path / shard_name(0)).with_suffix(".npz").exists()


def test_leftovers_of_other_descriptions_are_removed(tmp_path: Path) -> None:
    old = DatasetWriter(tmp_path / "set", describe(samples=5))
    old.open()
    new = DatasetWriter(tmp_path / "set", describe())
    new.open()
    assert new.folder.is_dir()
    assert not old.folder.exists()


def test_a_finished_set_replaces_the_old_one(path: Path, tokenizer: Tokenizer) -> None:
    (path / "stray").write_text("old")
    write(path, tokenizer)
    assert not (path / "stray").exists()
    assert is_dataset(path)


def test_no_data_set_and_another_format_are_the_users_errors(path: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no data set here"):
        read_card(tmp_path)
    card = (path / "dataset.toml").read_text()
    (path / "dataset.toml").write_text(card.replace("format = 1", "format = 99"))
    with pytest.raises(UserError, match="data set format 99, expected 1"):
        read_card(path)
    (path / "dataset.toml").write_text("format = ")
    with pytest.raises(UserError, match="unreadable card"):
        read_card(path)
    (path / "index.npz").write_bytes(b"PK\x03\x04")
    with pytest.raises(UserError, match="unreadable index"):
        read_arrays(path)


def test_a_shard_of_nothing_but_text_has_no_images(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_shard(tmp_path / shard_name(0), [SAMPLES[1], SAMPLES[4]], token_counter(tokenizer))
    with np.load(tmp_path / "shard-000000.npz") as part:
        assert part["image_offset"].shape == (0,)
        assert part["images"].tolist() == [0, 0]
    with tarfile.open(tmp_path / shard_name(0)) as tar:
        assert tar.getnames() == ["made-001.json", "made-004.json"]
