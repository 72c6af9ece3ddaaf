"""evaluate, convert to-hf, generate and report on a real checkpoint: a run of two steps on pictures in four colours."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import sets
import torch
import training
from fakes import png

import mmoe
from mmoe import cli
from mmoe.checkpoint.load import begin
from mmoe.data.cv_bench import SUFFIX
from mmoe.data.shards import Sample
from mmoe.data.source import Source
from mmoe.evaluate.cv_bench import MAX_TOKENS
from mmoe.evaluate.loss import measure
from mmoe.recipe import dump_recipe, load_recipe

COLOURS = {" red": (220, 20, 20), " green": (20, 200, 20), " blue": (20, 20, 220), " grey": (120, 120, 120)}
PROGRAM = "import json, sys; from mmoe import cli; sys.exit(max(cli.main(c) for c in json.loads(sys.argv[1])))"


def samples() -> list[Sample]:
    made = []
    for number in range(12):
        answer = list(COLOURS)[number % 4]
        question = {"task": "colour", "prompt": "which colour ?", "answer": answer, "choices": list(COLOURS)}
        about = {"source": "made", "license": "CC0-1.0", "category": "colour", "truth": {}}
        record = about | {"prefix": [{"image": 0}], "branches": [question]}
        made.append(Sample(f"colour-{number}", record, [("png", png(COLOURS[answer]))]))
    return made


def run_commands(*commands: list[str]) -> subprocess.CompletedProcess[str]:
    """The commands one after another in one process: what they import takes longer than what they do."""
    call = [sys.executable, "-c", PROGRAM, json.dumps(commands)]
    return subprocess.run(call, env=training.environment(), capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A data set and a run on it."""
    root = tmp_path_factory.mktemp("commands")
    data = sets.write_set(root, "colours", samples())
    recipe = training.write_recipe(root, sets.write_mixture(root, colours=1.0))
    done = training.run(recipe, root / "run", "--set", "train.steps=2")
    assert done.returncode == 0, done.stderr
    return data, root / "run"


def test_a_checkpoint_is_evaluated_exported_asked_and_reported(trained: tuple[Path, Path], tmp_path: Path) -> None:
    data, run = trained
    checkpoint, hf, out = str(run / "checkpoints" / "step_00000002"), str(tmp_path / "hf"), run / "evaluation"
    (tmp_path / "red.png").write_bytes(png(COLOURS[" red"]))
    ask = ["--prompt", "which colour ?", "--image", *[str(tmp_path / "red.png")] * 2, "--max-tokens", "7"]
    evaluate = ["evaluate", checkpoint, "--suite", "scenes", "--data", str(data), "--json"]
    loss = ["evaluate", checkpoint, "--suite", "loss", "--data", str(data), "--json"]
    done = run_commands(
        [*evaluate, str(out / "test.json")],
        [*evaluate, str(out / "blank.json"), "--blank", "--limit", "8"],
        [*loss, str(out / "loss.json")],
        ["evaluate", "-", *loss[2:], str(tmp_path / "first.json"), "--as", str(run / "recipe.toml"), "--blank"],
        ["convert", "to-hf", checkpoint, hf],
        ["generate", checkpoint, *ask],
        ["generate", hf, *ask],
        ["report", str(run)],
    )
    assert done.returncode == 0, done.stderr
    *_, ours, theirs, page, _picture = done.stdout.splitlines()
    assert ours == theirs
    assert ours.strip()
    assert "Accuracy on test" in Path(page).read_text()
    seen, blank = (json.loads((out / f"{name}.json").read_text())["tasks"]["colour"] for name in ("test", "blank"))
    assert (seen["n"], seen["chance"], seen["majority"]) == (12, 0.25, 0.25)
    # Without the picture every answer is the same, and each colour is the truth of a quarter.
    assert (blank["n"], blank["correct"]) == (8, 2)
    loss, first = (json.loads(path.read_text()) for path in (out / "loss.json", tmp_path / "first.json"))
    assert (loss["suite"], loss["checkpoint"], loss["blank"]) == ("loss", checkpoint, False)
    answers = [sample.record["branches"][0]["answer"] for sample in samples()]
    tokenizer = sets.tokenizer(data.parent)
    ends = sum(len(tokenizer.encode(answer)) + 1 for answer in answers)
    assert loss["tokens"] == first["tokens"] == loss["tasks"]["colour"]["tokens"] == ends
    assert (first["checkpoint"], first["as"], first["blank"]) == ("-", str(run / "recipe.toml"), True)
    assert loss["loss"] < first["loss"]
    assert f"{loss['loss']:.4f}" in Path(page).read_text()
    marker = tmp_path / "marker"
    for source in Path(hf).glob("*.py"):
        source.write_text(f"open({str(marker)!r}, 'w')")
    done = run_commands(["generate", hf, *ask])
    assert done.stdout.splitlines() == [ours], done.stderr
    assert not marker.exists()  # the directory's own code is for others, who trust it


