"""The report of a made-up run: complete, self-contained, and it names what it shows."""

import base64
import html.parser
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import png
from PIL import Image

from mmoe import cli
from mmoe.evaluate import figures, history, report
from mmoe.evaluate.statistics import wilson_interval
from mmoe.recipe import dump_recipe, load_recipe

STEPS = 50


def evaluation(*, blank: bool, tasks: tuple[str, ...] = ("caption", "left_right")) -> dict[str, Any]:
    low, high = wilson_interval(30, 60)
    row = {"n": 60, "correct": 30, "accuracy": 0.5, "low": low, "high": high, "chance": 0.125, "majority": 0.2}
    picture = base64.b64encode(png((9, 9, 9))).decode()
    example = {"sample": "scenes/test/7", "task": "caption", "prompt": "what is <this> ?", "choices": [" a", " b"]}
    return {
        "blank": blank,
        "skipped": ["scenes/test/3: image 0: corrupt"],
        "tasks": {task: row | {"majority_answer": "'a'"} for task in tasks},
        "examples": [
            example | {"answer": " pig", "truth": " pig", "png": picture},
            example | {"answer": " hen", "truth": " fish", "png": picture},
        ],
    }


@pytest.fixture
def run(tmp_path: Path) -> Path:
    recipe = load_recipe("quickstart", [f"train.steps={STEPS}"])
    (tmp_path / "recipe.toml").write_text(dump_recipe(recipe))
    moe, layers = recipe.model.moe, recipe.model.backbone.layers
    rows = []
    for step in range(1, STEPS + 1):
        row = {"step": step, "loss": 7 / step, "lr": 1e-3, "grad_norm": 1.0, "tokens": 4000, "samples": 90}
        row |= {"seconds": 0.5, "zero_expert_share": 0.4, "active_experts_mean": 1.8 if step <= 40 else 1.5}
        row |= {"expert_load_max": 1.2}
        if step == 9:
            row["loss"] = row["grad_norm"] = None
        if step % 10 == 0:
            slots = moe.experts + moe.zero_experts
            row["expert_load"] = [[1 / slots] * slots] * layers
        rows.append(json.dumps(row))
    (tmp_path / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    return tmp_path


def add_evaluations(run: Path) -> None:
    (run / "evaluation").mkdir()
    for name, blank in (("test", False), ("heldout", False), ("test-blank", True)):
        (run / "evaluation" / f"{name}.json").write_text(json.dumps(evaluation(blank=blank)))


def test_history_reads_a_run(run: Path) -> None:
    read = history.read(run)
    steps, loads = read.loads()
    assert steps.tolist() == [10, 20, 30, 40, 50]
    assert loads.shape == (5, 2, 12)
    assert math.isnan(read.column("loss")[8])
    assert read.column("loss")[0] == 7
    assert read.settled_active_experts() == pytest.approx(1.5)
    assert read.evaluations == {}


def test_smooth_is_the_mean_of_what_is_known() -> None:
    values = np.array([1.0, 2.0, np.nan, 4.0, 8.0])
    assert figures.smooth(values, 3).tolist() == [1.5, 1.5, 3.0, 6.0, 6.0]
    assert np.isnan(figures.smooth(np.array([np.nan]), 3)).all()


class Sources(html.parser.HTMLParser):
    """Every tag, and everything that a page refers to."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.refers: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.refers += [value or "" for name, value in attrs if name in ("src", "href")]


def test_the_page_stands_alone_and_shows_everything(run: Path) -> None:
    add_evaluations(run)
    (run / "skipped.jsonl").write_text('{"step": 4, "sample": "scenes/train/5: image 0: <empty>"}\n')
    report.write(run)
    page = (run / "report.html").read_text()
    sources = Sources()
    sources.feed(page)
    assert sources.refers
    assert all(source.startswith("data:image/") for source in sources.refers)
    assert "script" not in sources.tags
    assert sum(source.startswith("data:image/svg+xml") for source in sources.refers) == len(report._PANELS)
    titles = ["Accuracy on test<", "Accuracy on heldout<", "Accuracy on test-blank (blank images)<"]
    assert sorted(map(page.index, titles)) == [page.index(title) for title in titles]
    assert '<span class="right">pig</span>' in page
    assert '<span class="wrong">hen — it is fish</span>' in page
    assert "what is &lt;this&gt; ?" in page
    assert "step 4: scenes/train/5: image 0: &lt;empty&gt;" in page
    assert page.count("scenes/test/3: image 0: corrupt") == 1
    assert "50 of 50" in page
    assert "1.50" in page


def test_the_picture_has_its_size_and_no_part_is_empty(run: Path) -> None:
    add_evaluations(run)
    report.write(run)
    picture = np.asarray(Image.open(io.BytesIO((run / "report.png").read_bytes())).convert("L"))
    assert picture.shape == (1000, 1600)
    for rows in (slice(140, 380), slice(420, 660), slice(700, 940)):
        assert (picture[rows, 100:700] < 200).sum() > 100
    assert (picture[140:520, 900:1550] < 200).sum() > 100
    assert (picture[630:750, 815:1000] < 200).sum() > 100


def test_vision_on_and_off_stand_side_by_side(run: Path) -> None:
    """Only evaluations of the same questions are compared."""
    (run / "evaluation").mkdir()
    about = {"suite": "cv_bench", "data": "cv/test", "samples": 60}
    low, high = wilson_interval(12, 60)
    made = {
        "cv": evaluation(blank=False) | about | {"images": "shown"},
        "cv-off": evaluation(blank=False) | about | {"images": "none"},
        "cv-blank": evaluation(blank=True) | about | {"images": "blank"},
        "other-off": evaluation(blank=False) | about | {"images": "none", "data": "cv/heldout"},
    }
    made["cv-off"]["tasks"]["caption"] |= {"correct": 12, "accuracy": 0.2, "low": low, "high": high}
    for name, result in made.items():
        (run / "evaluation" / f"{name}.json").write_text(json.dumps(result))
    report.write(run)
    page = (run / "report.html").read_text()
    assert page.count('alt="draw_vision"') == page.count("Vision on and off: ") == 1
    assert "<li>caption: 50.0% with, 20.0% without: +30.0 points</li>" in page
    assert "<li>left / right: 50.0% with, 50.0% without: +0.0 points</li>" in page
    assert "Accuracy on cv-off (no images)<" in page
    titles = [page.index(f"Accuracy on {title}<") for title in ("cv", "cv-blank (blank images)", "cv-off (no images)")]
    assert titles == sorted(titles)


def test_a_run_without_evaluations_says_so(run: Path) -> None:
    report.write(run)
    assert (run / "report.png").stat().st_size > 10_000
    assert "Accuracy on" not in (run / "report.html").read_text()


@pytest.mark.parametrize(
    ("file", "text", "what"),
    [
        ("recipe.toml", None, "no recipe.toml in the run directory"),
        ("metrics.jsonl", None, "no metrics.jsonl in the run directory"),
        ("metrics.jsonl", "", "no step has been taken yet"),
        ("metrics.jsonl", '{"step": 1}\n{"st', "metrics.jsonl:2"),
        ("evaluation/test.json", "{", "not a JSON file"),
    ],
)
def test_broken_runs_are_user_errors(
    run: Path, file: str, text: str | None, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    add_evaluations(run)
    if text is None:
        (run / file).unlink()
    else:
        (run / file).write_text(text)
    assert cli.main(["report", str(run)]) == 2
    printed = capsys.readouterr().err
    assert what in printed
    assert len(printed.splitlines()) == 1
