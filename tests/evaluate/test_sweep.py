"""A sweep over encoder sets: what it plans and refuses, its table from made runs, and a real one of two steps."""

import dataclasses
import json
import tomllib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import sets
import training
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from test_commands import samples

from mmoe import cli
from mmoe.checkpoint.layout import MANIFEST
from mmoe.data import cv_bench
from mmoe.errors import UserError
from mmoe.evaluate import runs, sweep, sweep_page
from mmoe.evaluate.asked import PLAIN, heading
from mmoe.recipe import load_recipe
from mmoe.recipe.schema import Recipe

COUNT = {"n": 10, "correct": 7, "accuracy": 0.7, "low": 0.4, "high": 0.9, "chance": 0.25, "majority": 0.3}
CAPTION = {**COUNT, "accuracy": 0.5, "majority": 0.2}


def planned(recipe: Recipe, *asked: str) -> list[str]:
    return [one.name for one in sweep.plan(recipe, asked, Path("out"))]


def test_sets_are_subsets_in_the_recipes_order() -> None:
    recipe = load_recipe("quickstart")
    assert planned(recipe, "all") == ["vit", "convnet", "vit+convnet"]
    assert planned(recipe, "convnet+vit", "vit", "vit+convnet") == ["vit+convnet", "vit"]
    (one,) = sweep.plan(recipe, ["convnet"], Path("out"))
    assert one.encoders == ["convnet"]
    assert dataclasses.replace(one.recipe, model=recipe.model) == recipe


def test_what_is_said_of_other_encoders_goes_in_every_stage() -> None:
    overrides = [
        'train.frozen=["encoders.vit", "encoders.convnet", "language"]',
        'optimizer.modules=[{name="encoders.vit", lr=1e-5}, {name="connector", lr=1e-4}]',
        'stages=[{name="a", train.steps=70}, {name="b", train.frozen=["encoders"]}]',
    ]
    (one,) = sweep.plan(load_recipe("quickstart", overrides), ["convnet"], Path("out"))
    first, second = one.recipe.stages
    assert first.train.frozen == ("encoders.convnet", "language")
    assert [module.name for module in first.optimizer.modules] == ["connector"]
    assert second.train.frozen == ("encoders",)
    assert [len(stage.model.encoders) for stage in one.recipe.stages] == [1, 1]
    assert one.last is second


def test_what_cannot_be_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    recipe, out = load_recipe("quickstart"), tmp_path / "out"
    cached = load_recipe("quickstart", ['data.features="features"', 'train.frozen=["encoders.vit"]'])
    encoder = recipe.model.encoders[1]
    five = tuple(dataclasses.replace(encoder, name=name) for name in "abcde")
    many = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, encoders=five))
    for given, asked, what in [
        (recipe, "vit+clip", r"set 'vit\+clip': there is no encoder 'clip' .*: the recipe's encoders are vit, convnet"),
        (many, "all", "has 5 encoders, 31 sets of them"),
        (cached, "all", "set 'convnet' cannot be trained: data.features: no encoder is frozen"),
    ]:
        with pytest.raises(UserError, match=what):
            sweep.sweep(given, [asked], out, [], FakeRunner())
    with pytest.raises(UserError, match=r"set 'vit': .* \(parallel.expert = 2\)"):
        sweep.sweep(recipe, ["vit"], out, [], FakeRunner())
    with pytest.raises(UserError, match="the data set is missing"):
        sweep.sweep(alone("quickstart"), ["vit"], out, [tmp_path / "no" / "data"], FakeRunner())
    silent = sets.write_set(tmp_path, "silent", sets.varied(2))
    with pytest.raises(UserError, match="no sample asks a question"):
        sweep.sweep(alone("quickstart"), ["vit"], out, [silent], FakeRunner())
    assert not out.exists()


def alone(name: str, *overrides: str) -> Recipe:
    return load_recipe(name, ["parallel.expert=1", "train.steps=20", "optimizer.warmup_steps=2", *overrides])


