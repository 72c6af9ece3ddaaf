"""A question and its answer, what a model sees of a sample, and how a suite's numbers are counted and shown."""

import base64
import io
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table

from mmoe.data.document import with_system_prompt
from mmoe.data.pixels import open_image, to_rgb
from mmoe.data.source import Encoded
from mmoe.evaluate.history import TOLD
from mmoe.evaluate.statistics import majority_share, wilson_interval

EXAMPLES = 16
THUMBNAIL = 192
"""Longest side of one picture of an example, pixels; several stand side by side."""
Images = Literal["shown", "blank", "none"]
"""Pictures as they are, a uniform grey in the place of each, or none at all: the prompts alone."""


@dataclass(frozen=True, kw_only=True)
class Asking:
    """How a suite goes over its samples."""

    images: Images = "shown"
    """What the model sees of the pictures."""
    limit: int | None = None
    """Only so many samples: the first ones, of CV-Bench rows at even distances."""
    system_prompt: str = ""
    """A text in front of every sample, as a mixture's."""


PLAIN = Asking()
"""Everything, as it is."""


@dataclass(eq=False)
class Question:
    """One question and, once it is scored, a log-probability for each of its choices."""

    key: str
    task: str
    prompt: str
    answer: str
    choices: list[str]
    scores: dict[int, float] = field(default_factory=dict)

    @property
    def given(self) -> str:
        """The likeliest choice; the first of equals."""
        return self.choices[max(self.scores, key=lambda choice: (self.scores[choice], -choice))]

    @property
    def shown(self) -> str:
        """What an example shows as the answer."""
        return self.given


def as_seen(sample: Encoded, how: Asking) -> Encoded:
    """The sample as the model is shown it: without its pictures where these are ``"none"`` (blank ones are made so in
    the batch), and behind the system prompt, which stands where a mixture's does."""
    record, prefix = sample.record, sample.record.get("prefix")
    none = how.images == "none"
    if none and isinstance(prefix, list):
        record = record | {"prefix": [part for part in prefix if not (isinstance(part, dict) and "image" in part)]}
    return Encoded(record=with_system_prompt(record, how.system_prompt), images=() if none else sample.images)


def progress(numbers: Sequence[int]) -> Iterable[int]:
    """The numbers, with a bar on a terminal."""
    console = Console(stderr=True)
    return track(numbers, "evaluating", console=console, disable=not console.is_terminal)


def summarise(answered: Sequence[Question]) -> dict[str, dict[str, Any]]:
    """Per task: ``n``, ``correct``, ``accuracy``, its 95% interval from ``low`` to ``high``, ``chance``, ``majority``.

    ``majority`` is what the best constant answer scores: always the same text, or, where the choices differ between
    questions, always the choice in the same position; ``majority_answer`` says which.
    """
    tasks: dict[str, dict[str, Any]] = {}
    for task in sorted({question.task for question in answered}):
        mine = [question for question in answered if question.task == task]
        n, correct = len(mine), sum(question.given == question.answer for question in mine)
        low, high = wilson_interval(correct, n)
        texts = [question.answer for question in mine]
        places = [question.choices.index(question.answer) for question in mine]
        by_text, by_place = majority_share(texts), majority_share(places)
        fixed = len({tuple(question.choices) for question in mine}) == 1
        constant = (
            repr(max(sorted(set(texts)), key=texts.count).strip())
            if fixed or by_text >= by_place
            else f"choice {max(sorted(set(places)), key=places.count) + 1}"
        )
        tasks[task] = {
            "n": n,
            "correct": correct,
            "accuracy": correct / n,
            "low": low,
            "high": high,
            "chance": sum(1 / len(question.choices) for question in mine) / n,
            "majority": by_text if fixed else max(by_text, by_place),
            "majority_answer": constant,
        }
    return tasks


def examples(answered: Sequence[Question], pictures: Callable[[str], Sequence[bytes]]) -> list[dict[str, Any]]:
    """Of each task in turn the first question about a picture not yet shown, with the picture as PNG in base64."""
    queues = {
        task: [question for question in answered if question.task == task]
        for task in sorted({q.task for q in answered})
    }
    shown: list[dict[str, Any]] = []
    used: set[str] = set()
    while any(queues.values()) and len(shown) < EXAMPLES:
        for queue in queues.values():
            while queue and queue[0].key in used:
                queue.pop(0)
            images = pictures(queue[0].key) if queue else ()
            if queue and images and len(shown) < EXAMPLES:
                used.add(queue[0].key)
                shown.append(_example(queue[0], images))
            del queue[:1]
    return shown


def _example(question: Question, images: Sequence[bytes]) -> dict[str, Any]:
    pictures = [to_rgb(open_image(image)) for image in images]
    for one in pictures:
        one.thumbnail((THUMBNAIL, THUMBNAIL))
    gap = 4 * (len(pictures) > 1)
    size = (sum(one.width + gap for one in pictures) - gap, max(one.height for one in pictures))
    picture = Image.new("RGB", size, "white")
    for number, one in enumerate(pictures):
        picture.paste(one, (sum(before.width + gap for before in pictures[:number]), 0))
    file = io.BytesIO()
    picture.save(file, "PNG")
    return {
        "sample": question.key,
        "task": question.task,
        "prompt": question.prompt,
        "choices": question.choices,
        "answer": question.shown,
        "truth": question.answer,
        "png": base64.b64encode(file.getvalue()).decode(),
    }


def table(result: dict[str, Any]) -> Table:
    """The result as a table, every task a row; shares in percent."""
    made = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("task", "n", "accuracy", "95% interval", "chance", "majority", "majority answer"):
        made.add_column(name, justify="left" if name in ("task", "majority answer") else "right", no_wrap=True)
    for task, row in result["tasks"].items():
        interval = f"{row['low']:.1%} – {row['high']:.1%}"
        shares = [f"{row[name]:.1%}" for name in ("chance", "majority")]
        made.add_row(task, str(row["n"]), f"{row['accuracy']:.1%}", interval, *shares, row["majority_answer"])
    return made


def show(result: dict[str, Any], out: Path | None, shown: Table) -> None:
    """Print a suite's table and what it skipped; write every number to ``out``."""
    told = TOLD[result["images"]]
    print(f"{result['data']}{f', {told}' if told else ''}: {result['samples']} samples")
    Console().print(shown)
    for reason in result["skipped"]:
        print(f"skipped: {reason}")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def heading(suite: str, checkpoint: Path, data: Path, how: Asking) -> dict[str, Any]:
    """What a suite's numbers are of; ``blank`` says the same as ``images`` to whoever knows grey pictures alone."""
    about = {"suite": suite, "checkpoint": str(checkpoint), "data": str(data)}
    about |= {"system_prompt": how.system_prompt} if how.system_prompt else {}
    return about | {"blank": how.images == "blank", "images": how.images}
