"""The ablations' page from short runs, and that they are reproducible studies of what they say."""

import json
import math
from pathlib import Path

import pytest

from benchmarks import ablations
from benchmarks.studies.arms import STUDIES
from benchmarks.studies.page import interval
from mmoe import cli
from mmoe.recipe import load_recipe


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    assert cli.main(["data", "prepare", "stamps", str(root)]) == 0
    assert cli.main(["data", "prepare", "scenes", str(root), "--train", "120", "--test", "12"]) == 0
    return root


@pytest.mark.slow
def test_a_study_is_run_once_and_told(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ablations, "BUILD", tmp_path / "build")
    command = ["bench", "ablations", "--quick", "--only", "order", "--data", str(data), "--out", str(tmp_path / "out")]
    assert cli.main(command) == 0
    page = (tmp_path / "out" / "ablations.md").read_text()
    assert page[page.index("## ") :] in capsys.readouterr().out
    assert (tmp_path / "out" / "ablations" / "order.png").stat().st_size > 10_000
    runs = sorted((tmp_path / "build").glob("order-4/*/metrics.jsonl"))
    assert [run.parent.name[:-9] for run in runs] == ["00-seed0", "01-seed0"]
    losses = [[json.loads(line)["loss"] for line in run.read_text().splitlines()] for run in runs]
    assert [len(curve) for curve in losses] == [4, 4]
    assert losses[0][0] != losses[1][0], "the two orders are one"
    for curve in losses:
        assert f"| {curve[-1]:.4f} |" in page
    assert f"the same seeds: {losses[1][-1] - losses[0][-1]:.4f}" in page

    written = [run.stat().st_mtime_ns for run in runs]
    assert cli.main(command) == 0
    assert [run.stat().st_mtime_ns for run in runs] == written
    monkeypatch.setattr(ablations, "COMMON", ("train.global_batch=16", *ablations.COMMON[1:]))
    assert cli.main(command) == 0
    assert len(list((tmp_path / "build").glob("order-4/*/metrics.jsonl"))) == 4, "another recipe is another run"


def test_a_run_that_fails_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ablations, "BUILD", tmp_path / "build")
    command = ["bench", "ablations", "--quick", "--only", "order", "--data", str(tmp_path / "nowhere")]
    assert cli.main([*command, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "order, shortcut, seed 0" in said
    assert "nowhere" in said
    assert not (tmp_path / "out").exists()


def test_an_unknown_study_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "ablations", "--only", "order", "size", "--out", "elsewhere"]) == 2
    assert "there is no 'size' (--only): choose from zero_experts, order, transfer" in capsys.readouterr().err


def test_the_interval_of_a_mean() -> None:
    """Student's t of two degrees of freedom: 4.303 · s / √3."""
    assert interval([1.0, 2.0, 3.0]) == "2.0000 ± 2.4843"
    assert interval([0.5]) == "0.5000"
    assert interval([0.5, math.inf, 0.6]) == "diverged"


def test_a_run_that_diverged_is_a_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def train(study: str, index: int, seed: int, steps: int, data: str) -> ablations.Run:
        loss = None if (index, seed) == (4, 1) else 1.0 + abs(index % 5 - 2)
        return ablations.Run([{"loss": loss, "active_experts_mean": 1.5}] * (3 if loss is None else steps), {})

    monkeypatch.setattr(ablations, "_train", train)
    command = ["bench", "ablations", "--only", "transfer", "--steps", "10", "--out", str(tmp_path)]
    assert cli.main(command) == 0
    page = capsys.readouterr().out
    assert "| 32 wide, 0.016 | diverged | 3.0000, inf, 3.0000 | 1.50 |" in page
    assert "- 32 wide: best at 0.004, 1.0000 ± 0.0000" in page
    assert (tmp_path / "ablations" / "transfer.png").exists()


def test_a_study_joins_the_page_of_the_others(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its answers and parameters are told, and what other sections say stays letter by letter."""

    def train(study: str, index: int, seed: int, steps: int, data: str) -> ablations.Run:
        if (index, seed) == (1, 2):
            return ablations.Run([{"loss": None, "active_experts_mean": 1.5}], {})
        answers = {"count": 0.5 + 0.1 * index + 0.01 * seed, "caption": 0.9}
        return ablations.Run([{"loss": 2.0 - index, "active_experts_mean": 1.5}] * steps, answers)

    monkeypatch.setattr(ablations, "_train", train)
    before, here = (root / "docs" / "ablations.md").read_text(), tmp_path / "ablations.md"
    here.write_text(before)
    assert cli.main(["bench", "ablations", "--only", "connector", "--steps", "10", "--out", str(tmp_path)]) == 0
    page = here.read_text()
    # Losses 2, 1 and 0; the middle arm has no accuracy for one seed.
    assert "| MLP | 2.0000 ± 0.0000 | 2.0000, 2.0000, 2.0000 | 1.50 | 33,024 |" in page
    assert "| SVA, 96 wide | diverged | 1.0000, 1.0000, inf | 1.50 | 163,808 |" in page
    assert "| count | 51.0% ± 2.5% | diverged | 71.0% ± 2.5% |" in page
    assert "| mean over tasks | 70.5% ± 1.2% | diverged | 80.5% ± 1.2% |" in page
    assert "- SVA, 32 wide minus MLP, the same seeds: -2.0000 ± 0.0000; mean accuracy 10.0% ± 0.0%" in page
    *others, mine = page.split("\n## ")
    assert mine.startswith("SVA against an MLP\n")
    assert "\n## ".join(others) == before.partition("\n## SVA against")[0]

    written = page
    assert cli.main(["bench", "ablations", "--only", "connector", "--steps", "10", "--out", str(tmp_path)]) == 0
    assert here.read_text() == written


def test_connectors_are_compared_at_equal_tokens() -> None:
    recipes = [load_recipe("quickstart", arm.settings) for arm in STUDIES["connector"].arms]
    assert [recipe.model.connector.type for recipe in recipes] == ["mlp", "sva", "sva"]
    assert {recipe.model.image_tokens for recipe in recipes} == {16}
    assert len({recipe.model.encoders for recipe in recipes}) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sweep"], "unrecognized arguments: --sweep: see `mmoe bench ablations --help`"),
        (["--quick"], "name another folder"),
        (["--steps", "3", "--out", "elsewhere"], "give at least 10"),
        (["--parallel", "0"], "argument --parallel: '0' is no whole number from 1 on"),
    ],
)
def test_options_that_make_no_sense_here(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "ablations", *options]) == 2
    assert message in capsys.readouterr().err
