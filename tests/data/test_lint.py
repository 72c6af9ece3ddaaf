"""Lint: a good data set has no findings, and every kind of damage is found and named."""

import hashlib
import io
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmoe.data import stats
from mmoe.data.document import BadSample
from mmoe.data.index import read_arrays, read_index
from mmoe.data.lint import lint
from mmoe.data.shards import (
    DatasetWriter,
    Description,
    Sample,
    shard_name,
    token_counter,
    write_shard,
)
from mmoe.data.stats import report
from mmoe.data.tokenizer import read_tokenizer, tokenizer_hash, train_tokenizer
from mmoe.errors import UserError

CHOICES = [" left", " right"]


def picture() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(file, "PNG")
    return file.getvalue()


def samples(count: int) -> list[Sample]:
    made = []
    for number in range(count):
        branches = [
            {"task": "n", "prompt": "how many ?", "answer": f" {number % 4}", "choices": [" 0", " 1", " 2", " 3"]},
            {"task": "side", "prompt": "left or right ?", "answer": CHOICES[number % 2], "choices": CHOICES},
        ]
        record = {"source": "a", "license": "b", "category": "c", "prefix": [{"image": 0}], "branches": branches}
        made.append(Sample(f"s-{number}", record, [("png", picture())]))
    return made


Change = Callable[[list[Sample]], Any]


def write(root: Path, change: Change = lambda made: None, count: int = 40) -> Path:
    """A data set of ``count`` samples after ``change``."""
    root.mkdir(exist_ok=True)
    tokenizer = root / "tokenizer.json"
    train_tokenizer(["how many left or right ?"], 300).save(str(tokenizer))
    made = samples(count)
    change(made)
    description = Description(
        name="a/train",
        source="a",
        license="b",
        samples=len(made),
        samples_per_shard=25,
        tokenizer=tokenizer_hash(tokenizer),
        recipe={},
    )
    writer = DatasetWriter(root / "a" / "train", description)
    writer.open()
    for number, shard in enumerate(description.shards):
        counter = token_counter(read_tokenizer(tokenizer))
        write_shard(writer.folder / shard_name(number), (made[i] for i in shard), counter)
    writer.finish()
    return writer.out


def test_a_good_set_has_no_findings(tmp_path: Path) -> None:
    assert lint(write(tmp_path)) == []


def branch(made: list[Sample], number: int = 0) -> dict[str, Any]:
    return made[3].record["branches"][number]


BAD_RECORDS: dict[str, tuple[Change, str]] = {
    "no licence": (lambda made: made[3].record.pop("license"), "'license' must be a str"),
    "no category": (lambda made: made[3].record.update(category=3), "'category' must be a str"),
    "text and image": (lambda made: made[3].record["prefix"][0].update(text="x"), "either an image or a text"),
    "image not shown": (lambda made: made[3].record["prefix"].clear(), "show its 1 images each once and in order"),
    "image twice": (lambda made: made[3].record["prefix"].append({"image": 0}), "each once and in order"),
    "no answer": (
        lambda made: branch(made).pop("choices") and branch(made).update(answer=""),
        "empty prompt or answer",
    ),
    "other answer": (lambda made: branch(made).update(answer=" 7"), "' 7' is not one of the choices"),
    "contradiction": (lambda made: branch(made).update(prompt="left or right ?"), "asked twice with two answers"),
    "given away": (lambda made: branch(made).update(prompt="is it 3 ?"), "names its answer and no other choice"),
    "corrupt image": (
        lambda made: made[3].images.__setitem__(0, ("png", b"x")),
        "image 0: not an image of",
    ),
}


@pytest.mark.parametrize("name", BAD_RECORDS)
def test_a_bad_record_is_named(tmp_path: Path, name: str) -> None:
    change, message = BAD_RECORDS[name]
    (problem,) = lint(write(tmp_path, change))
    assert problem.where == "s-3"
    assert message in problem.what


def test_a_huge_image_is_found_from_its_header(tmp_path: Path) -> None:
    content = bytearray(picture())
    content[16:24] = (60_000).to_bytes(4, "big") * 2
    # The header's checksum is made good again: the file is well formed and announces 60000².
    content[29:33] = zlib.crc32(bytes(content[12:29])).to_bytes(4, "big")
    (problem,) = lint(write(tmp_path, lambda made: made[3].images.__setitem__(0, ("png", bytes(content)))))
    assert problem.where == "s-3"
    assert "image 0" in problem.what


