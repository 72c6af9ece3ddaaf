"""Check a prepared data set: files against the card, index against tars, records, images, leaks and balance."""

import hashlib
import os
import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmoe import reading
from mmoe.data.document import BadSample
from mmoe.data.index import problems, read_arrays, read_sample
from mmoe.data.pixels import BadImage, open_image
from mmoe.data.shards import INDEX, Sample, read_card, shard_name, text_tokens, token_counter
from mmoe.data.tokenizer import read_tokenizer, tokenizer_hash


@dataclass(frozen=True)
class Problem:
    """Something wrong in a data set: where (a file or a sample's key) and what."""

    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


def lint(path: Path) -> list[Problem]:
    """Check a data set from end to end.

    Args:
        path: its folder. Token counts are checked where its tokenizer lies in a folder above.

    Returns:
        Every problem found; an empty list if there is none.

    Raises:
        UserError: there is no data set, or its index is unreadable.
    """
    card, index = read_card(path), read_arrays(path)
    findings = [*_files(path, card), *_index(card, index)]
    if findings:
        return findings  # what the index says of a sample's place cannot be trusted
    findings += _members(path, index)
    if findings:
        return findings
    tokenizer = _find_tokenizer(path, str(index["tokenizer"]))
    count = token_counter(read_tokenizer(tokenizer)) if tokenizer else None
    answers: dict[tuple[str, int], Counter[int]] = defaultdict(Counter)
    orders: dict[tuple[str, int], Counter[int]] = defaultdict(Counter)
    for number in range(len(index["key"])):
        key = index["key"][number].decode()
        try:
            sample = read_sample(path, index, number)
        except BadSample as error:
            findings.append(Problem(key, str(error)))
            continue
        found = [Problem(key, what) for what in _record(sample)]
        found += [Problem(key, what) for what in _images(sample)]
        findings += found
        if found:
            continue
        wanted = (int(index["prefix_tokens"][number]), int(index["branch_tokens"][number]))
        try:
            counted = text_tokens(sample.record, count) if count else wanted
        except (UnicodeError, TypeError):  # half of a surrogate pair, which JSON lets through
            findings.append(Problem(key, "a text is no Unicode"))
            continue
        except ValueError as error:
            findings.append(Problem(key, f"a text: {error}"))
            continue
        if counted != wanted:
            findings.append(Problem(key, f"token counts {wanted}, found {counted}"))
        for branch in sample.record["branches"]:
            if "choices" in branch:
                place = branch["choices"].index(branch["answer"])
                answers[branch["task"], len(branch["choices"])][place] += 1
                named = _named(branch)
                if len(named) > 1 and branch["answer"] in named:
                    orders[branch["task"], len(named)][named.index(branch["answer"])] += 1
    return findings + list(_balance(answers, orders))


def _files(path: Path, card: dict[str, Any]) -> Iterator[Problem]:
    """Shards that are missing or are not the card's."""
    for number, shard in enumerate(card.get("shard", [])):
        file = path / shard_name(number)
        if shard["file"] != file.name:
            yield Problem(str(file), f"the card calls it {shard['file']}")
        elif not file.is_file():
            yield Problem(str(file), "missing")
        elif file.stat().st_size != shard["bytes"]:
            yield Problem(str(file), f"{file.stat().st_size} bytes, expected {shard['bytes']}")
        else:
            with file.open("rb") as content:
                if hashlib.file_digest(content, "sha256").hexdigest() != shard["sha256"]:
                    yield Problem(str(file), "altered: another SHA-256 than the card's")


def _index(card: dict[str, Any], index: dict[str, np.ndarray]) -> Iterator[Problem]:
    """What does not fit in the index, and keys that occur twice."""
    found = [Problem(INDEX, what) for what in problems(card, index)]
    yield from found
    for key, times in Counter([] if found else index["key"].tolist()).items():
        if times > 1:
            yield Problem(key.decode(), "the key occurs twice")


