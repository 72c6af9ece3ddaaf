"""Scenes in CV-Bench's format: true answers, letters that favour none, the published layout, nothing overwritten."""

import io
import re
from collections import Counter
from math import dist
from pathlib import Path
from typing import Any

import made_stamps
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mmoe.data import cv_bench
from mmoe.data.lint import lint
from mmoe.data.prepare import Drawn, prepare_cv_bench
from mmoe.data.prepare.choices import TASKS, Choice, ChoiceMaker
from mmoe.data.prepare.compose import load_sprites
from mmoe.data.prepare.scenes import SceneMaker
from mmoe.data.source import Source
from mmoe.errors import UserError

SIDE = 64
PLURALS = {label: f"{label}s" for label in made_stamps.LABELS}
PUBLISHED = ["idx", "type", "task", "image", "question", "choices", "answer", "prompt", "filename", "source"]
PUBLISHED += ["source_dataset", "source_filename", "target_class", "target_size", "bbox"]


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return made_stamps.make_catalogue(tmp_path_factory.mktemp("made") / "stamps")


@pytest.fixture(scope="module")
def maker(catalogue: Any) -> ChoiceMaker:
    sprites = load_sprites(catalogue, held_out=False, side=SIDE)
    return ChoiceMaker(SceneMaker("cv_bench/train", 0, SIDE, {}, sprites, PLURALS, "CC0-1.0"))


def centre(choice: Choice, label: str) -> tuple[float, float]:
    (thing,) = (thing for thing in choice.scene[1][0] if thing.label == label)
    return thing.x, thing.y


def test_counts_are_true_and_every_letter_is_as_often_right_for_every_answer(maker: ChoiceMaker) -> None:
    strata = 3 * 4 * len(PLURALS) * 4
    seen: Counter[tuple[str, int, int]] = Counter()
    for ordinal in range(strata):
        choice = maker.choice("Count", ordinal)
        (plural,) = re.fullmatch(r"How many (\w+) are in the image\?", choice.question).groups()
        things = choice.scene[1][0]
        number = sum(f"{thing.label}s" == plural for thing in things)
        assert choice.options[choice.place] == str(number)
        assert sorted(choice.options) == ["0", "1", "2", "3"]
        seen[plural, number, choice.place] += 1
    assert len(seen) == len(PLURALS) * 4 * 4
    assert set(seen.values()) == {3}


def test_relations_are_true_and_balanced(maker: ChoiceMaker) -> None:
    seen: Counter[tuple[str, int]] = Counter()
    for ordinal in range(64):
        choice = maker.choice("Relation", ordinal)
        labels = re.fullmatch(r"Where is the (\w+) located with respect to the (\w+)\?", choice.question).groups()
        a, b = (centre(choice, label) for label in labels)
        right = choice.options[choice.place]
        truth = {"left": a[0] < b[0], "right": a[0] > b[0], "above": a[1] < b[1], "below": a[1] > b[1]}
        assert truth[right]
        assert sorted(choice.options) in (["left", "right"], ["above", "below"])
        seen[right, choice.place] += 1
    assert len(seen) == 8
    assert set(seen.values()) == {8}


def test_depth_and_distance_are_true_and_balanced(maker: ChoiceMaker) -> None:
    for task in ("Depth", "Distance"):
        places: Counter[int] = Counter()
        for ordinal in range(32):
            choice = maker.choice(task, ordinal)
            right, other = choice.options[choice.place], choice.options[1 - choice.place]
            things = choice.scene[1][0]
            if task == "Depth":
                foot = {thing.label: thing.box[1] + thing.box[3] for thing in things}
                assert foot[right] > foot[other]
            else:
                (anchor,) = {thing.label for thing in things} - {right, other}
                assert f"closer to the {anchor}, the {choice.options[0]} or the {choice.options[1]}?" in choice.question
                at = centre(choice, anchor)
                assert dist(at, centre(choice, right)) < dist(at, centre(choice, other))
            places[choice.place] += 1
        assert places == {0: 16, 1: 16}


