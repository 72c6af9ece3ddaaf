"""CV-Bench (arXiv 2406.16860, section 3): greedy answers, read and scored as the released evaluation does.

docs/systems/cv_bench.md says where the paper, the data set's card and the released code differ, and what is done here.
Beside the published score stands a second one, of the letters' likelihoods, which no answer's form can spoil.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from mmoe.data.batch import Illustrated, illustrate
from mmoe.data.cv_bench import LETTERS, SUFFIX, TYPES, Row, read
from mmoe.data.decoders import Decoder, build
from mmoe.data.document import BadSample
from mmoe.data.source import Encoded
from mmoe.errors import UserError
from mmoe.evaluate import greedy
from mmoe.evaluate.asked import (
    EXAMPLES,
    PLAIN,
    Asking,
    Question,
    as_seen,
    examples,
    heading,
    progress,
    show,
    summarise,
    table,
)
from mmoe.evaluate.scenes import Model, documents, measure
from mmoe.evaluate.statistics import wilson_interval

KEYWORDS = ("answer is", "answer is:", "answer:")
"""What an answer is looked for after, in the released order."""
STRIPPED = {"2D": ".", "3D": ".:,"}
"""Letters that the released scripts take off an answer's end; that of Omni3D takes more."""
MAX_TOKENS = 32
"""Of an answer. The release allows 512; a trained model's letter ends long before either."""
ROWS = 32
"""Questions that are answered at once."""


@dataclass(eq=False, kw_only=True)
class Asked(Question):
    """A row and, once it is answered, what the model said."""

    row: Row
    said: str = ""
    whole: bool = True
    letters: Question

    @property
    def place(self) -> int | None:
        """Which choice the model's words are, None where they are none."""
        read = extract(self.said, self.row.type)
        truth = self.row.answer
        if read == LETTERS[truth].lower() or (self.row.type == "3D" and read == self.row.choices[truth]):
            return truth
        found = LETTERS.lower().find(read) if read else -1
        return found if 0 <= found < len(self.choices) else None

    @property
    def given(self) -> str:
        """The choice; ``""`` where the words are none."""
        return "" if self.place is None else self.choices[self.place]

    @property
    def shown(self) -> str:
        return self.given if self.place is not None else f"“{self.said}”"


def extract(said: str, kind: str) -> str:
    """The letter that an answer gives, as the released scripts read it: the first one of what stands after the last
    keyword, or of the whole; ``""`` for nothing. Any first letter is taken for one, that of a word too.

    Args:
        said: the model's words.
        kind: ``"2D"`` (ADE20K, COCO) or ``"3D"`` (Omni3D).
    """
    text = said.lower().strip()
    for keyword in KEYWORDS:
        text = text.rpartition(keyword)[2]
    return text.strip().rstrip(STRIPPED[kind]).lstrip("(").rstrip(")")[:1]


def _asked(row: Row) -> Asked:
    letters = [f" ({letter})" for letter in LETTERS[: len(row.choices)]]
    prompt = f"{row.prompt}\n{SUFFIX}"
    # Options with one text stay apart.
    texts = [
        text if row.choices.count(text) == 1 else f"({letter}) {text}"
        for text, letter in zip(row.choices, LETTERS, strict=False)
    ]
    return Asked(
        key=row.key,
        task=row.task,
        prompt=row.prompt,
        answer=texts[row.answer],
        choices=texts,
        row=row,
        letters=Question(row.key, row.task, prompt, letters[row.answer], letters),
    )


def _sample(asked: Asked, how: Asking) -> Encoded:
    return as_seen(Encoded(record={"prefix": [{"image": 0}]}, images=(asked.row.image,)), how)


def _open(asked: Asked, sample: Encoded, model: Model) -> Illustrated:
    """The document up to where the answer begins.

    Raises:
        BadSample: it leaves the model no positions for an answer.
    """
    branch = {"prompt": asked.letters.prompt, "answer": ""}
    made = illustrate(
        Encoded(record=sample.record | {"branches": [branch]}, images=sample.images),
        model.tokenizer,
        model.image_tokens,
        asked.key,
    )
    whole = made.document
    # All but the <eos> of the empty answer.
    fields = ("tokens", "labels", "loss_mask", "position", "branch")
    document = replace(whole, **{name: getattr(whole, name)[:-1] for name in fields}).without_loss()
    limit = model.recipe.model.backbone.max_position
    if len(document) + MAX_TOKENS > limit:
        raise BadSample(f"{len(document)} tokens and {MAX_TOKENS} of an answer are more than the {limit} positions")
    return replace(made, document=document)


def _answer_some(some: Sequence[Asked], model: Model, decoder: Decoder, how: Asking) -> Iterator[Asked | str]:
    """Each question once it is answered and its letters scored, or why it is not."""
    opened: list[tuple[Asked, Illustrated]] = []
    for asked in some:
        try:
            opened.append((asked, _open(asked, _sample(asked, how), model)))
        except BadSample as error:
            yield f"{asked.key}: {error}"
    if not opened:
        return
    blank = how.images == "blank"
    prompts = [document for _, document in opened]
    answered: list[Asked] = []
    said = greedy.answers(model, prompts, decoder, max_tokens=MAX_TOKENS, blank=blank)
    for (asked, _), words in zip(opened, said, strict=True):
        if words.problem:
            yield f"{asked.key}: {words.problem}"
        else:
            asked.said, asked.whole = words.text, words.whole
            answered.append(asked)
    made = [part for asked in answered for part in documents(_sample(asked, how), [asked.letters], model, asked.key)]
    length = max([model.recipe.data.sequence_length, *(len(document.document) for document, _ in made)])
    measure(model, made, sequence_length=length, blank=blank)
    yield from answered