def _walk(path: Path) -> list[tuple[str, int, int]]:
    """Name, offset and bytes of every member of a tar; tarfile itself would follow its compression and its links.

    Raises:
        OSError, ValueError, tarfile.TarError: it is no plain tar of regular files.
    """
    found = []
    with open(reading.open_regular(path), "rb") as file:
        end = os.fstat(file.fileno()).st_size
        while (block := file.read(tarfile.BLOCKSIZE)).strip(b"\0"):
            member = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
            if member.type != tarfile.REGTYPE:
                raise ValueError(f"{member.name!r} is no regular file")
            offset = file.tell()
            if not 0 <= member.size <= end - offset:
                raise ValueError(f"{member.name!r} is truncated")
            found.append((member.name, offset, member.size))
            file.seek(offset - -member.size // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE)
    return found


def _members(path: Path, index: dict[str, np.ndarray]) -> Iterator[Problem]:
    """Members of the tars that are not where the index says, or not named as they must be."""
    for number in np.unique(index["shard"]):
        expected: list[tuple[str, int, int]] = []
        for i in np.flatnonzero(index["shard"] == number):
            key = index["key"][i].decode()
            expected.append((f"{key}.json", int(index["json_offset"][i]), int(index["json_length"][i])))
            pictures = range(int(index["image_start"][i]), int(index["image_start"][i + 1]))
            for place, j in enumerate(pictures):
                expected.append((f"{key}.{place}.", int(index["image_offset"][j]), int(index["image_length"][j])))
        file = path / shard_name(int(number))
        try:
            found = _walk(file)
        except (OSError, ValueError, tarfile.TarError) as error:
            yield Problem(str(file), f"unreadable tar: {error}")
            continue
        if len(found) != len(expected):
            yield Problem(str(file), f"{len(found)} members, the index has {len(expected)}")
        for (name, *place), (wanted, *wanted_place) in zip(found, expected, strict=False):
            if not name.startswith(wanted) or place != wanted_place:
                yield Problem(str(file), f"{name} at {place[0]}, the index has {wanted} at {wanted_place[0]}")
                break


def _record(sample: Sample) -> Iterator[str]:
    """What is wrong with a record's form, or gives an answer away."""
    record = sample.record
    if not isinstance(record, dict):
        yield "the record is no object"
        return
    for name, kind in (("source", str), ("license", str), ("category", str), ("prefix", list), ("branches", list)):
        if not isinstance(record.get(name), kind):
            yield f"{name!r} must be a {kind.__name__}"
            return
    parts = record["prefix"]
    if not all(isinstance(part, dict) and (("image" in part) != isinstance(part.get("text"), str)) for part in parts):
        yield "a part of the prefix is either an image or a text"
        return
    if [part["image"] for part in parts if "image" in part] != list(range(len(sample.images))):
        yield f"the prefix must show its {len(sample.images)} images each once and in order"
    seen: dict[str, str] = {}
    for branch in record["branches"]:
        texts = ("task", "prompt", "answer")
        if not isinstance(branch, dict) or not all(isinstance(branch.get(name), str) for name in texts):
            yield "a branch has the texts 'task', 'prompt' and 'answer'"
            return
        if not branch["prompt"] or not branch["answer"]:
            yield f"{branch['task']}: empty prompt or answer"
        if seen.setdefault(branch["prompt"], branch["answer"]) != branch["answer"]:
            yield f"{branch['prompt']!r} is asked twice with two answers"
        if "choices" in branch:
            choices = branch["choices"]
            if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
                yield f"{branch['task']}: the choices must be texts"
                return
            if choices.count(branch["answer"]) != 1:
                yield f"{branch['task']}: the answer {branch['answer']!r} is not one of the choices"
                return
            if _named(branch) == [branch["answer"]]:
                yield f"{branch['prompt']!r} names its answer and no other choice"


def _named(branch: dict[str, Any]) -> list[str]:
    """The choices that the prompt names, in its order."""
    places: dict[str, int] = {}
    for place, word in enumerate(branch["prompt"].split()):
        places.setdefault(word, place)
    return sorted((c for c in branch["choices"] if c.strip() in places), key=lambda c: places[c.strip()])


def _images(sample: Sample) -> Iterator[str]:
    """Images whose header is unreadable or announces too much; nothing is decoded."""
    for number, (_, content) in enumerate(sample.images):
        try:
            open_image(content)
        except BadImage as error:
            yield f"image {number}: {error}"


def _balance(
    answers: dict[tuple[str, int], Counter[int]], orders: dict[tuple[str, int], Counter[int]]
) -> Iterator[Problem]:
    """Tasks in which one answer, or a place in the prompt, is right more often than chance allows (5 σ, and 2%)."""
    ordered = {task for task, _ in orders}
    for (task, choices), counter in answers.items():
        # Choices that stand in the prompt are checked by their order there: their list has no meaning.
        if task not in ordered:
            share, samples = max(counter.values()) / counter.total(), counter.total()
            if share > _allowed(1 / choices, samples):
                yield Problem(task, f"one of {choices} answers is right in {share:.0%} of {samples} questions")
    for (task, named), counter in orders.items():
        (place, right), samples = counter.most_common(1)[0], counter.total()
        if right / samples > _allowed(1 / named, samples):
            which = "first" if place == 0 else "last" if place == named - 1 else f"as number {place + 1}"
            yield Problem(task, f"the option named {which} is right in {right / samples:.0%} of {samples} questions")


def _allowed(chance: float, samples: int) -> float:
    return chance + 0.02 + 5 * (chance * (1 - chance) / samples) ** 0.5


def _find_tokenizer(path: Path, digest: str) -> Path | None:
    """The data set's tokenizer.json in its folder or one above."""
    for folder in (path, *path.resolve().parents):
        file = folder / "tokenizer.json"
        if file.is_file():
            return file if tokenizer_hash(file) == digest else None
    return None
