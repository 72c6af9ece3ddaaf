"""Recipes that somebody wrote to do harm: refused in one line, in no time."""

import contextlib
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmoe.cli import main
from mmoe.errors import UserError
from mmoe.recipe import list_recipes, load_recipe

pytestmark = pytest.mark.latest

TEXTS = {
    "deep lists": ("x = " + "[" * 100_000, "nested too deeply"),
    "deep tables": ("x = " + "{a = " * 5000, "nested too deeply"),
    "a deep key": ("a." * 50_000 + "b = 1", "a key of more than 16 parts"),
    "a deep header": ("[" + "a." * 50_000 + "b]", "a key of more than 16 parts"),
    "a deep quoted key": ("'a' .\t" * 20_000 + "b = 1", "a key of more than 16 parts"),
    "a long number": ("x = " + "9" * 5000, "not valid TOML"),
    "a long hexadecimal number": ("x = [{y = 0x" + "f" * 5000 + "}]", "does not fit in 64 bits"),
    "a long file": ("#" * (1 << 18), "more than 262144 bytes"),
    "zeros": ("\0" * 10, "not valid TOML"),
}


@pytest.mark.parametrize("case", TEXTS)
def test_a_file_that_no_parser_survives(tiny: Path, case: str) -> None:
    text, message = TEXTS[case]
    tiny.write_text(tiny.read_text() + "\n" + text)
    with pytest.raises(UserError, match=message):
        load_recipe(tiny)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (f"train.steps={2**63}", "train.steps does not fit in 64 bits"),
        (f"train.seed={'9' * 30}", "train.seed does not fit in 64 bits"),
        (f"optimizer.lr={'9' * 400}", "optimizer.lr does not fit in 64 bits"),
        (f"train.steps=0x{'f' * 5000}", "train.steps does not fit in 64 bits"),
        ("optimizer.lr=1e999", "inf is not a finite number"),
        ("optimizer.min_lr=-inf", "-inf is not a finite number"),
        ("optimizer.betas=[nan, 0.9]", "nan is not a finite number"),
        (f"train.steps={'9' * 5000}", "train.steps must be an integer, found the string"),
        (f"train.steps={'[' * 5000}", "train.steps must be an integer, found the string"),
        (f"model.encoders.{'9' * 5000}.width=3", "no such entry"),
        (f"model.encoders.1.widths=[{'16,' * 5000}]", "5000 stages, each of which halves the image"),
        ("name=../../out", "is no name of a folder"),
        ("name=..", "is no name of a folder"),
        ('name="a\\u001b[2J"', "is no name of a folder"),
        ("name=", "is no name of a folder"),
    ],
)
def test_values_beyond_all_measure(tiny: Path, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_recipe(tiny, [override])


def test_a_recipe_that_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.toml")
    (tmp_path / "zero.toml").symlink_to("/dev/zero")
    for name in ("fifo", "zero"):
        with pytest.raises(UserError, match="cannot be read: it is no regular file"):
            load_recipe(tmp_path / f"{name}.toml")


def test_what_a_message_quotes_is_printable_and_short(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.write_text(f'{tiny.read_text()}\n"\\u001b[2J{"k" * 100_000}" = 1')
    assert main(["recipes", str(tiny)]) == 2
    printed = capsys.readouterr().err
    assert printed.endswith("\n")
    assert printed[:-1].isprintable()
    assert len(printed) < 3000


@settings(derandomize=True, deadline=None, max_examples=150, suppress_health_check=list(HealthCheck))
@given(
    recipe=st.sampled_from(list_recipes()),
    cuts=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 8), st.text(max_size=6)), min_size=1, max_size=4),
)
def test_a_fuzzed_recipe_is_refused_or_loads(
    tmp_path_factory: pytest.TempPathFactory, recipe: str, cuts: list[tuple[float, int, str]]
) -> None:
    text = (Path(__file__).parents[2] / "mmoe" / "recipe" / "recipes" / f"{recipe}.toml").read_text()
    for place, removed, added in cuts:
        start = int(place * len(text))
        text = text[:start] + added + text[start + removed :]
    path = tmp_path_factory.mktemp("fuzzed") / "r.toml"
    path.write_bytes(text.encode(errors="replace"))
    with contextlib.suppress(UserError):
        assert load_recipe(path).model.backbone.layers > 0


@settings(derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(key=st.sampled_from(["train.steps", "optimizer.lr", "model.encoders.0", "data", "x.y"]), value=st.text())
def test_a_fuzzed_set_is_refused_or_loads(tiny: Path, key: str, value: str) -> None:
    with contextlib.suppress(UserError):
        assert load_recipe(tiny, [f"{key}={value}"]).name == "tiny"
