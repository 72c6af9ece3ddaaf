"""Scores against a direct computation, the counting, and what becomes of bad samples."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import FakeModel, FakeSource, png, record
from PIL import Image

import mmoe
from mmoe.data.document import BadSample
from mmoe.data.source import Encoded
from mmoe.errors import UserError
from mmoe.evaluate import scenes
from mmoe.evaluate.asked import THUMBNAIL, Asking, Question, summarise
from mmoe.evaluate.scenes import answer, questions

COUNT = ("count", " how many zebra ?", " 1", [" 1", " 2", " 3"])
NAME = ("name", " how many ?", " zebra", [" zebra", " frog", " daffodil"])
BEGIN = ("begin", " many ?", " 12", [" 1", " 12", " 1212"])


def sample(*branches: Any, red: int = 200) -> Encoded:
    return Encoded(record=record(*branches), images=(png((red, 90, 30)),))


def asked(monkeypatch: pytest.MonkeyPatch) -> list[Question]:
    """Every question that `answer` asks, scored in place."""
    found: list[Question] = []

    def remember(sample_record: dict[str, Any], key: str) -> list[Question]:
        found.extend(made := questions(sample_record, key))
        return made

    monkeypatch.setattr(scenes, "questions", remember)
    return found


def direct(model: FakeModel, question: Question, choice: str, brightness: float, with_end: bool) -> float:
    """log p of a choice's tokens after <bos>, the image and the prompt, one token after another."""
    encode = model.tokenizer.encode
    context, total = [1, *[3] * model.image_tokens, *encode(question.prompt)], 0.0
    for token in encode(choice) + [2] * with_end:
        total += float(model.after(context, brightness).log_softmax(-1)[token])
        context.append(token)
    return total


@pytest.mark.parametrize("sequence_length", [128, 30])
def test_scores_are_the_choices_log_likelihoods(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sequence_length: int
) -> None:
    model, found = FakeModel(sequence_length), asked(monkeypatch)
    result = answer(model, FakeSource([sample(COUNT, NAME, BEGIN), sample(BEGIN, COUNT, red=20)]))
    assert len(found) == 5
    assert result["skipped"] == []
    for question in found:
        red = 200 if question.key.endswith("0") else 20
        brightness = sum((x / 255 - 0.5) * 4 for x in (red, 90, 30)) / 3
        for number, choice in enumerate(question.choices):
            expected = direct(model, question, choice, brightness, with_end=question.task == "begin")
            assert question.scores[number] == pytest.approx(expected, abs=1e-4)
        assert question.given == max(
            question.choices, key=lambda c: direct(model, question, c, brightness, question.task == "begin")
        )


def test_single_token_choices_take_one_branch_and_score_as_one_branch_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, found = FakeModel(), asked(monkeypatch)
    answer(model, FakeSource([sample(COUNT)]))
    assert model.branches == 1
    one_each = lambda question, tokenizer: [  # noqa: E731
        (text, i, tokenizer.encode(text)) for i, text in enumerate(question.choices)
    ]
    monkeypatch.setattr(scenes, "_probes", one_each)
    answer(model, FakeSource([sample(COUNT)]))
    assert model.branches == 1 + 3
    assert found[0].scores == pytest.approx(found[1].scores, abs=1e-6)


def test_branches_without_choices_are_left_out(tmp_path: Path) -> None:
    model = FakeModel()
    result = answer(model, FakeSource([sample(COUNT, ("describe", " many ?", " a zebra", None))]))
    assert list(result["tasks"]) == ["count"]


def test_bad_samples_are_named_and_the_others_scored(tmp_path: Path) -> None:
    broken = Encoded(record=record(COUNT), images=(png((1, 2, 3))[:60],))
    stranger = Encoded(record=record(("count", " how many ?", " 9", [" 1", " 2"])), images=(png((1, 2, 3)),))
    nameless = Encoded(record={"prefix": [], "branches": [{"prompt": "?", "choices": ["a"]}]}, images=())
    shapeless = Encoded(record={"branches": record(COUNT)["branches"]}, images=())
    samples = [sample(COUNT), broken, stranger, nameless, shapeless, sample(COUNT, red=9)]
    result = answer(FakeModel(), FakeSource(samples))
    assert result["samples"] == 6
    assert result["tasks"]["count"]["n"] == 2
    assert sorted(reason.partition(":")[0] for reason in result["skipped"]) == [f"fake/test/{i}" for i in (1, 2, 3, 4)]
    assert any("the answer is not among the choices" in reason for reason in result["skipped"])
    assert any("branches[0] has no 'task'" in reason for reason in result["skipped"])