class FakeRunner:
    """Writes at once what a run and its evaluation leave."""

    def __init__(self, failing: str = "", answers: Mapping[str, dict[str, Any]] = MappingProxyType({})) -> None:
        self.failing = failing
        self.answers = defaultdict(lambda: {"tasks": {"caption": CAPTION, "count": COUNT}}, answers)
        """What an evaluation finds, by the name of the set."""
        self.calls: list[str] = []

    def train(self, name: str, recipe: str, out: Path, settings: Sequence[str] = ()) -> None:
        self.calls.append(f"train {name}")
        if name == self.failing:
            raise UserError("a run failed: no room", name, f"see {out}")
        table = tomllib.loads(Path(recipe).read_text())
        stages = table.get("stages", [])
        out = out / f"{len(stages)}-{stages[-1]['name']}" if stages else out
        steps = table["train"]["steps"]
        (out / "checkpoints" / f"step_{steps:08d}").mkdir(parents=True)
        (out / "recipe.toml").write_text(Path(recipe).read_text())
        losses = [9.0] * (steps - 2) + [1.0, 2.0]
        rows = [{"loss": loss, "tokens": 1000, "seconds": 0.5} for loss in losses]
        rows[0]["seconds"] = 100.0
        (out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def evaluate(self, name: str, checkpoint: Path, data: Path, out: Path) -> None:
        self.calls.append(f"evaluate {name}")
        out.parent.mkdir(exist_ok=True)
        result = {"checkpoint": str(checkpoint), "data": str(data), **self.answers[name]}
        out.write_text(json.dumps(result))

    def stop(self) -> None: ...


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sets.write_set(tmp_path_factory.mktemp("sweep"), "colours", samples())


def test_the_table_has_a_row_a_set(colours: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, runner = alone("quickstart"), FakeRunner(failing="convnet")
    with pytest.raises(UserError, match=r"^a run failed: no room \(convnet\): see .*/convnet; 1 of 3 sets failed"):
        sweep.sweep(recipe, ["all"], tmp_path, [colours], runner)
    assert runner.calls == ["train vit", "evaluate vit", "train convnet", "train vit+convnet", "evaluate vit+convnet"]
    page = (tmp_path / "sweep.md").read_text()
    assert page in (said := capsys.readouterr()).out
    # 116,544 parameters are the encoder's, 128,864 the connector's; half the steps take 0.5 s; the last tenth: 1, 2.
    assert "| vit | 245,408 | 1,872,032 | 16 | 2,000 | 1.5000 | 60.0% |" in page
    assert "| vit | 50.0% (40.0% – 90.0%) | 70.0% (40.0% – 90.0%) | 60.0% |" in page
    assert "| always the same answer | 20.0% | 30.0% | 25.0% |" in page
    assert "convnet failed: a run failed: no room" in page
    assert "1 of 3: vit: final loss 1.5000, colours 60.0%" in said.err
    assert "task by task" not in page
    rows = json.loads((tmp_path / "sweep.json").read_text())["rows"]
    assert [row["set"] for row in rows] == ["vit", "convnet", "vit+convnet"]
    assert rows[2]["parameters"] == 2_023_456
    assert rows[2]["evaluations"]["colours"]["tasks"]["count"] == COUNT
    assert (tmp_path / "sweep.png").stat().st_size > 10_000

    runner = FakeRunner()
    sweep.sweep(recipe, ["all"], tmp_path, [], runner)
    assert runner.calls == ["train convnet"], "what is there is not trained again"
    with pytest.raises(UserError, match=r"set 'vit': .* holds another recipe's run: there `lr = 0.0012`"):
        sweep.sweep(alone("quickstart", "optimizer.lr=1e-3"), ["vit"], tmp_path, [], runner)


def test_sets_that_lack_a_task_have_a_dash_and_a_mean_that_says_so(colours: Path, tmp_path: Path) -> None:
    """The first set lacks one, the second has it, the third lacks another."""
    answers = [{"caption": CAPTION}, {"count": COUNT, "caption": CAPTION}, {"count": COUNT}]
    names = ["vit", "convnet", "vit+convnet"]
    runner = FakeRunner(answers={name: {"tasks": tasks} for name, tasks in zip(names, answers, strict=True)})
    sweep.sweep(alone("quickstart"), ["all"], tmp_path, [colours], runner)
    page = (tmp_path / "sweep.md").read_text()
    assert "| encoders | caption | count | mean |" in page
    assert "| vit | 50.0% (40.0% – 90.0%) | – | 50.0%, 1 of 2 tasks |" in page
    assert "| convnet | 50.0% (40.0% – 90.0%) | 70.0% (40.0% – 90.0%) | 60.0% |" in page
    assert "| vit+convnet | – | 70.0% (40.0% – 90.0%) | 70.0%, 1 of 2 tasks |" in page
    assert "| always the same answer | 20.0% | 30.0% | 25.0% |" in page
    headlines = [line.split(" | ")[-1] for line in page.splitlines() if " | 1.5000 | " in line]
    assert headlines == ["50.0%, 1 of 2 tasks |", "60.0% |", "70.0%, 1 of 2 tasks |"]
    assert "compare them task by task" in page

    axes = Figure().subplots()
    sweep_page._draw_accuracy(axes, "colours", json.loads((tmp_path / "sweep.json").read_text())["rows"])
    points = {str(line.get_label()): np.asarray(line.get_xydata()).round().tolist() for line in axes.lines}
    # Accuracies are rounded away: what is told is in which set's row a point lies.
    assert {label: [row for _, row in xy] for label, xy in points.items()} == {
        "caption": [0, 1],
        "count": [1, 2],
        "mean": [1],
        "mean of fewer tasks": [0, 2],
    }
    intervals = [collection.get_segments() for collection in axes.collections if isinstance(collection, LineCollection)]
    assert [len(segments) for segments in intervals] == [2, 2]


def test_beside_scores_a_set_without_one_has_a_dash(colours: Path, tmp_path: Path) -> None:
    """CV-Bench's score needs both halves."""
    both = {"tasks": {"Count": COUNT, "Depth": CAPTION}, "score": 0.55}
    runner = FakeRunner(answers={"vit": {"tasks": {"Count": COUNT}, "score": None}, "convnet": both})
    sweep.sweep(alone("quickstart"), ["vit", "convnet"], tmp_path, [colours], runner)
    page = (tmp_path / "sweep.md").read_text()
    assert "| final loss | colours, score |" in page
    assert [line.split(" | ")[-1] for line in page.splitlines() if " | 1.5000 | " in line] == ["– |", "55.0% |"]


def test_only_answers_to_every_question_with_pictures_are_taken_for_a_sets(colours: Path, tmp_path: Path) -> None:
    checkpoint, path = tmp_path / "step", tmp_path / "colours.json"
    checkpoint.mkdir()
    (checkpoint / MANIFEST).write_text("{}")
    whole = heading("scenes", checkpoint, colours, PLAIN) | {"samples": 12}
    path.write_text(json.dumps(whole))
    assert runs.evaluation(path, checkpoint, colours) == whole
    other = {"suite": "loss", "checkpoint": "other", "images": "blank", "samples": 3, "system_prompt": "say more"}
    for name, value in other.items():
        path.write_text(json.dumps(whole | {name: value}))
        assert runs.evaluation(path, checkpoint, colours) is None, name


def test_data_sets_of_one_name_are_told_apart(tmp_path: Path) -> None:
    one, other, third = (tmp_path / name for name in ("scenes/test", "cv_bench/test", "cv_bench/train"))
    assert sweep.labels([one, third]) == {"test": one, "train": third}
    assert sweep.labels([one, other, third]) == {"scenes-test": one, "cv_bench-test": other, "cv_bench-train": third}
    assert sweep.labels([]) == {}
    assert list(sweep.labels([Path("/test"), Path("/bench/test")])) == ["test", "bench-test"]
    alike = [Path(name) for name in ("/a-b/test", "/a/b/test", "/p/q/z", "/r/q/z")]
    assert list(sweep.labels(alike)) == ["1-test", "2-test", "3-z", "4-z"]
    with pytest.raises(UserError, match="a data set is named twice"):
        sweep.labels([one, tmp_path / "cv_bench" / ".." / "scenes" / "test"])


def test_of_stages_the_last_is_told(tmp_path: Path) -> None:
    recipe = alone("quickstart", 'stages=[{name="a", train.steps=30}, {name="b"}]')
    sweep.sweep(recipe, ["vit"], tmp_path, [], FakeRunner())
    (row,) = json.loads((tmp_path / "sweep.json").read_text())["rows"]
    assert (row["run"], row["steps"]) == (str(tmp_path / "vit" / "2-b"), 20)


def choices(folder: Path) -> Path:
    """Two questions in CV-Bench's layout."""
    folder.mkdir()
    (folder / "a.png").write_bytes(sets.encode(sets.picture(1)))
    for kind, source in (("2D", "COCO"), ("3D", "Omni3D")):
        options = {"choices": ["red", "blue"], "answer": "(B)", "prompt": cv_bench.prompt("what ?", ["red", "blue"])}
        row = {"type": kind, "task": f"colour {kind}", "source": source, "filename": "a.png", **options}
        (folder / f"test_{kind.lower()}.jsonl").write_text(json.dumps(row) + "\n")
    return folder


def test_a_real_sweep(colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    recipe = training.write_recipe(colours.parent, sets.write_mixture(colours.parent, colours=1.0))
    command = ["sweep", str(recipe), "--out", str(tmp_path), "--parallel", "2"]
    command += ["--data", str(colours), str(choices(tmp_path / "choices"))]
    command += ["--encoders", "vit", "vit+convnet", "--set", "train.steps=2"]
    assert cli.main(command) == 0
    rows: list[dict[str, Any]] = json.loads((tmp_path / "sweep.json").read_text())["rows"]
    curves = [training.curve(tmp_path / name) for name in ("vit", "vit+convnet")]
    assert [row["final_loss"] for row in rows] == [curve[-1]["loss"] for curve in curves]
    assert curves[0][0]["loss"] != curves[1][0]["loss"], "the sets are one"
    for row in rows:
        answers = json.loads((tmp_path / row["set"] / "evaluation" / "colours.json").read_text())
        assert row["evaluations"]["colours"]["tasks"] == answers["tasks"]
        assert answers["tasks"]["colour"]["n"] == 12
        answers = json.loads((tmp_path / row["set"] / "evaluation" / "choices.json").read_text())
        assert row["evaluations"]["choices"]["score"] == answers["score"] in (0.0, 0.5, 1.0)
    assert "| final loss | colours, mean accuracy | choices, score |" in (tmp_path / "sweep.md").read_text()

    written = [(tmp_path / row["set"] / "events.jsonl").stat().st_mtime_ns for row in rows]
    assert cli.main(command) == 0
    assert [(tmp_path / row["set"] / "events.jsonl").stat().st_mtime_ns for row in rows] == written
