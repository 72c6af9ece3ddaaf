"""CV-Bench: answers read as the released scripts read them, the published formula, and what becomes of bad rows."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from fakes import IMAGE_SIZE, FakeModel, png
from torch import Tensor

import mmoe
from mmoe.data import cv_bench as layout
from mmoe.data.cv_bench import SUFFIX, Row
from mmoe.errors import UserError
from mmoe.evaluate import cv_bench
from mmoe.evaluate.asked import Asking
from mmoe.evaluate.cv_bench import answer, extract, score
from mmoe.recipe.tokens import OURS


@pytest.mark.parametrize(
    ("said", "letter"),
    # What coco_test.py of the release gives, and omni_test.py where it differs.
    [
        ("(A)", "a"),
        (" b", "b"),
        ("(C) three", "c"),
        ("D.", "d"),
        ("(A).", "a"),
        ("The answer is (B).", "b"),
        ("Answer: C", "c"),
        ("The answer is A. No, the answer is B", "b"),
        ("bottle", "b"),  # a word's first letter
        ("The answer is: (B)", ":"),  # the shorter keyword is found first, and its colon stays
        ("3", "3"),
        ("", ""),
        ("()", ""),
    ],
)
def test_answers_are_read_as_the_release_reads_them(said: str, letter: str) -> None:
    assert extract(said, "2D") == extract(said, "3D") == letter


def test_what_only_one_of_the_released_scripts_takes_off() -> None:
    assert [extract(":", kind) for kind in ("2D", "3D")] == [":", ""]
    assert [extract("B),", kind) for kind in ("2D", "3D")] == ["b", "b"]


def row(number: int, kind: str, source: str, **changes: Any) -> dict[str, Any]:
    """A record with the published columns and values of the published types."""
    choices = ["3", "2", "1", "0"] if kind == "2D" else ["table", "sofa"]
    question = "How many organs are in the image?" if kind == "2D" else "Which object is closer, the table or the sofa?"
    options = "".join(f"\n({letter}) {choice}" for letter, choice in zip("ABCD", choices, strict=False))
    return {
        "idx": number,
        "type": kind,
        "task": "Count" if kind == "2D" else "Depth",
        "image": {"bytes": png((10 * number, 90, 30)), "path": f"{number}.png"},
        "question": question,
        "choices": choices,
        "answer": "(B)",
        "prompt": f"{question} Select from the following choices.{options}",
        "filename": f"img/{kind}/{number}.png",
        "source": source,
        "source_dataset": f"{source} Validation Set",
        "source_filename": f"{number}.jpg",
        "target_class": "organ" if source == "COCO" else None,
        "target_size": 1732 if source == "COCO" else None,
        "bbox": None if kind == "2D" else [1.0, 2.0, 3.0, 4.0],
        **changes,
    }


ROWS = [row(i, "2D", "ADE20K") for i in range(4)] + [row(4, "2D", "COCO"), row(5, "2D", "COCO")]
ROWS += [row(i, "3D", "Omni3D") for i in range(6, 10)]


def write(folder: Path, rows: list[dict[str, Any]]) -> Path:
    folder.mkdir(exist_ok=True)
    for kind, name in (("2D", "test_2d"), ("3D", "test_3d")):
        if any(r["type"] == kind for r in rows):
            pq.write_table(pa.Table.from_pylist([r for r in rows if r["type"] == kind]), folder / f"{name}.parquet")
    return folder


class Speaking(FakeModel):
    """Says a text for each picture, told by its red; `heard` are the pictures' reds, None without one."""

    def __init__(self, says: list[str]) -> None:
        super().__init__()
        encode = self.tokenizer.encode
        self.says = [[*encode(text), OURS.eos] for text in says]
        self.marker = encode(SUFFIX[-6:])
        self.heard: list[int | None] = []

    def after(self, context: list[int], brightness: float) -> Tensor:
        number = round((brightness * 3 - sum((x / 255 - 0.5) * 4 for x in (90, 30)) + 2) * 255 / 40)
        logits = torch.zeros(self.tokenizer.size)
        size = len(self.marker)
        # An answer of some tokens behind it, at most.
        starts = range(max(0, len(context) - size - 20), len(context) - size + 1)
        ends = [i + size for i in starts if context[i : i + size] == self.marker]
        if ends:
            self.heard += [number if 3 in context else None] if ends == [len(context)] else []
            said = self.says[number % len(self.says)]
            logits[said[min(len(context) - ends[0], len(said) - 1)]] = 9.0
        return logits


