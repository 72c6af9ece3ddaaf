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
    layout.write_manifest(folder, layout.entries(folder, [folder / "state" / "weights"]))
    return folder


def test_newest_is_the_one_named_or_else_the_last(checkpoint: Path, tmp_path: Path) -> None:
    assert layout.verify(checkpoint) == 2
    later = layout.folder(tmp_path, 9)
    later.mkdir()
    layout.folder(tmp_path, 10).with_name(".step_00000010.tmp").mkdir()
    layout.point_to(checkpoint)
    assert layout.newest(tmp_path) == checkpoint
    (checkpoint.parent / "latest").unlink()
    assert layout.newest(tmp_path) == later
    assert layout.newest(tmp_path / "other") is None


@pytest.mark.parametrize("text", ["../elsewhere", "/etc", "", ".step_00000010.tmp", "step_00000099"])
def test_a_latest_that_names_no_checkpoint_is_passed_over(checkpoint: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "elsewhere").mkdir()
    layout.folder(tmp_path, 10).with_name(".step_00000010.tmp").mkdir()
    (checkpoint.parent / "latest").write_text(text + "\n")
    assert layout.newest(tmp_path) == checkpoint


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


def test_ranks_share_the_files(checkpoint: Path) -> None:
    (checkpoint / "state" / "weights").write_bytes(b"altered")
    assert layout.verify(checkpoint, 0, 2) == 2
    with pytest.raises(UserError, match="state/weights was altered"):
        layout.verify(checkpoint, 1, 2)


@pytest.mark.parametrize("content", ["", "[]", "{}", json.dumps({"files": 3})])
def test_broken_manifest(checkpoint: Path, content: str) -> None:
    (checkpoint / layout.MANIFEST).write_text(content)
    with pytest.raises(UserError, match="manifest"):
        layout.verify(checkpoint)


@pytest.mark.parametrize("name", ["../other", "/etc/hostname", "state/../../other", "link"])
def test_a_manifest_that_leads_elsewhere(checkpoint: Path, name: str) -> None:
    (checkpoint.parent / "other").write_text("secret")
    (checkpoint / "link").symlink_to(checkpoint.parent / "other")
    (checkpoint / layout.MANIFEST).write_text(json.dumps({"files": {name: {"bytes": 6, "sha256": ""}}}))
    with pytest.raises(UserError, match="not in the checkpoint"):
        layout.verify(checkpoint)


def test_no_manifest_and_no_folder(checkpoint: Path) -> None:
    (checkpoint / layout.MANIFEST).unlink()
    with pytest.raises(UserError, match=r"without manifest\.json"):
        layout.verify(checkpoint)
    with pytest.raises(UserError, match="no checkpoint"):
        layout.verify(checkpoint.parent / "step_00000008")


def test_what_the_ranks_have_hashed_is_not_hashed_again(checkpoint: Path) -> None:
    known = {"state/weights": {"bytes": 1, "sha256": "of a rank"}}
    layout.write_manifest(checkpoint, known)
    files = json.loads((checkpoint / layout.MANIFEST).read_text())["files"]
    assert files == known | layout.entries(checkpoint, [checkpoint / "progress.json"])


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "gone"),
    [(0, 0, []), (2, 0, [5, 10, 15, 20]), (1, 10, [5, 15, 25]), (9, 0, []), (3, 15, [5, 10])],
)
def test_what_is_kept(tmp_path: Path, keep_last: int, keep_every: int, gone: list[int]) -> None:
    for step in (25, 5, 10, 15, 20, 30):
        layout.folder(tmp_path, step).mkdir(parents=True)
    layout.folder(tmp_path, 1).with_name(".step_00000001.tmp").mkdir()
    assert layout.outdated(tmp_path, keep_last, keep_every) == [layout.folder(tmp_path, step) for step in gone]
    layout.point_to(layout.folder(tmp_path, 15))
    gone = [step for step in gone if step != 15]
    assert layout.outdated(tmp_path, keep_last, keep_every) == [layout.folder(tmp_path, step) for step in gone]
