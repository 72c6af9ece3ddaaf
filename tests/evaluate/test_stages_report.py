"""The report of a made-up run of three stages: all on one page, and what is handed over is told from what is not."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_report import Sources, evaluation

from mmoe import cli
from mmoe.evaluate.stages import read_whole
from mmoe.recipe import dump_recipe, load_recipe
from mmoe.train import stages

STEPS = 20


def add_result(folder: Path, name: str, result: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(result))


def held_out(loss: float, *, checkpoint: str = "step_00000020", blank: bool = False) -> dict[str, Any]:
    rows = {"tokens": 90, "loss": loss, "tasks": {"caption": {"tokens": 90, "loss": loss}}}
    return {"suite": "loss", "checkpoint": checkpoint, "blank": blank, "skipped": [], **rows}


def add_steps(folder: Path, recipe: Any, steps: int = STEPS) -> None:
    folder.mkdir(parents=True)
    (folder / "recipe.toml").write_text(dump_recipe(recipe))
    row = {"grad_norm": 1.0, "lr": recipe.optimizer.lr, "tokens": 4000, "samples": 90, "seconds": 0.5}
    lines = [json.dumps({"step": step, "loss": 7 / step, **row}) for step in range(1, steps + 1)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """llava_tiny in 20 steps a stage; the last stage was broken off after seven."""
    settings = ["optimizer.warmup_steps=2", *(f"stages.{number}.train.steps={STEPS}" for number in range(3))]
    recipe = load_recipe("llava_tiny", settings)
    (tmp_path / "recipe.toml").write_text(dump_recipe(recipe))
    for number, steps in enumerate((STEPS, STEPS, 7)):
        add_steps(stages.folder(recipe, number, tmp_path), recipe.stages[number], steps)
    return tmp_path


def answered(*answers: str) -> dict[str, Any]:
    """An evaluation whose two examples have these answers; the truths are pig and fish."""
    result = evaluation(blank=False)
    prompts = zip(result["examples"], answers, ("what is <this> ?", "what is that ?"), strict=True)
    result["examples"] = [example | {"answer": answer, "prompt": prompt} for example, answer, prompt in prompts]
    return result


def cells(page: str, row: str) -> list[str]:
    """Of a row of a table with a column a stage."""
    found = page[page.index(f"<td>{row}</td>") :].partition("</tr>")[0]
    return found.replace("</td>", "").split("<td>")[2:]


def test_the_page_and_the_picture_show_every_stage(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, name in enumerate(("1-scratch", "2-align", "3-instruct")):
        folder = run / name / "evaluation"
        add_result(folder, "loss-scenes", held_out((2.5, 1.5, 1.25)[number]))
        add_result(folder, "test", answered(*((" hen", " hen"), (" pig", " hen"), (" pig", " fish"))[number]))
    add_result(run / "1-scratch/evaluation/begin", "loss-scenes", held_out(7.0, checkpoint="-"))
    add_result(run / "2-align/evaluation/begin", "loss-scenes", held_out(2.5))
    add_result(run / "3-instruct/evaluation", "test-blank", evaluation(blank=True))
    for name in ("2-align", "3-instruct"):
        add_result(run / name / "evaluation", "test-off", evaluation(blank=False) | {"images": "none"})
    add_result(run / "3-instruct/evaluation", "loss-scenes-blank", held_out(6.0, blank=True))
    (run / "2-align/skipped.jsonl").write_text('{"step": 4, "sample": "scenes/train/5: image 0: <empty>"}\n')
    assert cli.main(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    assert capsys.readouterr().out.split() == [str(run / "report.html"), str(run / "report.png")]
    sources = Sources()
    sources.feed(page)
    assert sources.refers
    assert all(source.startswith("data:image/") for source in sources.refers)
    assert "script" not in sources.tags
    connector = 96 * 192 + 192 + 192 * 192 + 192
    assert cells(page, "trained parameters")[1].startswith(f"<b>{connector:,} of ")
    assert cells(page, "frozen") == ["nothing", "<b>encoders, language</b>", "<b>encoders</b>"]
    assert cells(page, "mixture") == ["quickstart", "quickstart", "<b>scenes_and_stamps</b>"]
    assert cells(page, "steps") == ["20 of 20", "20 of 20", "7 of 20"]
    assert "<dt>steps</dt><dd>47 of 60</dd>" in page
    assert cells(page, "scenes, begins") == [
        "7.0000 <small>first weights</small>",
        "2.5000 <small>exactly that at scratch's end</small>",
        "1.5000 <small>not measured; that at align's end</small>",
    ]
    assert [cell[:13] for cell in cells(page, "scenes, ends")] == ["<b>2.5000</b>", "<b>1.5000</b>", "<b>1.2500</b>"]
    assert cells(page, "scenes-blank (blank images), ends")[:2] == ["–", "–"]
    assert page.index("Accuracy on test<") < page.index("Accuracy on test-blank (blank images)<")
    assert page.count("Vision on and off: ") == page.count("Vision on and off: test, instruct<") == 1
    assert "step 4: scenes/train/5: image 0: &lt;empty&gt;" in page
    assert "what is &lt;this&gt; ?" in page
    second = page[page.index("what is that ?") :].partition("</figure>")[0]
    assert [kind for kind in second.split('"') if kind in ("right", "wrong")] == ["wrong", "wrong", "right"]
    assert "<b>it is</b>fish" in second
    picture = np.asarray(Image.open(io.BytesIO((run / "report.png").read_bytes())).convert("L"))
    assert picture.shape == (1200, 1600)
    for rows in (slice(250, 480), slice(580, 810), slice(900, 1130)):
        assert (picture[rows, 100:760] < 200).sum() > 100
    assert (picture[250:620, 930:1550] < 200).sum() > 100
    assert (picture[740:900, 845:1000] < 200).sum() > 100


def test_a_stage_that_sees_other_images_begins_with_what_is_measured(run: Path) -> None:
    recipe = load_recipe(run / "2-align/recipe.toml", ["data.fit=pad"])
    (run / "2-align/recipe.toml").write_text(dump_recipe(recipe))
    add_result(run / "1-scratch/evaluation", "loss", held_out(2.5))
    add_result(run / "2-align/evaluation", "loss", held_out(2.0))
    _, align, instruct = read_whole(run).stages
    assert align.start("loss") is None
    assert instruct.start("loss") is None
    add_result(run / "2-align/evaluation/begin", "loss", held_out(2.75))
    start = read_whole(run).stages[1].start("loss")
    assert start is not None
    assert (start.loss, start.ended, start.measured) == (2.75, 2.5, True)


def test_what_is_not_begun_is_left_out_and_each_stage_has_a_page(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "3-instruct/metrics.jsonl").unlink()
    (run / "2-align/metrics.jsonl").write_text("")
    assert cli.main(["report", str(run)]) == 0
    assert "<dt>stages</dt><dd>1 of 3</dd>" in (run / "report.html").read_text()
    assert cli.main(["report", str(run / "1-scratch")]) == 0
    assert "<h1>llava_tiny-scratch</h1>" in (run / "1-scratch/report.html").read_text()
    (run / "1-scratch/metrics.jsonl").unlink()
    capsys.readouterr()
    assert cli.main(["report", str(run)]) == 2
    assert "no step has been taken yet" in capsys.readouterr().err
