"""Multiple-choice questions about pictures: the model answers with the choice it finds likeliest.

Every branch of a data set that has ``choices`` is a question. A choice scores the sum of its tokens' log-probabilities
after the question's prompt; where one choice begins another one (`` 1``, `` 12``), the ``<eos>`` after it counts too.
Nothing is selected: every question of every sample counts, and every task is reported.
"""

import base64
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from PIL import Image
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table
from tokenizers import Tokenizer
from torch import Tensor

from mmoe.data.batch import Illustrated, batches_from_documents, illustrate
from mmoe.data.decoders import build
from mmoe.data.document import BadSample
from mmoe.data.pixels import open_image, to_rgb
from mmoe.data.source import Encoded, Source
from mmoe.errors import UserError
from mmoe.evaluate.history import TOLD
from mmoe.evaluate.statistics import majority_share, wilson_interval
from mmoe.recipe.schema import Recipe
from mmoe.recipe.tokens import EOS

EXAMPLES = 16
THUMBNAIL = 192
"""Longest side of one picture of an example, pixels; several stand side by side."""
Images = Literal["shown", "blank", "none"]
"""Pictures as they are, a uniform grey in the place of each, or none at all: the prompts alone."""


class Model(Protocol):
    """What `mmoe.load` returns, as far as it is needed here."""

    recipe: Recipe
    tokenizer: Tokenizer
    image_tokens: int
    image_sizes: tuple[int, ...]

    def forward_batch(self, batch: dict[str, Any]) -> Tensor:
        """The batch of docs/architecture.md → logits, fp32 ``[b, s, V]``."""
        ...


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


@dataclass(frozen=True)
class Probe:
    """A branch of a document and what it measures: one choice's tokens, or, without a ``choice``, every choice's."""

    question: Question
    branch: int
    choice: int | None
    tokens: list[int]
    """The choice's tokens, with ``<eos>`` where that counts; or the one token of each choice."""


def questions(record: dict[str, Any], key: str) -> list[Question]:
    """The branches with choices; branches without any are there for training only.

    Raises:
        BadSample: an answer is not among its choices, or one of them is no text.
    """
    found = []
    branches = record.get("branches", [])
    for number, branch in enumerate(branches if isinstance(branches, list) else []):
        if isinstance(branch, dict) and branch.get("choices"):
            try:
                texts = [branch[name] for name in ("task", "prompt", "answer")]
            except KeyError as error:
                raise BadSample(f"branches[{number}] has no {error}") from None
            choices = branch["choices"]
            if not isinstance(choices, list) or not all(isinstance(text, str) for text in (*texts, *choices)):
                raise BadSample(f"branches[{number}]: a question's texts and its list of choices are no texts")
            if branch["answer"] not in choices:
                raise BadSample(f"branches[{number}]: the answer is not among the choices")
            found.append(Question(key, *texts, choices=list(choices)))
    return found


def _probes(question: Question, tokenizer: Tokenizer) -> list[tuple[str, int | None, list[int]]]:
    """The branches that score a question: answer text, choice, tokens."""
    ids = [tokenizer.encode(choice, add_special_tokens=False).ids for choice in question.choices]
    if all(len(tokens) == 1 for tokens in ids):
        # A token's probability depends on what stands before it alone: one branch holds all the choices' scores.
        return [(question.choices[0], None, [tokens[0] for tokens in ids])]
    begins = any(a is not b and b[: len(a)] == a for a in ids for b in ids)
    end = [EOS] if begins else []
    return [(text, i, tokens + end) for i, (text, tokens) in enumerate(zip(question.choices, ids, strict=True))]


def documents(
    sample: Encoded, asked: Sequence[Question], model: Model, key: str
) -> Iterator[tuple[Illustrated, list[Probe]]]:
    """The sample with a branch for each thing to score, cut into several documents where one pack cannot hold it.

    Raises:
        BadSample: the record is not of the right form.
    """
    limit = model.recipe.data.sequence_length
    prefix = {"prefix": sample.record.get("prefix")}
    start = len(
        illustrate(Encoded(record=prefix, images=sample.images), model.tokenizer, model.image_tokens, key).document
    )
    branches: list[dict[str, str]] = []
    probes: list[Probe] = []
    length, part = start, 0

    def made() -> tuple[Illustrated, list[Probe]]:
        record = {**prefix, "branches": branches}
        name = f"{key} (part {part + 1})" if part else key
        return illustrate(
            Encoded(record=record, images=sample.images), model.tokenizer, model.image_tokens, name
        ), probes

    for question in asked:
        prompt = len(model.tokenizer.encode(question.prompt, add_special_tokens=False).ids)
        for answer, choice, tokens in _probes(question, model.tokenizer):
            here = prompt + 1 + len(model.tokenizer.encode(answer, add_special_tokens=False).ids)
            if branches and length + here > limit:
                yield made()
                branches, probes, length, part = [], [], start, part + 1
            branches.append({"prompt": question.prompt, "answer": answer})
            probes.append(Probe(question, len(branches), choice, tokens))
            length += here
    if branches:
        yield made()


