"""A checkpoint is whole, or refused by the name of the file that is not."""

import json
from pathlib import Path

import pytest

from mmoe.checkpoint import layout
from mmoe.errors import UserError


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = layout.folder(tmp_path, 7)
    (folder / "state").mkdir(parents=True)
    (folder / "state" / "weights").write_bytes(bytes(range(256)) * 8)
    (folder / "progress.json").write_text("{}")
    layout.write_manifest(folder)
    return folder


def test_newest_is_the_one_named_or_else_the_last(checkpoint: Path, tmp_path: Path) -> None:
    layout.verify(checkpoint)
    later = layout.folder(tmp_path, 9)
    later.mkdir()
    layout.folder(tmp_path, 10).with_name(".step_00000010.tmp").mkdir()
    layout.point_to(checkpoint)
    assert layout.newest(tmp_path) == checkpoint
    (checkpoint.parent / "latest").unlink()
    assert layout.newest(tmp_path) == later
    assert layout.newest(tmp_path / "other") is None


def test_an_older_one_is_offered(checkpoint: Path, tmp_path: Path) -> None:
    later = layout.folder(tmp_path, 9)
    later.mkdir()
    with pytest.raises(UserError, match="move this folder away to go on from step_00000007"):
        layout.verify(later)


@pytest.mark.parametrize("name", ["state/weights", "progress.json"])
def test_missing_file(checkpoint: Path, name: str) -> None:
    (checkpoint / name).unlink()
    with pytest.raises(UserError, match=f"lacks {name}"):
        layout.verify(checkpoint)


def test_one_flipped_bit(checkpoint: Path) -> None:
    path = checkpoint / "state" / "weights"
    content = bytearray(path.read_bytes())
    content[1000] ^= 4
    path.write_bytes(content)
    with pytest.raises(UserError, match="state/weights was altered"):
        layout.verify(checkpoint)


@pytest.mark.parametrize("content", ["", "[]", "{}", json.dumps({"files": 3})])
def test_broken_manifest(checkpoint: Path, content: str) -> None:
    (checkpoint / layout.MANIFEST).write_text(content)
    with pytest.raises(UserError, match="manifest"):
        layout.verify(checkpoint)


def test_no_manifest_and_no_folder(checkpoint: Path) -> None:
    (checkpoint / layout.MANIFEST).unlink()
    with pytest.raises(UserError, match=r"without manifest\.json"):
        layout.verify(checkpoint)
    with pytest.raises(UserError, match="no checkpoint"):
        layout.verify(checkpoint.parent / "step_00000008")