def test_the_training_set_asks_as_the_suite_does(catalogue: Any, tmp_path: Path) -> None:
    prepare_cv_bench(catalogue, tmp_path, Drawn(train=400, test=8, size=32, seed=0), workers=1)
    path = tmp_path / "cv_bench" / "train"
    assert lint(path) == []
    source = Source(path, "cv_bench/train")
    tasks: Counter[str] = Counter()
    for number in range(len(source)):
        choice, *others = source.read(number).record["branches"]
        tasks[choice["task"]] += 1
        assert re.fullmatch(
            r"[\w ,]+\? Select from the following choices\.(\n\([A-D]\) \w+){2,4}\n" + re.escape(cv_bench.SUFFIX),
            choice["prompt"],
        )
        assert re.fullmatch(r" \([A-D]\)", choice["answer"])
        assert choice["answer"] in choice["choices"]
        # What is asked without letters is not evaluated.
        assert others
        assert not any("choices" in branch for branch in others)
    assert tasks == dict.fromkeys(TASKS, 100)


def test_the_files_have_the_published_layout(catalogue: Any, tmp_path: Path) -> None:
    prepare_cv_bench(catalogue, tmp_path, Drawn(train=4, test=10, size=SIDE, seed=0), workers=1)
    rows = []
    for kind, name in (("2D", "test_2d"), ("3D", "test_3d")):
        table = pq.read_table(tmp_path / "cv_bench" / "test" / f"{name}.parquet")
        assert table.column_names == PUBLISHED
        here = table.to_pylist()
        assert {row["type"] for row in here} == {kind}
        assert {row["source"] for row in here} == {f"scenes {kind}"}
        rows += here
    assert [row["idx"] for row in rows] == list(range(10))
    assert Counter(row["task"] for row in rows) == {"Count": 3, "Relation": 3, "Depth": 2, "Distance": 2}
    for row in rows:
        options = "".join(f"\n({'ABCD'[i]}) {choice}" for i, choice in enumerate(row["choices"]))
        assert row["prompt"] == f"{row['question']} Select from the following choices.{options}"
        assert row["answer"] in [f"({'ABCD'[i]})" for i in range(len(row["choices"]))]
        assert Image.open(io.BytesIO(row["image"]["bytes"])).size == (SIDE, SIDE)
    assert [key for key, _ in cv_bench.read(tmp_path / "cv_bench" / "heldout")[1]][::5] == ["test_2d/0", "test_2d/5"]


def contents(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_the_same_options_give_the_same_bytes_once(
    catalogue: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"train": 8, "test": 8, "size": 32}
    for root in ("a", "b", "a"):
        prepare_cv_bench(catalogue, tmp_path / root, Drawn(**options, seed=3), workers=1)
    assert capsys.readouterr().out.count("up to date") == 3
    before = contents(tmp_path / "a")
    assert before == contents(tmp_path / "b")
    assert len(before) == 1 + 3 + 2 * 2
    prepare_cv_bench(catalogue, tmp_path / "a", Drawn(**options, seed=4), workers=1)
    after = contents(tmp_path / "a")
    assert after.keys() == before.keys()
    assert all(after[name] != before[name] for name in after if name != "tokenizer.json")


def test_splits_show_their_own_stamps(maker: ChoiceMaker, catalogue: Any) -> None:
    held_out = {stamp.path for stamp in catalogue.stamps if stamp.held_out}
    sprites = load_sprites(catalogue, held_out=True, side=SIDE)
    other = ChoiceMaker(SceneMaker("cv_bench/heldout", 0, SIDE, {}, sprites, PLURALS, "CC0-1.0"))
    for one, inside in ((maker, False), (other, True)):
        shown = {thing.stamp for task in TASKS for i in range(8) for thing in one.choice(task, i).scene[1][0]}
        assert all((stamp in held_out) == inside for stamp in shown)


def test_files_of_another_origin_are_left_alone(catalogue: Any, tmp_path: Path) -> None:
    folder = tmp_path / "cv_bench" / "test"
    folder.mkdir(parents=True)
    (folder / "test_2d.parquet").write_bytes(b"somebody's")
    with pytest.raises(UserError, match="files that were not made here"):
        prepare_cv_bench(catalogue, tmp_path, Drawn(train=4, test=4, size=32, seed=0), workers=1)
    assert (folder / "test_2d.parquet").read_bytes() == b"somebody's"


def test_without_pyarrow_nothing_is_made(catalogue: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match=r"pip install 'mmoe\[cv-bench\]'"):
        prepare_cv_bench(catalogue, tmp_path / "out", Drawn(train=4, test=4, size=32, seed=0), workers=1)
    assert not (tmp_path / "out").exists()