def _enter_scores(batch: dict[str, Any], logits: Tensor, probes: dict[str, list[Probe]]) -> None:
    """Write a batch's scores into its questions; a document with a bad image has no places to read."""
    rows, columns = batch["loss_mask"].bool().nonzero(as_tuple=True)
    log_p = logits[rows, columns].float().log_softmax(-1)
    found: dict[tuple[str, int], list[int]] = {}
    for place, (row, column) in enumerate(zip(rows.tolist(), columns.tolist(), strict=True)):
        name = batch["samples"][row][int(batch["document"][row, column]) - 1]
        found.setdefault((name, int(batch["branch"][row, column])), []).append(place)
    for (name, branch), places in found.items():
        probe = probes[name][branch - 1]
        if probe.choice is None:
            probe.question.scores.update(enumerate(log_p[places[0], probe.tokens].tolist()))
        else:
            # The places run over the answer and its <eos>, which `tokens` may leave out.
            read = log_p[places[: len(probe.tokens)], probe.tokens]
            probe.question.scores[probe.choice] = float(read.double().sum())


def without_images(sample: Encoded) -> Encoded:
    """The sample's texts alone."""
    prefix = sample.record.get("prefix")
    texts = [part for part in prefix if "image" not in part] if isinstance(prefix, list) else prefix
    return Encoded(record=sample.record | {"prefix": texts}, images=())


@torch.no_grad()
def measure(
    model: Model, made: Iterable[tuple[Illustrated, list[Probe]]], *, sequence_length: int, blank: bool = False
) -> list[str]:
    """Enter the scores of documents from :func:`documents` into their questions.

    Args:
        model: see :class:`Model`.
        made: the documents, each with a name of its own.
        sequence_length: tokens of a pack; no document is longer.
        blank: put a uniform grey picture in the place of every image.

    Returns:
        the documents with a bad image, named with the reason.
    """
    skipped: list[str] = []
    probes: dict[str, list[Probe]] = {}

    def stream() -> Iterator[Illustrated]:
        for document, measured in made:
            probes[document.document.key] = measured
            yield document

    data = model.recipe.data
    batches = batches_from_documents(
        stream(),
        decoder=build(data, model.image_sizes),
        sequence_length=sequence_length,
        packs=model.recipe.train.micro_batch,
        images_per_pack=data.images_per_pack,
    )
    for batch in batches:
        skipped += batch["skipped"]
        if blank:
            for pixels in batch["images"].values():
                pixels.zero_()
        _enter_scores(batch, model.forward_batch(batch), probes)
    return skipped


def answer(model: Model, source: Source, *, images: Images = "shown", limit: int | None = None) -> dict[str, Any]:
    """Ask every question of a data set and count.

    Args:
        model: see :class:`Model`.
        source: the data set.
        images: what the model sees of the pictures.
        limit: only the first so many samples.

    Returns:
        ``samples``, ``skipped`` (the bad samples, named with the reason), ``tasks`` (see :func:`summarise`) and
        ``examples`` (see :func:`examples`).
    """
    asked: list[Question] = []
    bad: list[str] = []
    count = min(len(source), limit or len(source))

    def made() -> Iterator[tuple[Illustrated, list[Probe]]]:
        for number in progress(range(count)):
            key = source.key(number)
            try:
                sample = source.read(number)
                here = questions(sample.record, key)
                cut = list(documents(without_images(sample) if images == "none" else sample, here, model, key))
            except BadSample as error:
                bad.append(f"{key}: {error}")
                continue
            asked.extend(here)
            yield from cut

    length = model.recipe.data.sequence_length
    skipped = measure(model, made(), sequence_length=length, blank=images == "blank")
    answered = [question for question in asked if len(question.scores) == len(question.choices)]
    numbers = {source.key(number): number for number in range(len(source))}
    return {
        "samples": count,
        "skipped": bad + skipped,
        "tasks": summarise(answered),
        "examples": examples(answered, lambda key: source.read(numbers[key]).images),
    }


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


def show(result: dict[str, Any], out: Path | None, made: Table | None = None) -> None:
    """Print a suite's table, its own ``made`` or :func:`table`, and what it skipped; write every number to ``out``."""
    told = TOLD[result["images"]]
    print(f"{result['data']}{f', {told}' if told else ''}: {result['samples']} samples")
    Console().print(made or table(result))
    for reason in result["skipped"]:
        print(f"skipped: {reason}")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def heading(suite: str, checkpoint: Path, data: Path, images: Images) -> dict[str, Any]:
    """What a suite's numbers are of; ``blank`` says the same as ``images`` to whoever knows grey pictures alone."""
    about = {"suite": suite, "checkpoint": str(checkpoint), "data": str(data)}
    return about | {"blank": images == "blank", "images": images}


def run(checkpoint: Path, data: Path, out: Path | None, *, images: Images = "shown", limit: int | None = None) -> None:
    """`mmoe evaluate CHECKPOINT --suite scenes`: print the table, write the numbers.

    Raises:
        UserError: the checkpoint or the data set is missing or broken, or the data set asks nothing.
    """
    import mmoe

    source = Source(data, f"{data.parent.name}/{data.name}")
    result = heading("scenes", checkpoint, data, images)
    result |= answer(mmoe.load(checkpoint), source, images=images, limit=limit)
    if not result["tasks"]:
        raise UserError("no sample asks a question with choices", str(data), "give a split of the scenes data set")
    show(result, out)