def test_a_favoured_answer_and_a_favoured_option_are_found(tmp_path: Path) -> None:
    def favour(made: list[Sample]) -> None:
        for one in made:
            one.record["branches"][0]["answer"] = " 2"
            one.record["branches"][1]["prompt"] = f"is it{one.record['branches'][1]['answer']} or"
            other = CHOICES[1 - CHOICES.index(one.record["branches"][1]["answer"])]
            one.record["branches"][1]["prompt"] += f"{other} ?"

    found = {problem.where: problem.what for problem in lint(write(tmp_path, favour, count=400))}
    assert found == {
        "n": "one of 4 answers is right in 100% of 400 questions",
        "side": "the option named first is right in 100% of 400 questions",
    }


def test_damaged_files_are_found(tmp_path: Path) -> None:
    path = write(tmp_path)
    shard = path / shard_name(1)
    content = bytearray(shard.read_bytes())
    content[700] ^= 1
    shard.write_bytes(content)
    assert [problem.what for problem in lint(path)] == ["altered: another SHA-256 than the card's"]
    shard.write_bytes(content[:1000])
    assert "1000 bytes, expected" in lint(path)[0].what
    shard.unlink()
    assert [str(problem) for problem in lint(path)] == [f"{shard}: missing"]


def change_index(path: Path, **arrays: np.ndarray) -> None:
    np.savez(path / "index.npz", **(read_arrays(path) | arrays))


def test_an_index_that_does_not_fit_is_found(tmp_path: Path) -> None:
    path = write(tmp_path)
    good = read_arrays(path)
    change_index(path, json_offset=good["json_offset"] + 512)
    assert "the index has s-0.json at 1024" in lint(path)[0].what
    change_index(path, **(good | {"branch_tokens": good["branch_tokens"] + 1}))
    assert len(lint(path)) == 40
    assert "token counts (0, " in lint(path)[0].what
    change_index(path, **(good | {"image_start": good["image_start"][:-1]}))
    assert "image_start does not share out 40 images among 40 samples" in lint(path)[0].what
    change_index(path, **(good | {"shard": good["shard"].astype(np.int64)}))
    assert lint(path)[0].what == "shard is int64, expected int32"
    change_index(path, **(good | {"key": np.array([b"s-0"] * 40)}))
    assert [str(problem) for problem in lint(path)] == ["s-0: the key occurs twice"]


def test_a_record_that_is_not_utf8_is_found(tmp_path: Path) -> None:
    path = write(tmp_path)
    shard = path / shard_name(0)
    index = read_arrays(path)
    content = bytearray(shard.read_bytes())
    content[int(index["json_offset"][2]) + 12] = 0xFF
    shard.write_bytes(content)
    card = (path / "dataset.toml").read_text()
    digest = hashlib.sha256(content).hexdigest()
    lines = [line for line in card.splitlines() if line.startswith("sha256")]
    (path / "dataset.toml").write_text(card.replace(lines[0], f'sha256 = "{digest}"'))
    (problem,) = lint(path)
    assert problem.where == "s-2"
    assert "not UTF-8" in problem.what


def test_no_data_set_is_the_users_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no data set here"):
        lint(tmp_path)


def test_the_report_shows_every_task_and_escapes_its_texts(tmp_path: Path) -> None:
    path = write(tmp_path, lambda made: made[0].record["prefix"].append({"text": "<script>$x^2$ 図"}))
    page = tmp_path / "pages" / "report.html"
    report(path, page)
    text = page.read_text(encoding="utf-8")
    assert "&lt;script&gt;$x^2$ 図" in text
    assert "<script>" not in text
    assert "<th>samples<td>40" in text
    assert "s-0" in text
    assert "http" not in text


def test_the_report_passes_over_what_training_passes_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path)
    read = stats.read_sample

    def reading(path: Path, index: dict[str, np.ndarray], number: int) -> Sample:
        sample = read(path, index, number)
        if number == 0:
            raise BadSample("its bytes are gone")
        if number == 1:
            del sample.record["category"]
        if number == 2:
            sample.record["branches"] = 3
        return sample

    monkeypatch.setattr(stats, "read_sample", reading)
    report(path, tmp_path / "report.html")
    assert "<th>bad samples, not counted below<td>3" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_the_report_has_room_for_any_tasks(tmp_path: Path) -> None:
    answers = {f"$\\frac{{{i}": Counter({"$x^{": 1 + i}) for i in range(500)} | {"\ud800": Counter({"\ud800": 999})}
    index = read_index(write(tmp_path))
    figure = stats._histograms(index, Counter({"$y^{": 1}), answers)
    assert len(figure.axes) == 3 + stats.TASKS
    assert stats._picture(figure)
