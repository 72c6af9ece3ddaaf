"""Reading prepared data sets: the lengths, the parts, and what is broken on disk."""

from pathlib import Path

import numpy as np
import pytest
from sets import record, tokenizer, varied, write_set

from mmoe.data.document import BadSample, tokenize
from mmoe.data.shards import Sample
from mmoe.data.source import Source, name_of
from mmoe.errors import UserError


@pytest.fixture
def samples():
    return varied(25)


@pytest.fixture
def path(tmp_path, samples):
    return write_set(tmp_path, "made/train", samples)


def overwrite(path, sample_number: int, what: str, content: bytes) -> None:
    """Puts other bytes where the index says that a part of a sample lies."""
    with np.load(path / "index.npz") as index:
        row = int(index["image_start"][sample_number]) if what == "image" else sample_number
        offset, length = int(index[f"{what}_offset"][row]), int(index[f"{what}_length"][row])
        shard = int(index["shard"][sample_number])
    with (path / f"shard-{shard:06d}.tar").open("r+b") as file:
        file.seek(offset)
        file.write(content[:length].ljust(length))


def test_every_sample_comes_back(path, samples):
    source = Source(path, "made/train")
    assert len(source) == 25
    for i in (24, 0, 9, 10, 13):
        read = source.read(i)
        assert source.key(i) == f"made/train/{samples[i].key}"
        assert read.record == samples[i].record
        assert read.images == tuple(image for _, image in samples[i].images)


def test_lengths_are_those_of_the_documents(path, samples, tmp_path):
    lengths = Source(path, "made/train").lengths(7)
    tok = tokenizer(tmp_path)
    assert lengths.tokens.tolist() == [len(tokenize(sample.record, tok, 7)) for sample in samples]
    assert lengths.images.tolist() == [len(sample.images) for sample in samples]


def test_a_missing_data_set_names_the_command(tmp_path):
    data = tmp_path / "data"
    for name in ("scenes/train", "scenes"):
        with pytest.raises(UserError) as error:
            Source(data / name, name)
        assert str(error.value).endswith(f"make it with `mmoe data prepare scenes {data}`")


def test_a_missing_data_set_in_the_current_folder_is_named(tmp_path, monkeypatch):
    (tmp_path / "scenes").mkdir()
    monkeypatch.chdir(tmp_path / "scenes")
    assert name_of(Path("train")) == name_of(tmp_path / "scenes" / "train") == "scenes/train"
    with pytest.raises(UserError, match=rf"\(train\): make it with `mmoe data prepare scenes {tmp_path}`"):
        Source(Path("train"), name_of(Path("train")))


@pytest.mark.parametrize("path", [Path("/"), Path("/usr")])
def test_what_no_command_makes_is_asked_for(path):
    with pytest.raises(UserError, match="give a folder that `mmoe data prepare` made"):
        Source(path, name_of(path))


def test_a_data_set_without_samples_is_refused(tmp_path):
    path = write_set(tmp_path, "one", [Sample("k", record(0), [])])
    with np.load(path / "index.npz") as index:
        arrays = {name: index[name][:0] if index[name].ndim else index[name] for name in index.files}
    np.savez(path / "index.npz", **(arrays | {"image_start": np.zeros(1, np.int64)}))
    card = (path / "dataset.toml").read_text()
    (path / "dataset.toml").write_text(card.replace("samples = 1", "samples = 0"))
    with pytest.raises(UserError, match="no samples"):
        Source(path, "one")


def test_a_truncated_shard_is_bad_from_there_on(path):
    shard = path / "shard-000001.tar"
    with np.load(path / "index.npz") as index:
        middle = int(index["json_offset"][15]) + 5
    with shard.open("r+b") as file:
        file.truncate(middle)
    source = Source(path, "made/train")
    source.read(14)
    for i in (15, 16, 19):
        with pytest.raises(BadSample, match=r"shard-000001.tar is truncated"):
            source.read(i)
    source.read(20)


def test_a_missing_shard_is_more_than_a_bad_sample(path):
    (path / "shard-000002.tar").unlink()
    source = Source(path, "made/train")
    source.read(19)
    with pytest.raises(UserError, match=r"shard of the data set is gone .*shard-000002\.tar"):
        source.read(20)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"prefix": [{"text": "caf\xe9"}]}', "not UTF-8"),
        (b"\xff\xfe", "not UTF-8"),
        (b'{"prefix": [', "no JSON:"),
        (b"[" * 100_000, "no JSON:"),
        (b"[1, 2]", "no JSON object"),
    ],
)
def test_a_broken_record_is_bad(path, content, message):
    overwrite(path, 3, "json", content)
    with pytest.raises(BadSample, match=message):
        Source(path, "made/train").read(3)


def test_close_lets_the_files_be_opened_again(path, samples):
    source = Source(path, "made/train")
    source.read(0)
    source.close()
    assert source.read(0).record == samples[0].record
    source.close()
