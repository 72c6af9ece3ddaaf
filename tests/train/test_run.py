"""Runs that stop and go on: bitwise resume, signals, refused folders, losses that are not finite."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import training


@pytest.fixture
def copied(finished: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    """The finished run, to be altered."""
    shutil.copytree(finished[1], tmp_path / "run")
    return finished[0], tmp_path / "run"


def back_to(run: Path, step: int) -> None:
    """Makes ``run`` look as it did when the checkpoint of ``step`` was the newest."""
    for checkpoint in (run / "checkpoints").glob("step_*"):
        if int(checkpoint.name[5:]) > step:
            shutil.rmtree(checkpoint)
    (run / "checkpoints" / "latest").write_text(f"step_{step:08d}\n")


def test_run_directory_is_complete(finished: tuple[Path, Path]) -> None:
    run = finished[1]
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["latest", "step_00000004", "step_00000008", "step_00000010"]
    assert (run / "checkpoints" / "latest").read_text().strip() == "step_00000010"
    assert list((run / "tensorboard").glob("events.*"))
    rows = training.curve(run)
    assert [row["step"] for row in rows] == list(range(1, 11))
    assert len(rows[1]["expert_load"]) == 2
    assert len(rows[1]["expert_load"][0]) == 6


@pytest.mark.latest
def test_resume_is_bitwise(copied: tuple[Path, Path]) -> None:
    recipe, run = copied
    whole = training.curve(run)
    back_to(run, 4)
    (run / "checkpoints" / "latest").unlink()
    done = training.run(recipe, run, "--resume")
    assert done.returncode == 0, done.stderr
    assert training.curve(run) == whole


@pytest.mark.latest
def test_bf16_learns_and_resumes_bitwise(finished: tuple[Path, Path], tmp_path: Path) -> None:
    recipe, run, bf16 = finished[0], tmp_path / "run", ("--set", "precision.dtype=bf16")
    done = training.run(recipe, run, *bf16)
    assert done.returncode == 0, done.stderr
    whole, fp32 = training.curve(run), training.curve(finished[1])
    assert whole[0]["loss"] != fp32[0]["loss"]
    for row, other in zip(whole, fp32, strict=True):
        assert abs(row["loss"] - other["loss"]) < 0.02 * other["loss"]
    back_to(run, 8)
    again = training.run(recipe, run, "--resume", *bf16)
    assert again.returncode == 0, again.stderr
    assert training.curve(run) == whole


LONGER = ("--set", "train.steps=40", "--set", "checkpoint.every=3")


def interrupt(recipe: Path, run: Path, *options: str, ranks: int = 1) -> int:
    """Starts a run and sends SIGTERM to its process group, as a scheduler does, once a checkpoint has been written.
    Returns the step that it stopped after."""
    process = subprocess.Popen(
        training.command(recipe, run, *options, ranks=ranks),
        env=training.environment(),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while process.poll() is None and not (run / "checkpoints" / "latest").exists():
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGTERM)
    stderr = process.communicate(timeout=120)[1]
    assert process.returncode == 75, stderr
    assert "--resume" in stderr
    newest = int((run / "checkpoints" / "latest").read_text().strip()[5:])
    assert training.curve(run)[-1]["step"] == newest < 40
    return newest


def test_sigterm_saves_and_exits_75(finished: tuple[Path, Path], tmp_path: Path) -> None:
    recipe = finished[0]
    interrupt(recipe, tmp_path / "stopped", *LONGER)
    for run in ("stopped", "whole"):
        done = training.run(recipe, tmp_path / run, "--resume", *LONGER)
        assert done.returncode == 0, done.stderr
    assert training.curve(tmp_path / "stopped") == training.curve(tmp_path / "whole")


@pytest.mark.slow
def test_sigterm_on_two_ranks(finished: tuple[Path, Path], tmp_path: Path) -> None:
    recipe, run = finished[0], tmp_path / "run"
    interrupt(recipe, run, *LONGER, ranks=2)
    done = training.run(recipe, run, "--resume", *LONGER)
    assert done.returncode == 0, done.stderr
    assert [row["step"] for row in training.curve(run)] == list(range(1, 41))


def assert_refused(recipe: Path, run: Path, *options: str, what: str) -> None:
    done = training.run(recipe, run, *options)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert what in done.stderr


def test_a_folder_with_a_run_needs_resume(finished: tuple[Path, Path]) -> None:
    assert_refused(*finished, what="--resume")


@pytest.mark.parametrize("options", [(), ("--resume",)])
def test_a_checkpoint_that_no_run_made_is_not_passed_over(copied: tuple[Path, Path], options: tuple[str, ...]) -> None:
    """As `mmoe convert from-hf` leaves it: weights without a run."""
    recipe, run = copied
    (run / "recipe.toml").unlink()
    assert_refused(recipe, run, *options, what="no run that could go on")


def test_another_recipes_folder_is_refused(finished: tuple[Path, Path]) -> None:
    assert_refused(*finished, "--resume", "--set", "optimizer.lr=0.1", what="another recipe's run")


def test_a_missing_data_set_is_named(finished: tuple[Path, Path], tmp_path: Path) -> None:
    assert_refused(finished[0], tmp_path / "run", "--set", f"data.root={tmp_path}", what=str(tmp_path))


def test_a_vocabulary_below_the_tokenizers_is_refused(finished: tuple[Path, Path], tmp_path: Path) -> None:
    assert_refused(finished[0], tmp_path / "run", "--set", "model.backbone.vocab_size=100", what="vocab_size")


def test_an_out_that_is_no_folder_is_refused(finished: tuple[Path, Path]) -> None:
    assert_refused(finished[0], finished[0] / "run", what="cannot write the run")


def test_a_run_that_is_being_written_is_refused(copied: tuple[Path, Path]) -> None:
    recipe, run = copied
    with (run / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert_refused(recipe, run, "--resume", what="another process writes this run")


def test_several_processes_without_a_launcher_are_refused(finished: tuple[Path, Path], tmp_path: Path) -> None:
    done = training.run(finished[0], tmp_path / "run", OMPI_COMM_WORLD_SIZE="2")
    assert done.returncode == 2
    assert "launch/torchrun.sh" in done.stderr


def test_a_layout_that_does_not_fit_is_refused(finished: tuple[Path, Path], tmp_path: Path) -> None:
    assert_refused(finished[0], tmp_path / "run", "--set", "parallel.expert=2", what="possible here: 1")


@pytest.mark.parametrize("damage", ["missing", "altered"])
def test_a_damaged_checkpoint_is_refused_by_name(copied: tuple[Path, Path], damage: str) -> None:
    recipe, run = copied
    victim = next((run / "checkpoints" / "step_00000010" / "state").glob("*.distcp"))
    if damage == "missing":
        victim.unlink()
    else:
        content = bytearray(victim.read_bytes())
        content[len(content) // 2] ^= 1
        victim.write_bytes(content)
    assert_refused(recipe, run, "--resume", what=victim.name)


def test_losses_that_are_not_finite_stop_the_run(finished: tuple[Path, Path], tmp_path: Path) -> None:
    recipe, run = finished[0], tmp_path / "run"
    done = training.run(
        recipe, run, "--set", "optimizer.lr=1e30", "--set", "optimizer.min_lr=1e30",
        "--set", "optimizer.clip_grad=1e30", "--set", "train.max_skipped_in_a_row=3", "--set", "checkpoint.every=1",
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "not finite for 3 steps in a row" in done.stderr
    assert "sample-" in done.stderr
    rows = training.curve(run)
    assert [row["skipped_step"] for row in rows[-3:]] == [True] * 3
    newest = (run / "checkpoints" / "latest").read_text().strip()
    progress = json.loads((run / "checkpoints" / newest / "progress.json").read_text())
    assert progress["step"] == progress["taken"] == rows[-1]["step"] - 3
