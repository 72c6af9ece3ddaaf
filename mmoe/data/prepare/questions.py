"""What is asked about a scene: the wording, the choices, and draws that favour no answer."""

import random
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from mmoe.data.prepare.compose import Placed

MOST = 5
"""Things in a counting scene, at most."""
MOST_OF_ONE = 3
"""Things of the class that is counted, at most."""
COLUMNS, ROWS = "abcd", "efgh"
"""``describe`` names places by column and row; letters that differ, and no digits, so that each is one token."""

Branch = dict[str, Any]


@lru_cache(maxsize=4096)
def _shuffled(seed: str, block: int, n: int) -> tuple[int, ...]:
    order = list(range(n))
    random.Random(f"{seed}/{block}").shuffle(order)
    return tuple(order)


def stratum(seed: str, index: int, n: int) -> int:
    """A number in [0, n) for each index, at random but each exactly once in every n indices from a multiple of n on."""
    block, place = divmod(index, n)
    return _shuffled(seed, block, n)[place]


def digits(number: int, *bases: int) -> list[int]:
    """``number`` in a mixed base, lowest first: several independent draws out of one stratum."""
    out = []
    for base in bases:
        number, digit = divmod(number, base)
        out.append(digit)
    return out


def ask(task: str, prompt: str, answer: object, choices: Sequence[object] = ()) -> Branch:
    """A question; one without choices is trained on and not evaluated."""
    branch = {"task": task, "prompt": prompt, "answer": f" {answer}"}
    return branch | {"choices": [f" {choice}" for choice in choices]} if choices else branch


def caption(label: str, labels: Sequence[str]) -> Branch:
    return ask("caption", "what is this ?", label, labels)


def total(number: int, task: str = "total", least: int = 1) -> Branch:
    return ask(task, "how many things ?", number, range(least, MOST + 1))


def count(plural: str, number: int) -> Branch:
    return ask("count", f"how many {plural} ?", number, range(MOST_OF_ONE + 1))


def which(task: str, what: str, answer: str, options: tuple[str, str]) -> Branch:
    """Which of two things is e.g. ``"left"`` of the other; the options in the order in which they are offered."""
    return ask(task, f"which is {what} , {options[0]} or {options[1]} ?", answer, options)


def compare(first_has_more: bool, options: tuple[str, str]) -> Branch:
    answer = "first" if first_has_more else "second"
    return ask("compare", f"which picture has more things , {options[0]} or {options[1]} ?", answer, options)


def describe(things: Sequence[Placed], side: int) -> Branch:
    """Every thing with its column and row, from left to right: dense supervision, not a question of the tests."""
    columns, rows = len(COLUMNS), len(ROWS)
    cells = sorted((int(thing.x * columns / side), int(thing.y * rows / side), thing.label) for thing in things)
    return ask("describe", "describe .", " ".join(f"{COLUMNS[x]} {ROWS[y]} {label}" for x, y, label in cells))


def problem(counts: Mapping[str, int], plurals: Mapping[str, str]) -> str:
    """A counting scene in words."""
    groups = [f"{number} {label if number == 1 else plurals[label]}" for label, number in counts.items()]
    return f"there are {' and '.join(groups)} ."


def wording(plurals: Mapping[str, str]) -> list[str]:
    """Every word that scenes use, each in its place in a sentence: what the tokenizer learns whole words from."""
    labels = list(plurals)
    a, b = labels[:2]
    branches = [
        *(caption(label, labels) for label in labels),
        *(total(number) for number in range(1, MOST + 1)),
        *(count(plural, number) for plural in plurals.values() for number in range(MOST_OF_ONE + 1)),
        *(which("", what, a, (a, b)) for what in ("left", "right", "above", "below", "nearer", "farther")),
        which("", f"closer to the {a}", b, (b, a)),
        compare(True, ("first", "second")),
        compare(False, ("second", "first")),
    ]
    cells = "".join(f" {letter}" for letter in COLUMNS + ROWS)
    problems = [problem({a: number, b: 1}, plurals) for number in range(1, MOST)]
    return [text for branch in branches for text in (branch["prompt"], branch["answer"])] + [
        "describe .",
        cells,
        *problems,
    ]