def test_the_published_formula_by_hand(tmp_path: Path) -> None:
    #       ADE20K: 3 of 4                        COCO: 1 of 2   Omni3D: 1 of 4
    says = ["(B)", "The answer is B", "b.", "(A)", "(B)", "two", "(A)", "(B)", "zebra", "(C)"]
    result = answer(Speaking(says), write(tmp_path, ROWS))
    assert result["skipped"] == []
    accuracies = {name: numbers["accuracy"] for name, numbers in result["sources"].items()}
    assert accuracies == {"ADE20K": 0.75, "COCO": 0.5, "Omni3D": 0.25}
    assert (result["score_2d"], result["score_3d"]) == (0.625, 0.25)
    assert result["score"] == 0.4375
    assert result["micro_average"] == 0.5
    count, depth = result["tasks"]["Count"], result["tasks"]["Depth"]
    assert (count["n"], count["correct"], count["unparsed"], count["chance"]) == (6, 4, 1, 0.25)
    # A letter that the row does not offer is no option either.
    assert (depth["n"], depth["correct"], depth["unparsed"], depth["chance"]) == (4, 1, 2, 0.5)
    assert (depth["majority"], depth["majority_answer"]) == (1.0, "'sofa'")
    assert result["unfinished"] == 0
    shown = {example["sample"]: example["answer"] for example in result["examples"]}
    assert shown["test_2d/0"] == "2"
    assert shown["test_3d/2"] == "“zebra”"


def test_answers_are_the_greedy_ones_and_letters_score_their_likelihood(tmp_path: Path) -> None:
    """Against the model's own next token, one after another."""
    model = FakeModel()
    rows = [row(0, "2D", "COCO"), row(1, "2D", "COCO", prompt="How many ? (A) 3"), row(2, "3D", "Omni3D")]
    asked = [cv_bench._asked(found) for _, found in layout.read(write(tmp_path, rows))[1]]
    done = list(cv_bench._answer_some(asked, model, cv_bench.build(model.recipe.data, model.image_sizes), Asking()))
    assert done == asked
    encode = model.tokenizer.encode
    for number, one in enumerate(asked):
        brightness = sum((x / 255 - 0.5) * 4 for x in (10 * number, 90, 30)) / 3
        start = [1, *[3] * model.image_tokens, *encode(f"{rows[number]['prompt']}\n{SUFFIX}")]
        context = list(start)
        while len(context) < len(start) + cv_bench.MAX_TOKENS:
            token = int(model.after(context, brightness).argmax())
            if token == OURS.eos:
                break
            context.append(token)
        assert one.said == model.tokenizer.decode(context[len(start) :]).strip()
        for place, letter in enumerate(one.letters.choices):
            context, total = list(start), 0.0
            for token in encode(letter):
                total += float(model.after(context, brightness).log_softmax(-1)[token])
                context.append(token)
            assert one.letters.scores[place] == pytest.approx(total, abs=1e-4)


def test_options_text_counts_in_3d_alone_and_only_where_it_is_one_letter(tmp_path: Path) -> None:
    choices = {"choices": ["5", "7"]}
    rows = [row(0, "2D", "COCO", **choices), row(1, "3D", "Omni3D", **choices), row(2, "3D", "Omni3D")]
    result = answer(Speaking(["7", "7", "sofa"]), write(tmp_path, rows))
    assert {name: numbers["correct"] for name, numbers in result["sources"].items()} == {"COCO": 0, "Omni3D": 1}


def test_jsonl_beside_pictures_says_the_same(tmp_path: Path) -> None:
    says = ["(B)", "(A)", "b"]
    expected = answer(Speaking(says), write(tmp_path / "parquet", ROWS))
    folder = tmp_path / "lines"
    for kind, name in (("2D", "test_2d"), ("3D", "test_3d")):
        lines = []
        for record in (r for r in ROWS if r["type"] == kind):
            picture = folder / record["filename"]
            picture.parent.mkdir(parents=True, exist_ok=True)
            picture.write_bytes(record["image"]["bytes"])
            lines.append(json.dumps({key: value for key, value in record.items() if key != "image"}))
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    assert answer(Speaking(says), folder) == expected


BAD = {
    "no picture can be made of it": ({"image": {"bytes": b"nothing", "path": "x"}}, "not an image"),
    "no picture": ({"image": None}, "it has no picture"),
    "a picture's name alone": ({"image": {"bytes": None, "path": "/etc/passwd"}}, "it has no picture"),
    "no such letter": ({"answer": "(E)"}, "its answer '(E)' is none of its 4 choices"),
    "the text": ({"answer": "2"}, "its answer '2' is none of its 4 choices"),
    "no answer": ({"answer": None}, "its answer is None, no text"),
    "no choices": ({"choices": None}, "its choices are no list of texts"),
    "another type": ({"task": ""}, "its task is '', no text"),
    "too long": ({"prompt": "daffodils " * 90}, "are more than the 512 positions"),
}


def test_bad_rows_are_named_and_the_others_scored(tmp_path: Path) -> None:
    rows = [row(9 + number, "2D", "COCO", **changes) for number, (changes, _) in enumerate(BAD.values())]
    result = answer(Speaking(["(B)"]), write(tmp_path, [row(0, "2D", "COCO"), *rows, row(1, "2D", "ADE20K")]))
    assert result["samples"] == len(BAD) + 2
    reasons = dict(reason.split(": ", 1) for reason in result["skipped"])
    assert sorted(reasons) == sorted(f"test_2d/{number}" for number in range(1, len(BAD) + 1))
    for number, (_, what) in enumerate(BAD.values(), 1):
        assert what in reasons[f"test_2d/{number}"]
    assert result["tasks"]["Count"]["n"] == result["tasks"]["Count"]["correct"] == 2
    # Half of the formula has no rows: there is no score, rather than another one.
    assert (result["score"], result["score_2d"], result["score_3d"]) == (None, 1.0, None)