def test_blank_images_are_grey_and_the_answers_no_longer_depend_on_them(tmp_path: Path) -> None:
    model = FakeModel()
    samples = [sample(COUNT, red=red) for red in range(0, 200, 10)]
    seen = answer(model, FakeSource(samples))
    assert all(bool((images != 0).any()) for images in model.images)
    model.images.clear()
    blank = answer(model, FakeSource(samples), Asking(images="blank"))
    assert all(torch.count_nonzero(images) == 0 for images in model.images)
    assert blank["tasks"]["count"]["accuracy"] in (0.0, 1.0)
    assert seen["tasks"]["count"]["accuracy"] not in (0.0, 1.0)


def test_without_images_the_prompts_stand_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, found = FakeModel(), asked(monkeypatch)
    result = answer(model, FakeSource([sample(COUNT), sample(COUNT, red=20)]), Asking(images="none"))
    assert result["tasks"]["count"]["n"] == 2
    assert not sum(images.numel() for images in model.images)
    model.image_tokens = 0
    for question in found:
        expected = [direct(model, question, choice, 0.0, with_end=False) for choice in question.choices]
        assert [question.scores[i] for i in range(3)] == pytest.approx(expected, abs=1e-4)
    assert result["examples"][0]["png"]  # shown to the reader all the same


def test_limit_takes_the_first_samples(tmp_path: Path) -> None:
    result = answer(FakeModel(), FakeSource([sample(COUNT)] * 5), Asking(limit=2))
    assert result["samples"] == result["tasks"]["count"]["n"] == 2


def scored(task: str, choices: list[str], truth: str, given: str) -> Question:
    scores = {i: 0.0 if choice == given else -1.0 for i, choice in enumerate(choices)}
    return Question("k", task, "?", truth, choices, scores)


def test_summary_of_fixed_choices() -> None:
    made = [scored("count", ["1", "2", "3", "4"], truth, "2") for truth in ("1", "2", "2", "4")]
    row = summarise(made)["count"]
    assert (row["n"], row["correct"], row["accuracy"], row["chance"]) == (4, 2, 0.5, 0.25)
    assert (row["majority"], row["majority_answer"]) == (0.5, "'2'")
    assert row["low"] < 0.5 < row["high"]


def test_summary_counts_the_place_where_choices_differ() -> None:
    pairs = [("a", "b"), ("c", "d"), ("e", "f"), ("a", "c")]
    made = [scored("which", list(pair), pair[i != 2], pair[0]) for i, pair in enumerate(pairs)]
    row = summarise(made)["which"]
    assert (row["chance"], row["majority"], row["majority_answer"]) == (0.5, 0.75, "choice 2")


def test_equal_scores_give_the_first_choice() -> None:
    assert Question("k", "t", "?", "b", ["a", "b"], {1: -1.0, 0: -1.0}).given == "a"


def test_examples_take_the_tasks_in_turn_and_each_picture_once(tmp_path: Path) -> None:
    samples = [sample(COUNT, NAME, red=red) for red in range(40)]
    shown = answer(FakeModel(), FakeSource(samples))["examples"]
    assert [example["task"] for example in shown] == ["count", "name"] * 8
    assert [example["sample"] for example in shown] == [f"fake/test/{i}" for i in range(16)]
    picture = Image.open(io.BytesIO(base64.b64decode(shown[5]["png"])))
    assert picture.getpixel((0, 0)) == (5, 90, 30)
    assert max(picture.size) <= THUMBNAIL


def test_run_writes_every_number_and_prints_every_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(vars(mmoe), "load", lambda path: FakeModel())
    monkeypatch.setattr(scenes, "Source", lambda path, name: FakeSource([sample(COUNT, NAME)]))
    scenes.run(tmp_path / "step", tmp_path / "test", tmp_path / "new" / "out.json", Asking(images="blank"))
    written = json.loads((tmp_path / "new" / "out.json").read_text())
    about = {"suite", "checkpoint", "data", "blank", "images"}
    assert set(written) == about | {"samples", "skipped", "tasks", "examples"}
    assert set(written["tasks"]) == {"count", "name"}
    assert (written["blank"], written["images"]) == (True, "blank")
    printed = capsys.readouterr().out
    assert "count" in printed
    assert "name" in printed
    assert "blank images: 1 samples" in printed


def test_a_data_set_that_asks_nothing_is_a_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(vars(mmoe), "load", lambda path: FakeModel())
    monkeypatch.setattr(scenes, "Source", lambda path, name: FakeSource([sample()]))
    with pytest.raises(UserError, match="no sample asks a question"):
        scenes.run(tmp_path, tmp_path / "test", None)


@pytest.mark.parametrize(
    "change", [{"choices": [1, 2]}, {"choices": "12"}, {"choices": {"1": 1}}, {"prompt": 3}, {"task": []}]
)
def test_a_question_of_other_things_than_texts_is_bad(change: dict[str, Any]) -> None:
    branch = {"task": "t", "prompt": "p", "answer": " 1", "choices": [" 1", " 2"], **change}
    with pytest.raises(BadSample, match="are no texts"):
        questions({"branches": [branch]}, "k")
    assert questions({"branches": 3}, "k") == []
