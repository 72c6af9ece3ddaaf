"""`mmoe data prepare`: its options, its messages, and what it leaves in the data root."""

import argparse
from pathlib import Path

import made_stamps
import pytest
from tokenizer_kinds import KINDS
from tokenizers import Tokenizer, models

from mmoe.data import prepare
from mmoe.data.document import tokenize
from mmoe.data.lint import lint
from mmoe.data.shards import read_card
from mmoe.data.source import Source
from mmoe.data.tokenizer import load_tokenizer
from mmoe.errors import UserError


@pytest.fixture
def stamps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Puts made stamps in the place of the package."""
    folder = tmp_path / "stamps"
    made_stamps.make_stamps(folder)
    monkeypatch.setattr(prepare, "load_card", made_stamps.card)
    monkeypatch.setattr(prepare, "fetch_stamps", lambda card: folder)
    return folder


def options(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    prepare.add_arguments(parser)
    return parser.parse_args(["--train", "40", "--test", "16", "--workers", "1", *arguments])


def test_both_data_sets_share_a_root_and_a_tokenizer(stamps: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    prepare.run("scenes", root, options())
    before = (root / "tokenizer.json").read_bytes()
    prepare.run("stamps", root, options())
    assert (root / "tokenizer.json").read_bytes() == before
    sets = sorted(path.parent.relative_to(root).as_posix() for path in root.rglob("index.npz"))
    assert sets == ["scenes/heldout", "scenes/test", "scenes/train", "stamps/heldout", "stamps/train"]
    assert [read_card(root / name)["samples"] for name in sets[:3]] == [16, 16, 40]
    for name in sets:
        assert lint(root / name) == []


def test_skipped_stamps_are_counted(stamps: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare.run("stamps", tmp_path / "root", options())
    lines = [line for line in capsys.readouterr().out.splitlines() if "skipped" in line]
    assert sum(int(line.split()[1]) for line in lines) == 4
    assert all(Path(line.split()[-1]).is_file() for line in lines)


def test_another_card_makes_the_data_again(
    stamps: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare.run("stamps", tmp_path / "root", options())
    prepare.run("stamps", tmp_path / "root", options())
    assert capsys.readouterr().out.count("up to date") == 2
    monkeypatch.setattr(prepare, "load_card", lambda: made_stamps.card() | {"license": "MIT"})
    prepare.run("stamps", tmp_path / "root", options())
    assert "up to date" not in capsys.readouterr().out
    assert read_card(tmp_path / "root" / "stamps" / "train")["license"] == "MIT"


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("pictures", (), "nothing is known of a data set called 'pictures': prepare one of stamps, scenes, cv_bench"),
        ("scenes", ("--train", "0"), "--train must be at least 1"),
        ("scenes", ("--test", "-3"), "--test must be at least 1"),
        ("scenes", ("--size", "8"), "--size must be at least 16"),
        ("stamps", ("--workers", "0"), "--workers must be at least 1"),
    ],
)
def test_bad_options_are_the_users_errors(tmp_path: Path, name: str, arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        prepare.run(name, tmp_path / "root", options(*arguments))
    assert not (tmp_path / "root").exists()


def test_a_published_tokenizer_counts_the_tokens(
    stamps: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What stands in the data root is that file; data sets made with another one have to be made again."""
    root, published = tmp_path / "root", tmp_path / "tokenizer.json"
    special = KINDS["sentencepiece"](published)
    prepare.run("scenes", root, options("--tokenizer", str(published)))
    assert (root / "tokenizer.json").read_bytes() == published.read_bytes()
    assert lint(root / "scenes/train") == []
    source = Source(root / "scenes/train", "scenes/train")
    document = tokenize(source.read(0).record, load_tokenizer(published, special), 0)
    assert len(document) == source.lengths(0).tokens[0]
    prepare.run("scenes", root, options("--tokenizer", str(published)))
    assert capsys.readouterr().out.count("up to date") == 3
    prepare.run("scenes", root, options())
    told = capsys.readouterr().out
    assert "is another tokenizer than before: what is prepared with that one has to be prepared again" in told
    assert "up to date" not in told


def test_a_tokenizer_that_cannot_read_every_text(stamps: Path, tmp_path: Path) -> None:
    """Is refused before anything is written."""
    words = tmp_path / "words.json"
    Tokenizer(models.WordLevel({"a": 0}, "a")).save(str(words))
    with pytest.raises(UserError, match="its model is a WordLevel"):
        prepare.run("scenes", tmp_path / "root", options("--tokenizer", str(words)))
    with pytest.raises(UserError, match="no such tokenizer"):
        prepare.run("scenes", tmp_path / "root", options("--tokenizer", str(tmp_path / "none.json")))
    assert not (tmp_path / "root").exists()
