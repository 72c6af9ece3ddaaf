"""Scenes in CV-Bench's format: one picture, one question of its four tasks, lettered options."""

import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmoe.data import cv_bench
from mmoe.data.prepare.compose import encode
from mmoe.data.prepare.questions import MOST, MOST_OF_ONE, Branch, ask, digits, stratum
from mmoe.data.prepare.scenes import Scene, SceneMaker
from mmoe.data.shards import Description, Sample
from mmoe.errors import UserError

CHOICES_VERSION = 1
"""Of the questions: raise it when the same seed gives others."""
TASKS = {"Count": "2D", "Relation": "2D", "Depth": "3D", "Distance": "3D"}
"""CV-Bench's tasks and their types."""
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}


@dataclass(frozen=True)
class Choice:
    """A question about a scene of one picture."""

    scene: Scene
    question: str
    options: list[str]
    place: int
    """Of the right option."""
    target: str | None = None
    """The class that is counted."""

    @property
    def plain(self) -> list[Branch]:
        """The scene's own questions, to train on."""
        return [{name: branch[name] for name in ("task", "prompt", "answer")} for branch in self.scene[2]]


@dataclass(frozen=True)
class ChoiceMaker:
    """Makes samples to train on (called with an index), and rows of CV-Bench's files.

    Attributes:
        scenes: makes the pictures; its split, seed, sprites, plurals and licence are this maker's.
    """

    scenes: SceneMaker

    def __call__(self, index: int) -> Sample:
        task = list(TASKS)[stratum(f"{self.scenes.seed}/{self.scenes.split}/task", index, len(TASKS))]
        choice = self.choice(task, index // len(TASKS))
        (picture,), things, _, _ = choice.scene
        letters = [f"({letter})" for letter in cv_bench.LETTERS[: len(choice.options)]]
        prompt = f"{cv_bench.prompt(choice.question, choice.options)}\n{cv_bench.SUFFIX}"
        record = {
            "source": "cv_bench",
            "license": self.scenes.license,
            "category": task,
            "prefix": [{"image": 0}],
            "branches": [ask(task, prompt, letters[choice.place], letters), *choice.plain],
            "truth": {"pictures": [[thing.__dict__ for thing in shown] for shown in things]},
        }
        return Sample(f"cv-bench-train-{index:08d}", record, [("jpg", encode(picture))])

    def choice(self, task: str, ordinal: int) -> Choice:
        """Question ``ordinal`` of a task: a pure function of (split, seed, task, ordinal) and the sprites."""
        draw = f"{self.scenes.seed}/{self.scenes.split}/{task}"
        rng = random.Random(f"{draw}/{ordinal}")
        made: Choice = getattr(self, f"_{task.lower()}")(rng, draw, ordinal)
        return made

    def _count(self, rng: random.Random, draw: str, ordinal: int) -> Choice:
        labels, numbers = list(self.scenes.sprites), range(MOST_OF_ONE + 1)
        sizes = (MOST - MOST_OF_ONE + 1, len(numbers), len(labels), len(numbers))
        strata = sizes[0] * sizes[1] * sizes[2] * sizes[3]
        more, wanted, label, place = digits(stratum(draw, ordinal, strata), *sizes)
        scene = self.scenes.count_scene(rng, MOST_OF_ONE + more, labels[label], wanted)
        options = [str(number) for number in numbers if number != wanted]
        rng.shuffle(options)
        options.insert(place, str(wanted))
        plural = self.scenes.plurals[labels[label]]
        return Choice(scene, f"How many {plural} are in the image?", options, place, labels[label])

    def _relation(self, rng: random.Random, draw: str, ordinal: int) -> Choice:
        across, first_word, named_first, three = digits(stratum(draw, ordinal, 16), 2, 2, 2, 2)
        near_first = rng.getrandbits(1)
        scene = self.scenes.relation_scene(rng, first_word, named_first, first_word, named_first, near_first, three)
        branch = scene[2][0 if across else 1]
        a, b = _named(branch)
        asked = (("left", "right") if across else ("above", "below"))[1 - first_word]
        # What was asked of two things holds of the first named one where that is the answer, else its opposite does.
        options = [asked, OPPOSITE[asked]]
        return Choice(scene, f"Where is the {a} located with respect to the {b}?", options, 1 - named_first)

    def _depth(self, rng: random.Random, draw: str, ordinal: int) -> Choice:
        nearer_first, three = digits(stratum(draw, ordinal, 4), 2, 2)
        scene = self.scenes.depth_scene(rng, nearer_first, rng.getrandbits(1), three)
        a, b = _named(scene[2][0])
        question = f"Which object is closer to the camera taking this photo, the {a} or the {b}?"
        return Choice(scene, question, [a, b], 1 - nearer_first)

    def _distance(self, rng: random.Random, draw: str, ordinal: int) -> Choice:
        near_first = stratum(draw, ordinal, 2)
        left, left_first, above, above_first = (rng.getrandbits(1) for _ in range(4))
        scene = self.scenes.relation_scene(rng, left, left_first, above, above_first, near_first, 1)
        a, b = _named(scene[2][2])
        (anchor,) = {thing.label for thing in scene[1][0]} - {a, b}
        return Choice(scene, f"Which object is closer to the {anchor}, the {a} or the {b}?", [a, b], 1 - near_first)

    def row(self, task: str, ordinal: int, idx: int) -> dict[str, Any]:
        """One row of a file in CV-Bench's layout."""
        choice = self.choice(task, ordinal)
        name = f"scenes_{ordinal}.jpg"
        return {
            "idx": idx,
            "type": TASKS[task],
            "task": task,
            "image": {"bytes": encode(choice.scene[0][0]), "path": name},
            "question": choice.question,
            "choices": choice.options,
            "answer": f"({cv_bench.LETTERS[choice.place]})",
            "prompt": cv_bench.prompt(choice.question, choice.options),
            "filename": f"img/{TASKS[task]}/{task.lower()}/{name}",
            "source": f"scenes {TASKS[task]}",
            "source_dataset": f"mmoe scenes, {self.scenes.split}",
            "source_filename": f"{task}/{ordinal}",
            "target_class": choice.target,
            "target_size": None,
            "bbox": None,
        }


def _named(branch: Branch) -> tuple[str, str]:
    """The two things of a question in the order in which it names them."""
    a, b = (choice.strip() for choice in branch["choices"])
    return a, b


def write_files(out: Path, description: Description, maker: ChoiceMaker) -> bool:
    """Write ``description.samples`` rows, the tasks one after another, unless they are there; False if they were.

    Raises:
        UserError: there is something else at ``out``.
    """
    paths = {kind: f"{stem}.parquet" for kind, stem in cv_bench.TYPES.items()}
    made = {cv_bench.fingerprint(out / name) for name in paths.values()}
    if made == {description.fingerprint}:
        return False
    if out.exists() and any(out.iterdir()) and "" in made:
        raise UserError("there are files that were not made here", str(out), "move them away, then prepare again")
    folder = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    first = 0
    for kind, name in paths.items():
        tasks = {task: _share(description.samples, task) for task in TASKS if TASKS[task] == kind}
        cv_bench.write(folder / name, _rows(maker, tasks, first), description.fingerprint)
        first += sum(tasks.values())
    shutil.rmtree(out, ignore_errors=True)
    folder.rename(out)
    return True


def _share(rows: int, task: str) -> int:
    return (rows + len(TASKS) - 1 - list(TASKS).index(task)) // len(TASKS)


def _rows(maker: ChoiceMaker, tasks: dict[str, int], idx: int) -> Iterator[dict[str, Any]]:
    for task, number in tasks.items():
        for ordinal in range(number):
            yield maker.row(task, ordinal, idx)
            idx += 1
