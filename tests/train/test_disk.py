"""A disk that takes no more while a checkpoint is written; which checkpoints stay."""

import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import training

from mmoe.checkpoint import layout, save
from mmoe.errors import UserError
from mmoe.parallel import engine
from mmoe.recipe.schema import Parallel

pytestmark = pytest.mark.latest


def states(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_file_that_cannot_grow(finished: tuple[Path, Path], tmp_path: Path, ranks: int) -> None:
    """As on a full disk, the write of a shard fails; every rank ends, the checkpoint before it is whole."""
    recipe, run = finished[0], tmp_path / "run"
    shutil.copytree(finished[1], run)
    shutil.rmtree(run / "checkpoints" / "step_00000010")
    (run / "checkpoints" / "latest").write_text("step_00000008\n")
    command = training.command(recipe, run, "--resume", ranks=ranks)
    limited = subprocess.run(
        ["bash", "-c", f"ulimit -f 64; exec {shlex.join(command)}"],
        env=training.environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert limited.returncode == 2, limited.stderr
    assert "the checkpoint of step 10 was not written" in limited.stderr
    assert "step_00000008 is whole: go on from it with --resume" in limited.stderr
    assert states(run) == ["latest", "step_00000004", "step_00000008"]
    layout.verify(run / "checkpoints" / "step_00000008")
    again = training.run(recipe, run, "--resume", ranks=ranks)
    assert again.returncode == 0, again.stderr
    assert [row["step"] for row in training.curve(run)] == list(range(1, 11))


def test_a_disk_without_room_is_told_before_anything_is_written(
    finished: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.start(Parallel(), 0, alone=True)
    usage: Any = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(save.shutil, "disk_usage", lambda _: usage._replace(free=10**5))
    monkeypatch.setattr(save.state, "sharded", lambda *_: {})
    monkeypatch.setattr(save.state, "size", lambda _: 2 * 10**9)
    monkeypatch.setattr(save.state, "Write", lambda *_: pytest.fail("it was written"))
    recipe: Any = None
    with pytest.raises(UserError, match=r"step 7 was not written: rank 0: it takes 2\.000 GB, the disk has 0\.000 GB"):
        save.save(tmp_path, 7, [], None, {}, recipe, Path("tokenizer.json"))
    assert states(tmp_path) == []


def test_the_run_keeps_what_its_recipe_says(finished: tuple[Path, Path], tmp_path: Path) -> None:
    kept = ("checkpoint.every=2", "checkpoint.keep_last=2", "checkpoint.keep_every=4")
    done = training.run(finished[0], tmp_path / "run", "--set", *kept)
    assert done.returncode == 0, done.stderr
    assert states(tmp_path / "run") == ["latest", *(f"step_{step:08d}" for step in (4, 8, 10))]