def test_cv_bench_asks_a_real_checkpoint_as_generate_does(trained: tuple[Path, Path], tmp_path: Path) -> None:
    """An untrained model's words are no option, and an example shows them."""
    _, run = trained
    checkpoint, out = str(run / "checkpoints" / "step_00000002"), tmp_path / "out.json"
    picture = tmp_path / "red.png"
    picture.write_bytes(png(COLOURS[" red"]))
    prompt = "which colour ?\n(A) red\n(B) blue"
    row = {"type": "2D", "task": "Colour", "source": "made", "choices": ["red", "blue"], "answer": "(A)"}
    row |= {"prompt": prompt, "filename": picture.name}
    longer = row | {"prompt": f"which is the colour ?{prompt}"}
    (tmp_path / "test_2d.jsonl").write_text("\n".join(map(json.dumps, (row, longer))))
    shown = ["--image", str(picture)]
    ask = ["--prompt", f"{prompt}\n{SUFFIX}", "--max-tokens", str(MAX_TOKENS)]
    evaluate = ["evaluate", checkpoint, "--suite", "cv_bench", "--data", str(tmp_path), "--json", str(out)]
    done = run_commands(
        [*evaluate, "--no-images", "--blank"],
        evaluate,
        ["generate", checkpoint, *ask, *shown],
    )
    assert done.returncode == 2
    assert "not allowed with argument" in done.stderr
    assert "0.0%" in done.stdout
    said = json.loads(out.read_text())["examples"][0]["answer"]
    assert said == f"“{done.stdout.rstrip().splitlines()[-1]}”"


def test_what_cannot_be_loaded_or_evaluated_is_a_user_error(trained: tuple[Path, Path], tmp_path: Path) -> None:
    data, run = trained
    checkpoint = str(run / "checkpoints" / "step_00000002")
    for command, what in [
        (["evaluate", str(tmp_path / "none"), "--suite", "scenes", "--data", str(data)], "no checkpoint"),
        (["evaluate", checkpoint, "--suite", "scenes", "--data", str(tmp_path / "x" / "y")], "the data set is missing"),
        (["evaluate", "-", "--suite", "scenes", "--data", str(data), "--as", "quickstart"], "--as is of the suite"),
        (["generate", checkpoint, "--prompt", "a" * 5000], "are more than the model's"),
    ]:
        done = run_commands(command)
        assert done.returncode == 2
        assert what in done.stderr.splitlines()[-1]


def test_options_that_say_nothing_are_refused_and_a_stage_is_named(
    trained: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, run = trained
    overrides = ['stages=[{name="a", train.steps=2}, {name="b", train.steps=3}]']
    staged, out = tmp_path / "staged.toml", tmp_path / "loss.json"
    staged.write_text(dump_recipe(load_recipe(run / "recipe.toml", overrides)))
    loss = ["evaluate", "-", "--suite", "loss", "--data", str(data)]
    for more, what in [
        (["--limit", "0"], "so few samples say nothing (--limit 0)"),
        (["--limit", "-3"], "so few samples say nothing (--limit -3)"),
        (["--stage", "b"], "--stage is of the recipe that --as names"),
        (["--as", str(staged)], "one is needed (--stage): the stages are a, b"),
        (["--as", str(staged), "--stage", "c"], "no stage is called 'c'"),
    ]:
        assert cli.main([*loss, *more]) == 2
        assert what in capsys.readouterr().err
    assert cli.main([*loss, "--as", str(staged), "--stage", "b", "--limit", "1", "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    assert (found["as"], found["stage"], found["samples"]) == (str(staged), "b", 1)


def test_a_stage_of_the_same_model_begins_where_the_one_before_ended(trained: tuple[Path, Path]) -> None:
    """Every weight and what the controller remembers are handed over bit for bit, and the loss is the same number."""
    data, run = trained
    checkpoint, source = run / "checkpoints" / "step_00000002", Source(data, "made/colours")
    frozen = load_recipe(run / "recipe.toml", ['train.frozen=["encoders"]', "train.seed=7", "optimizer.lr=0.1"])
    assert frozen.train.frozen == ("encoders",)
    ended, begun, fresh = mmoe.load(checkpoint), begin(frozen, checkpoint), begin(frozen, None)
    before, after, new = (dict(one.network.state_dict()) for one in (ended, begun, fresh))
    tensors = [name for name, value in before.items() if torch.is_tensor(value)]
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in tensors)
    assert not all(torch.equal(before[name], new[name]) for name in tensors)
    assert measure(ended, source) == measure(begun, source)
    assert measure(fresh, source)["loss"] != measure(begun, source)["loss"]