def test_a_name_that_leads_out_of_the_folder_is_a_bad_row(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "secret.png").write_bytes(png((0, 0, 0)))
    names = ["../secret.png", str(tmp_path / "secret.png"), "none.png", 3]
    records = [{**row(i, "2D", "COCO"), "image": None, "filename": name} for i, name in enumerate(names)]
    (tmp_path / "data" / "test_2d.jsonl").write_text("\n".join(map(json.dumps, records)))
    reasons = [str(found) for _, found in layout.read(tmp_path / "data")[1]]
    assert ["no path within the folder" in reason for reason in reasons] == [True, True, False, True]
    assert "cannot be read" in reasons[2]


@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        (lambda folder: (folder / "test_2d.parquet").write_bytes(b"PAR1 and nothing"), "no parquet file that can be"),
        (lambda folder: [path.unlink() for path in folder.iterdir()], "neither test_2d.parquet nor test_3d.parquet"),
        (lambda folder: pq.write_table(pa.table({"idx": [1]}), folder / "test_3d.parquet"), "no column 'type'"),
        (
            lambda folder: [
                path.unlink() if path.stem == "test_3d" else path.rename(path.with_suffix(".jsonl"))
                for path in list(folder.iterdir())
            ],
            "cannot be read: it is not UTF-8",
        ),
    ],
)
def test_broken_files_are_user_errors(tmp_path: Path, spoil: Any, what: str) -> None:
    spoil(write(tmp_path, ROWS))
    with pytest.raises(UserError, match=what):
        answer(Speaking(["(B)"]), tmp_path)


def test_without_pyarrow_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match=r"pip install 'mmoe\[cv-bench\]'"):
        answer(Speaking(["(B)"]), write(tmp_path, ROWS))


def test_what_the_model_sees(tmp_path: Path) -> None:
    folder = write(tmp_path, ROWS)
    seen, blank, none = (Speaking(["(B)"]) for _ in range(3))
    answer(seen, folder)
    answer(blank, folder, Asking(images="blank"))
    result = answer(none, folder, Asking(images="none"))
    # Each prompt is heard twice: for the words and for the letters.
    assert set(seen.heard) == set(range(10))
    assert all(not torch.count_nonzero(images) for images in blank.images)
    assert sum(len(images) for images in blank.images) > 10
    assert set(none.heard) == {None}
    assert sum(images.numel() for images in none.images) == 0
    assert result["tasks"]["Count"]["n"] == 6
    assert none.images[0].shape == (0, 3, IMAGE_SIZE, IMAGE_SIZE)


def test_a_limit_spreads_over_both_files(tmp_path: Path) -> None:
    result = answer(Speaking(["(B)"]), write(tmp_path, ROWS), Asking(limit=5))
    assert result["samples"] == 5
    assert {name: numbers["n"] for name, numbers in result["sources"].items()} == {"ADE20K": 2, "COCO": 1, "Omni3D": 2}


def test_sources_of_one_name_and_two_types_stay_apart() -> None:
    made = [
        Row(key="", type=kind, task="t", source="s", prompt="", choices=("a",), answer=0, image=b"")
        for kind in ("2D", "3D", "3D")
    ]
    result = score(made, [True, True, False])
    assert {name: numbers["n"] for name, numbers in result["sources"].items()} == {"s": 1, "s (3D)": 2}
    assert (result["score"], result["micro_average"]) == (0.75, 2 / 3)


def test_run_writes_every_number_and_prints_the_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(vars(mmoe), "load", lambda path: Speaking(["(B)", "zebra"]))
    cv_bench.run(tmp_path / "step", write(tmp_path / "data", ROWS), tmp_path / "out.json", Asking(images="none"))
    written = json.loads((tmp_path / "out.json").read_text())
    assert list(written) == [
        *("suite", "checkpoint", "data", "blank", "images", "samples", "skipped", "score", "score_2d", "score_3d"),
        *("sources", "micro_average", "tasks", "unfinished", "likelihood", "examples"),
    ]
    assert (written["suite"], written["images"], written["blank"]) == ("cv_bench", "none", False)
    printed = capsys.readouterr().out
    assert ", no images: 10 samples" in printed
    assert "as published: score " in printed
    assert "likeliest letter: score " in printed


def test_files_of_which_nothing_can_be_asked_are_a_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(vars(mmoe), "load", lambda path: Speaking(["(B)"]))
    with pytest.raises(UserError, match=r"no row can be asked, the first: test_2d/0: its answer is None"):
        cv_bench.run(tmp_path, write(tmp_path / "data", [row(0, "2D", "COCO", answer=None)]), None)
