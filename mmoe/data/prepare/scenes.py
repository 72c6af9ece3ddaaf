"""Scenes: stamps composed onto backgrounds, with exact ground truth and questions that favour no answer."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from math import dist
from typing import Any

import numpy as np

from mmoe.data.prepare import questions
from mmoe.data.prepare.compose import (
    Placed,
    Sprite,
    background,
    encode,
    landscape,
    paste,
    scatter,
)
from mmoe.data.prepare.questions import MOST, MOST_OF_ONE, Branch, digits, stratum
from mmoe.data.shards import Sample

SCENES_VERSION = 2
"""Of the scenes' contents: raise it when the same seed gives other scenes."""

TRAIN = {"caption": 10, "count": 14, "relation": 9, "depth": 5, "compare": 1, "problem": 1}
"""Scenes of each kind among 40 consecutive ones."""
TEST = {"caption": 1, "count": 2, "relation": 2, "depth": 1, "compare": 1, "problem": 1}
HELD_OUT = {kind: number for kind, number in TEST.items() if kind != "problem"}
"""A problem in words shows no stamp."""

Scene = tuple[list[np.ndarray], list[list[Placed]], list[Branch], list[dict[str, Any]]]
"""Pictures, the things in each, questions, and what the prefix holds after the pictures."""


