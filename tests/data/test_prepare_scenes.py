"""Scenes: exact ground truth, balance, no leak, determinism, and what an interrupted run leaves."""

import io
import re
from collections import Counter, defaultdict
from math import dist
from pathlib import Path

import made_stamps
import numpy as np
import pytest
from PIL import Image

from mmoe.data.index import read_index, read_sample
from mmoe.data.lint import lint
from mmoe.data.prepare import Drawn, parallel, prepare_scenes
from mmoe.data.prepare.compose import load_sprites
from mmoe.data.prepare.questions import COLUMNS, MOST, MOST_OF_ONE, ROWS, stratum, wording
from mmoe.data.prepare.scenes import HELD_OUT, TEST, TRAIN, SceneMaker
from mmoe.data.shards import Sample, read_card
from mmoe.data.tokenizer import load_tokenizer

SIDE = 64
PLURALS = {label: f"{label}s" for label in made_stamps.LABELS}


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory: pytest.TempPathFactory):
    return made_stamps.make_catalogue(tmp_path_factory.mktemp("made") / "stamps")


@pytest.fixture(scope="module")
def maker(catalogue) -> SceneMaker:
    return SceneMaker("train", 0, SIDE, TRAIN, load_sprites(catalogue, held_out=False, side=SIDE), PLURALS, "CC0-1.0")


@pytest.fixture(scope="module")
def scenes(maker: SceneMaker) -> list[Sample]:
    return [maker(index) for index in range(1600)]


def things_of(sample: Sample, picture: int = 0) -> list[dict]:
    return sample.record["truth"]["pictures"][picture]


def centre(thing: dict) -> tuple[float, float]:
    left, top, width, height = thing["box"]
    return left + width / 2, top + height / 2


def asked(scenes: list[Sample], task: str) -> list[tuple[Sample, dict]]:
    found = [(scene, branch) for scene in scenes for branch in scene.record["branches"] if branch["task"] == task]
    assert len(found) >= 30
    return found


def one(things: list[dict], label: str) -> dict:
    (thing,) = (thing for thing in things if thing["label"] == label)
    return thing


def test_strata_hold_every_value_once_and_in_another_order_each_time() -> None:
    draws = [stratum("seed", index, 7) for index in range(70)]
    blocks = [tuple(draws[start : start + 7]) for start in range(0, 70, 7)]
    assert all(sorted(block) == list(range(7)) for block in blocks)
    assert len(set(blocks)) > 5


def test_kinds_of_scenes_come_in_their_shares(scenes: list[Sample], maker: SceneMaker) -> None:
    counted = Counter(scene.record["category"] for scene in scenes)
    assert counted == {kind: number * 40 for kind, number in TRAIN.items()}
    plans = [maker.plan(index) for index in range(400)]
    for kind in TRAIN:
        assert sorted(ordinal for k, ordinal in plans if k == kind) == list(range(10 * TRAIN[kind]))


def test_captions_totals_and_counts_are_true(scenes: list[Sample]) -> None:
    for scene, branch in asked(scenes, "caption"):
        assert [f" {thing['label']}" for thing in things_of(scene)] == [branch["answer"]]
    for scene, branch in asked(scenes, "total"):
        assert branch["answer"] == f" {len(things_of(scene))}"
    for scene, branch in asked(scenes, "count"):
        label = branch["prompt"].split()[2].removesuffix("s")
        assert branch["answer"] == f" {[thing['label'] for thing in things_of(scene)].count(label)}"


def test_relations_are_true(scenes: list[Sample]) -> None:
    for axis, task, words in ((0, "left_right", ("left", "right")), (1, "above_below", ("above", "below"))):
        for scene, branch in asked(scenes, task):
            what, *labels = re.fullmatch(r"which is (\w+) , (\w+) or (\w+) \?", branch["prompt"]).groups()
            a, b = sorted((one(things_of(scene), label) for label in labels), key=lambda thing: centre(thing)[axis])
            assert centre(b)[axis] - centre(a)[axis] > 0.1 * SIDE
            assert branch["answer"] == f" {(a if what == words[0] else b)['label']}"
    for scene, branch in asked(scenes, "distance"):
        words = branch["prompt"].split()
        anchor, a, b = (centre(one(things_of(scene), label)) for label in (words[5], words[7], words[9]))
        assert branch["answer"] == f" {words[7] if dist(anchor, a) < dist(anchor, b) else words[9]}"


def test_depth_is_true(scenes: list[Sample]) -> None:
    """The nearer thing is larger, its foot is lower, and it is painted over the other."""
    for scene, branch in asked(scenes, "depth"):
        what, a, b = re.fullmatch(r"which is (\w+) , (\w+) or (\w+) \?", branch["prompt"]).groups()
        things = things_of(scene)
        near, far = sorted((one(things, a), one(things, b)), key=lambda thing: -thing["box"][1] - thing["box"][3])
        assert branch["answer"] == f" {(near if what == 'nearer' else far)['label']}"
        assert things.index(near) > things.index(far)
        assert near["box"][1] + near["box"][3] > far["box"][1] + far["box"][3]