def answer(model: Model, folder: Path, how: Asking = PLAIN) -> dict[str, Any]:
    """Ask every question of a folder in CV-Bench's layout and count.

    Args:
        model: see :class:`Model`.
        folder: see :mod:`mmoe.data.cv_bench`.
        how: see :class:`Asking`.

    Returns:
        ``samples``, ``skipped`` (bad rows, named with the reason; they count nowhere else), what :func:`score` gives,
        ``tasks`` (:func:`summarise`, and ``unparsed``: answers that were no option, and count as wrong), ``unfinished``
        (answers cut at :data:`MAX_TOKENS`), ``likelihood`` (:func:`score` of the likeliest letters) and ``examples``.

    Raises:
        UserError: see :func:`mmoe.data.cv_bench.read`.
    """
    count, rows = read(folder, how.limit)
    if how.images != "none" and not model.image_tokens:
        raise UserError("this model takes no pictures", "", "add --no-images")
    decoder = build(model.recipe.data, model.image_sizes)
    skipped: list[str] = []
    answered: list[Asked] = []
    kept: dict[str, bytes] = {}
    shown: Counter[str] = Counter()
    for _ in progress(range(0, count, ROWS)):
        some: list[Asked] = []
        for key, row in islice(rows, ROWS):
            if isinstance(row, BadSample):
                skipped.append(f"{key}: {row}")
            else:
                some.append(_asked(row))
        for done in _answer_some(some, model, decoder, how):
            if isinstance(done, str):
                skipped.append(done)
                continue
            if shown[done.task] < EXAMPLES:
                shown[done.task] += 1
                kept[done.key] = done.row.image
            # A benchmark's pictures are hundreds of megabytes; what is counted needs none.
            done.row = replace(done.row, image=b"")
            answered.append(done)
    tasks = summarise(answered)
    for task, numbers in tasks.items():
        numbers["unparsed"] = sum(asked.place is None for asked in answered if asked.task == task)
    likeliest = [asked.letters.given == asked.letters.answer for asked in answered]
    return {
        "samples": count,
        "skipped": skipped,
        **score([asked.row for asked in answered], [asked.given == asked.answer for asked in answered]),
        "tasks": tasks,
        "unfinished": sum(not asked.whole for asked in answered),
        "likelihood": score([asked.row for asked in answered], likeliest),
        "examples": examples(answered, lambda key: [kept[key]] if key in kept else []),
    }


def score(rows: Sequence[Row], right: Sequence[bool]) -> dict[str, Any]:
    """CV-Bench's accuracy: the mean of 2D and 3D, each the mean of its sources.

    With the published files that is ½ ((accuracy of ADE20K + accuracy of COCO) / 2 + accuracy of Omni3D), the formula
    of the data set's card.

    Returns:
        ``score``, ``score_2d``, ``score_3d`` (None where nothing of it was asked), ``sources`` (of each its type,
        ``n``, ``correct``, ``accuracy`` and the 95% interval from ``low`` to ``high``), and ``micro_average``: the
        share of all questions, which some harnesses report and which is another number.
    """
    sources: dict[str, dict[str, Any]] = {}
    halves: dict[str, float | None] = {}
    for kind in TYPES:
        names = sorted({row.source for row in rows if row.type == kind})
        shares = []
        for name in names:
            mine = [ok for row, ok in zip(rows, right, strict=True) if (row.type, row.source) == (kind, name)]
            low, high = wilson_interval(sum(mine), len(mine))
            shares.append(sum(mine) / len(mine))
            numbers = {"n": len(mine), "correct": sum(mine), "accuracy": shares[-1], "low": low, "high": high}
            # One source may have tasks of both types.
            sources[name if name not in sources else f"{name} ({kind})"] = {"type": kind} | numbers
        halves[kind] = sum(shares) / len(shares) if shares else None
    flat, deep = halves["2D"], halves["3D"]
    return {
        "score": None if flat is None or deep is None else (flat + deep) / 2,
        "score_2d": flat,
        "score_3d": deep,
        "sources": sources,
        "micro_average": sum(right) / len(right) if right else None,
    }


def _line(result: dict[str, Any]) -> str:
    named = {"score": result["score"], "2D": result["score_2d"], "3D": result["score_3d"]}
    named |= {name: numbers["accuracy"] for name, numbers in result["sources"].items()}
    named |= {"micro-average": result["micro_average"]}
    return " · ".join(f"{name} {'–' if value is None else f'{value:.1%}'}" for name, value in named.items())


def run(checkpoint: Path, data: Path, out: Path | None, how: Asking = PLAIN) -> None:
    """`mmoe evaluate CHECKPOINT --suite cv_bench`: print the table and the score, write the numbers.

    Raises:
        UserError: the checkpoint or the files are missing or broken, or no row can be asked.
    """
    import mmoe

    result = heading("cv_bench", checkpoint, data, how)
    result |= answer(mmoe.load(checkpoint), data, how)
    if not result["tasks"]:
        what = f"no row can be asked, the first: {result['skipped'][0]}" if result["skipped"] else "there is no row"
        raise UserError(what, str(data), "give CV-Bench's files, or make some with `mmoe data prepare cv_bench`")
    show(result, out, table(result))
    print(f"as published: {_line(result)}")
    print(f"likeliest letter: {_line(result['likelihood'])}")
    unparsed = {task: row["unparsed"] for task, row in result["tasks"].items() if row["unparsed"]}
    if unparsed:
        print(f"wrong because no option: {', '.join(f'{number} of {task}' for task, number in unparsed.items())}")
    if result["unfinished"]:
        print(f"{result['unfinished']} answers had not ended after {MAX_TOKENS} tokens")