@dataclass(frozen=True)
class SceneMaker:
    """Makes scene ``index`` of one split: a pure function of (split, seed, index) and the sprites.

    Attributes:
        split: name of the split; also its stream of random numbers.
        seed: of the data set.
        side: of a picture in pixels.
        kinds: kind of scene → how many of every ``sum(kinds.values())`` consecutive ones.
        sprites: scene class → its sprites on this side of the split.
        plurals: scene class → plural.
        license: of the sprites.
    """

    split: str
    seed: int
    side: int
    kinds: dict[str, int]
    sprites: dict[str, list[Sprite]]
    plurals: dict[str, str]
    license: str

    def plan(self, index: int) -> tuple[str, int]:
        """The kind of scene ``index``, and how many of that kind come before it."""
        cycle = [(kind, place) for kind, number in self.kinds.items() for place in range(number)]
        kind, place = cycle[stratum(f"{self.seed}/{self.split}/kind", index, len(cycle))]
        return kind, index // len(cycle) * self.kinds[kind] + place

    def __call__(self, index: int) -> Sample:
        kind, ordinal = self.plan(index)
        rng = random.Random(f"{self.seed}/{self.split}/{index}")
        draw = f"{self.seed}/{self.split}/{kind}"
        pictures, things, branches, text = getattr(self, f"_{kind}")(rng, draw, ordinal)
        record = {
            "source": "scenes",
            "license": self.license,
            "category": kind,
            "prefix": [{"image": number} for number in range(len(pictures))] + text,
            "branches": branches,
            "truth": {"pictures": [[thing.__dict__ for thing in picture] for picture in things]},
        }
        key = f"scenes-{self.split}-{index:08d}"
        return Sample(key, record, [("jpg", encode(picture)) for picture in pictures])

    def _labels(self, rng: random.Random, number: int) -> list[str]:
        return rng.sample(list(self.sprites), number)

    def _sprite(self, rng: random.Random, label: str) -> Sprite:
        return rng.choice(self.sprites[label])

    def _crowd(self, rng: random.Random, labels: Sequence[str]) -> tuple[np.ndarray, list[Placed]]:
        """Small things of nearly one size, so that neither area nor size tells their number."""
        picture = background(rng, self.side)
        scale = rng.choice((14, 16, 18))
        scales = [rng.choice((scale, scale + 2)) for _ in labels]
        return picture, scatter(rng, picture, [self._sprite(rng, label) for label in labels], scales)

    def _caption(self, rng: random.Random, draw: str, ordinal: int) -> Scene:
        labels = list(self.sprites)
        label = labels[stratum(draw, ordinal, len(labels))]
        picture = background(rng, self.side)
        things = scatter(rng, picture, [self._sprite(rng, label)], [rng.choice((24, 28, 32, 36, 40))])
        return [picture], [things], [questions.caption(label, labels), questions.describe(things, self.side)], []

    def _count(self, rng: random.Random, draw: str, ordinal: int) -> Scene:
        labels = list(self.sprites)
        number, wanted, label = digits(
            stratum(draw, ordinal, MOST * (MOST_OF_ONE + 1) * len(labels)), MOST, MOST_OF_ONE + 1, len(labels)
        )
        number += 1
        # Counts of one class are asked only where every count is possible: the total then says nothing about them.
        return self.count_scene(rng, number, labels[label], wanted if number >= MOST_OF_ONE else None)

    def count_scene(self, rng: random.Random, number: int, label: str, wanted: int | None) -> Scene:
        """``number`` things, ``wanted`` of them of class ``label``; None: there are none, and it is not asked."""
        others = rng.sample([other for other in self.sprites if other != label], 2)
        own = wanted or 0
        crowd = [label] * own + [rng.choice(others) for _ in range(number - own)]
        rng.shuffle(crowd)
        picture, things = self._crowd(rng, crowd)
        branches = [questions.total(number), questions.describe(things, self.side)]
        if wanted is not None:
            branches.insert(1, questions.count(self.plurals[label], wanted))
        return [picture], [things], branches, []

    def _relation(self, rng: random.Random, draw: str, ordinal: int) -> Scene:
        return self.relation_scene(rng, *digits(stratum(draw, ordinal, 64), *[2] * 6))

    def relation_scene(
        self,
        rng: random.Random,
        is_left: int,
        left_first: int,
        is_above: int,
        above_first: int,
        near_first: int,
        three: int,
    ) -> Scene:
        """Two or, with ``three``, three things; the bits say which way is asked and whether the answer is named first.

        The branches are left_right, above_below and, of three things, distance.
        """
        while True:
            picture = background(rng, self.side)
            labels = self._labels(rng, 3 if three else 2)
            scales = [rng.choice((16, 18, 20, 22)) for _ in labels]
            things = scatter(rng, picture, [self._sprite(rng, label) for label in labels], scales)
            pairs = [(a, b) for a in things for b in things if a is not b]
            gap = self.side * 0.15
            beside = [(a, b) for a, b in pairs if b.x - a.x > gap]
            over = [(a, b) for a, b in pairs if b.y - a.y > gap]
            near = [(a, b, c) for a, b in pairs for c in things if c not in (a, b) and _far(a, c) > 1.4 * _far(a, b)]
            if beside and over and (near or not three):
                break
        branches = []
        for task, found, words, first_word, first in (
            ("left_right", beside, ("left", "right"), is_left, left_first),
            ("above_below", over, ("above", "below"), is_above, above_first),
        ):
            a, b = rng.choice(found) if first_word else rng.choice(found)[::-1]
            options = (a.label, b.label) if first else (b.label, a.label)
            branches.append(questions.which(task, words[0] if first_word else words[1], a.label, options))
        if three:
            a, b, c = rng.choice(near)
            options = (b.label, c.label) if near_first else (c.label, b.label)
            branches.append(questions.which("distance", f"closer to the {a.label}", b.label, options))
        return [picture], [things], [*branches, questions.describe(things, self.side)], []

    def _depth(self, rng: random.Random, draw: str, ordinal: int) -> Scene:
        return self.depth_scene(rng, *digits(stratum(draw, ordinal, 8), 2, 2, 2))

    def depth_scene(self, rng: random.Random, nearer_first: int, farther_first: int, three: int) -> Scene:
        """Things on the ground: the nearer, the lower their foot, the larger they are, and the later painted.

        The first branch asks for the nearer of two, the second for the farther.
        """
        labels = self._labels(rng, 3 if three else 2)
        horizon = rng.uniform(0.2, 0.4)
        picture = landscape(rng, self.side, horizon)
        slots = list(range(len(labels)))
        rng.shuffle(slots)
        things = []
        for number, (label, slot) in enumerate(zip(labels, slots, strict=True)):
            depth = (number + rng.uniform(0, 0.5)) / (len(labels) - 0.5)
            scale = (12, 14, 16, 18, 20, 22, 24, 28)[round(depth * 7)]
            sprite = self._sprite(rng, label)
            foot = self.side * (horizon + 0.1 + (0.88 - horizon) * depth)
            x = self.side * (slot + rng.uniform(0.3, 0.7)) / len(labels)
            things.append(paste(rng, picture, sprite, scale, x, foot - sprite.pixels[scale].shape[0] / 2))
        branches = []
        for what, first in (("nearer", nearer_first), ("farther", farther_first)):
            far, near = sorted(rng.sample(range(len(things)), 2))
            answer, other = (near, far) if what == "nearer" else (far, near)
            options = (things[answer].label, things[other].label)
            branches.append(questions.which("depth", what, options[0], options if first else options[::-1]))
        return [picture], [things], [*branches, questions.describe(things, self.side)], []

    def _compare(self, rng: random.Random, draw: str, ordinal: int) -> Scene:
        first_has_more, first_named = digits(stratum(draw, ordinal, 4), 2, 2)
        numbers = sorted(rng.sample(range(1, MOST + 1), 2), reverse=bool(first_has_more))
        crowds = [self._crowd(rng, rng.choices(self._labels(rng, 2), k=number)) for number in numbers]
        options = ("first", "second") if first_named else ("second", "first")
        branches = [questions.compare(bool(first_has_more), options)]
        return [picture for picture, _ in crowds], [things for _, things in crowds], branches, []

    def _problem(self, rng: random.Random, draw: str, ordinal: int) -> Scene:
        number = 2 + stratum(draw, ordinal, MOST - 1)
        a, b = self._labels(rng, 2)
        some = rng.randint(1, number - 1)
        text = questions.problem({a: some, b: number - some}, self.plurals)
        return [], [], [questions.total(number, "sum", least=2)], [{"text": text}]


def _far(a: Placed, b: Placed) -> float:
    return dist((a.x, a.y), (b.x, b.y))