def test_comparisons_and_problems_are_true(scenes: list[Sample]) -> None:
    for scene, branch in asked(scenes, "compare"):
        first, second = (len(things_of(scene, picture)) for picture in (0, 1))
        assert len(scene.images) == 2
        assert branch["answer"] == (" first" if first > second else " second")
    for scene, branch in asked(scenes, "sum"):
        (part,) = scene.record["prefix"]
        assert not scene.images
        assert branch["answer"] == f" {sum(map(int, re.findall(r'[0-9]+', part['text'])))}"


def test_descriptions_name_every_thing_in_its_cell(scenes: list[Sample]) -> None:
    for scene, branch in asked(scenes, "describe"):
        words = branch["answer"].split()
        cells = list(zip(words[::3], words[1::3], words[2::3], strict=True))
        expected = []
        for thing in things_of(scene):
            x, y = centre(thing)
            expected.append((COLUMNS[int(x * 4 / SIDE)], ROWS[int(y * 4 / SIDE)], thing["label"]))
        assert cells == sorted(expected)


def test_boxes_hold_the_things_and_do_not_cover_each_other(scenes: list[Sample]) -> None:
    colours = dict(zip(made_stamps.LABELS, made_stamps.COLOURS, strict=True))
    for scene, _ in asked(scenes, "total"):
        things = things_of(scene)
        with Image.open(io.BytesIO(scene.images[0][1])) as image:
            assert image.size == (SIDE, SIDE)
            for thing in things:
                left, top, width, height = thing["box"]
                assert left >= 0
                assert top >= 0
                assert left + width <= SIDE
                assert top + height <= SIDE
                found = np.array(image.getpixel((left + width // 2, top + height // 2)))
                # Brightness varies by 0.8 to 1.15, JPEG by a few values more.
                wanted = np.array(colours[thing["label"]])
                assert np.all(found >= 0.8 * wanted - 30)
                assert np.all(found <= 1.15 * wanted + 30)
        for place, a in enumerate(things):
            for b in things[place + 1 :]:
                apart = [abs(u - v) for u, v in zip(centre(a), centre(b), strict=True)]
                sides = [(a["box"][2 + axis] + b["box"][2 + axis]) / 2 for axis in (0, 1)]
                # A pixel is lost where the box is rounded to whole pixels.
                assert any(gap >= 0.9 * side - 1.5 for gap, side in zip(apart, sides, strict=True))


def test_no_answer_is_favoured(scenes: list[Sample]) -> None:
    """Every answer within one stratum's remainder of every other."""
    totals = Counter(branch["answer"] for _, branch in asked(scenes, "total"))
    assert set(totals) == {f" {number}" for number in range(1, MOST + 1)}
    for task in ("total", "caption", "compare", "sum"):
        found = asked(scenes, task)
        counter = Counter(branch["answer"] for _, branch in found)
        assert max(counter.values()) - min(counter.values()) <= 16, task
        assert max(counter.values()) / len(found) < 1.1 / len(counter), task
        assert set(counter) == set(found[0][1]["choices"]), task


def test_a_count_is_independent_of_the_total(catalogue, maker: SceneMaker) -> None:
    only = SceneMaker("train", 0, SIDE, {"count": 1}, maker.sprites, PLURALS, "CC0-1.0")
    strata = MOST * (MOST_OF_ONE + 1) * len(PLURALS)
    pairs = Counter()
    for index in range(2 * strata):
        sample = only(index)
        for branch in sample.record["branches"]:
            if branch["task"] == "count":
                pairs[len(things_of(sample)), branch["answer"], branch["prompt"]] += 1
    assert set(pairs.values()) == {2}
    assert len(pairs) == (MOST - MOST_OF_ONE + 1) * (MOST_OF_ONE + 1) * len(PLURALS)


def test_the_wording_tells_nothing(scenes: list[Sample]) -> None:
    """The option named first, and each direction asked for, is right as often as the other."""
    for task in ("left_right", "above_below", "distance", "depth", "compare"):
        first: dict[str, Counter[bool]] = defaultdict(Counter)
        for _, branch in asked(scenes, task):
            words = branch["prompt"].split()
            named = [word for word in words if f" {word}" in branch["choices"]]
            assert len(named) == 2
            first[words[2]][f" {named[0]}" == branch["answer"]] += 1
        assert len(first) == {"distance": 1, "compare": 1}.get(task, 2)
        for what, counter in first.items():
            share = counter[True] / counter.total()
            assert abs(share - 0.5) < 3 * (0.25 / counter.total()) ** 0.5, (task, what)


def test_no_branch_holds_the_answer_of_another(scenes: list[Sample]) -> None:
    """Branches do not see each other; what all of them see, the prefix, is pictures, or the problem's text."""
    for scene in scenes:
        texts = [part["text"] for part in scene.record["prefix"] if "text" in part]
        assert not texts or scene.record["category"] == "problem"
        prompts = [branch["prompt"] for branch in scene.record["branches"]]
        assert len(prompts) == len(set(prompts))


def test_a_scene_is_a_function_of_split_seed_and_index(maker: SceneMaker, scenes: list[Sample]) -> None:
    def made(split: str, seed: int) -> list[bytes]:
        other = SceneMaker(split, seed, SIDE, TRAIN, maker.sprites, PLURALS, "CC0-1.0")
        return [content for index in range(40) for _, content in other(index).images]

    same = [content for scene in scenes[:40] for _, content in scene.images]
    assert made("train", 0) == same
    assert not set(made("test", 0)) & set(same)
    assert not set(made("train", 1)) & set(same)


def test_splits_use_their_own_stamps(catalogue, tmp_path: Path) -> None:
    prepare_scenes(catalogue, tmp_path, Drawn(train=160, test=80, size=SIDE, seed=0), workers=1)
    shown = {}
    for split, kinds in (("train", TRAIN), ("test", TEST), ("heldout", HELD_OUT)):
        path = tmp_path / "scenes" / split
        assert lint(path) == []
        index = read_index(path)
        samples = [read_sample(path, index, number) for number in range(len(index["key"]))]
        assert {sample.record["category"] for sample in samples} == set(kinds)
        shown[split] = {
            thing["stamp"] for sample in samples for things in sample.record["truth"]["pictures"] for thing in things
        }
    held_out = {stamp.path for stamp in catalogue.stamps if stamp.held_out}
    assert shown["heldout"] <= held_out
    assert not (shown["train"] | shown["test"]) & held_out


def contents(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_workers_change_nothing(catalogue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmoe.data.prepare.SAMPLES_PER_SHARD", 20)
    for workers in (1, 2):
        prepare_scenes(catalogue, tmp_path / str(workers), Drawn(train=50, test=20, size=32, seed=3), workers=workers)
    one, two = contents(tmp_path / "1"), contents(tmp_path / "2")
    assert len([name for name in one if name.startswith("scenes/train/shard-")]) == 3
    assert one == two


def test_a_repeated_run_makes_nothing_and_other_options_make_all_again(
    catalogue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"train": 12, "test": 8, "size": 32}
    prepare_scenes(catalogue, tmp_path, Drawn(**options, seed=0), workers=1)
    before = contents(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(parallel, "_run", lambda number: pytest.fail(f"shard {number} was made again"))
        prepare_scenes(catalogue, tmp_path, Drawn(**options, seed=0), workers=1)
    assert contents(tmp_path) == before
    assert capsys.readouterr().out.count("up to date") == 3
    prepare_scenes(catalogue, tmp_path, Drawn(**options, seed=1), workers=1)
    after = contents(tmp_path)
    assert after.keys() == before.keys()
    assert after["scenes/train/shard-000000.tar"] != before["scenes/train/shard-000000.tar"]


def test_an_interrupted_run_keeps_what_is_finished(catalogue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmoe.data.prepare.SAMPLES_PER_SHARD", 10)
    drawn = Drawn(train=40, test=8, size=32, seed=0)
    prepare_scenes(catalogue, tmp_path / "whole", drawn, workers=1)

    run, made = parallel._run, []

    def stop_at_the_third(number: int) -> int:
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(number)
        return run(number)

    root = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        patch.setattr(parallel, "_run", stop_at_the_third)
        with pytest.raises(KeyboardInterrupt):
            prepare_scenes(catalogue, root, drawn, workers=1)
    assert not (root / "scenes" / "train").exists()
    (leftover,) = (root / "scenes").glob(".train.*.tmp")
    stamps = {path: path.stat().st_mtime_ns for path in leftover.glob("*.tar")}
    assert len(stamps) == 2

    again: list[int] = []
    monkeypatch.setattr(parallel, "_run", lambda number: (again.append(number), run(number))[1])
    prepare_scenes(catalogue, root, drawn, workers=1)
    assert again[:2] == [2, 3]
    assert contents(root) == contents(tmp_path / "whole")


def test_every_word_of_the_scenes_is_one_token(catalogue, tmp_path: Path) -> None:
    prepare_scenes(catalogue, tmp_path, Drawn(train=8, test=8, size=32, seed=0), workers=1)
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    for sentence in wording(PLURALS):
        assert len(tokenizer.encode(sentence)) == len(sentence.split()), sentence
    assert read_card(tmp_path / "scenes" / "train")["samples"] == 8
