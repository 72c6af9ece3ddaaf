"""Multiple-choice questions about pictures: the model answers with the choice it finds likeliest.

Every branch of a data set that has ``choices`` is a question. A choice scores the sum of its tokens' log-probabilities
after the question's prompt; where one choice begins another one (`` 1``, `` 12``), the ``<eos>`` after it counts too.
Nothing is selected: every question of every sample counts, and every task is reported.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from mmoe.data.batch import Illustrated, batches_from_documents, illustrate
from mmoe.data.decoders import build
from mmoe.data.document import BadSample
from mmoe.data.source import Encoded, Source, name_of
from mmoe.data.tokenizer import Vocabulary
from mmoe.errors import UserError
from mmoe.evaluate.asked import PLAIN, Asking, Question, as_seen, examples, heading, progress, show, summarise, table
from mmoe.recipe.schema import Recipe


class Model(Protocol):
    """What `mmoe.load` returns, as far as it is needed here."""

    recipe: Recipe
    tokenizer: Vocabulary
    image_tokens: int
    image_sizes: tuple[int, ...]

    def forward_batch(self, batch: dict[str, Any]) -> Tensor:
        """The batch of docs/architecture.md → logits, fp32 ``[b, s, V]``."""
        ...


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


def asks(source: Source) -> bool:
    """Whether any sample of a data set has a question; no picture is read."""
    for number in range(len(source)):
        try:
            if questions(source.read(number, images=False).record, source.key(number)):
                return True
        except BadSample:
            continue
    return False


def _probes(question: Question, tokenizer: Vocabulary) -> list[tuple[str, int | None, list[int]]]:
    """The branches that score a question: answer text, choice, tokens."""
    ids = [tokenizer.encode(choice) for choice in question.choices]
    if all(len(tokens) == 1 for tokens in ids):
        # A token's probability depends on what stands before it alone: one branch holds all the choices' scores.
        return [(question.choices[0], None, [tokens[0] for tokens in ids])]
    begins = any(a is not b and b[: len(a)] == a for a in ids for b in ids)
    end = [tokenizer.special.eos] if begins else []
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
        prompt = len(model.tokenizer.encode(question.prompt))
        for answer, choice, tokens in _probes(question, model.tokenizer):
            here = prompt + 1 + len(model.tokenizer.encode(answer))
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


def answer(model: Model, source: Source, how: Asking = PLAIN) -> dict[str, Any]:
    """Ask every question of a data set and count.

    Args:
        model: see :class:`Model`.
        source: the data set.
        how: see :class:`Asking`.

    Returns:
        ``samples``, ``skipped`` (the bad samples, named with the reason), ``tasks`` (see :func:`summarise`) and
        ``examples`` (see :func:`examples`).
    """
    asked: list[Question] = []
    bad: list[str] = []
    count = min(len(source), how.limit or len(source))

    def made() -> Iterator[tuple[Illustrated, list[Probe]]]:
        for number in progress(range(count)):
            key = source.key(number)
            try:
                sample = source.read(number)
                here = questions(sample.record, key)
                cut = list(documents(as_seen(sample, how), here, model, key))
            except BadSample as error:
                bad.append(f"{key}: {error}")
                continue
            asked.extend(here)
            yield from cut

    length = model.recipe.data.sequence_length
    skipped = measure(model, made(), sequence_length=length, blank=how.images == "blank")
    answered = [question for question in asked if len(question.scores) == len(question.choices)]
    numbers = {source.key(number): number for number in range(len(source))}
    return {
        "samples": count,
        "skipped": bad + skipped,
        "tasks": summarise(answered),
        "examples": examples(answered, lambda key: source.read(numbers[key]).images),
    }


def run(checkpoint: Path, data: Path, out: Path | None, how: Asking = PLAIN) -> None:
    """`mmoe evaluate CHECKPOINT --suite scenes`: print the table, write the numbers.

    Raises:
        UserError: the checkpoint or the data set is missing or broken, or the data set asks nothing.
    """
    import mmoe

    source = Source(data, name_of(data))
    result = heading("scenes", checkpoint, data, how)
    result |= answer(mmoe.load(checkpoint), source, how)
    if not result["tasks"]:
        raise UserError("no sample asks a question with choices", str(data), "give a split of the scenes data set")
    show(result, out, table(result))
