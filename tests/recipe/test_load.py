"""Loading is strict and says where, dumping loses nothing."""

import dataclasses
from pathlib import Path

import pytest

from mmoe.errors import UserError
from mmoe.recipe import dump_recipe, list_recipes, load_recipe


def refusal(path: Path | str, *overrides: str) -> UserError:
    with pytest.raises(UserError) as caught:
        load_recipe(path, overrides)
    assert "\n" not in str(caught.value)
    return caught.value


def test_reads_values_and_fills_in_defaults(tiny: Path) -> None:
    recipe = load_recipe(tiny)
    assert [encoder.name for encoder in recipe.model.encoders] == ["vit", "conv"]
    assert recipe.model.encoders[1].widths == (16, 32, 64)
    assert recipe.optimizer.lr == 1e-3
    assert recipe.optimizer.betas == (0.9, 0.95)
    assert recipe.model.connector is not None
    assert recipe.model.connector.grid == 2
    assert recipe.precision.dtype == "fp32"
    assert recipe.parallel.expert == 1


def test_an_integer_stands_for_a_number_but_not_the_reverse(tiny: Path) -> None:
    recipe = load_recipe(tiny, ["optimizer.lr=1"])
    assert type(recipe.optimizer.lr) is float
    assert "train.steps must be an integer, found the number 5.0" in str(refusal(tiny, "train.steps=5.0"))


@pytest.mark.parametrize("name", list_recipes())
def test_every_shipped_recipe_loads_under_its_own_name_and_survives_a_dump(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    (tmp_path / "again.toml").write_text(dump_recipe(recipe), encoding="utf-8")
    assert recipe.name == name
    assert load_recipe(tmp_path / "again.toml") == recipe


def test_dump_keeps_strange_strings_empty_lists_and_absent_tables(tiny: Path, tmp_path: Path) -> None:
    recipe = load_recipe(tiny)
    strange = 'a "quoted" \\ text\twith\nlines, ünïcode 🦓 and \x7f'
    bare = dataclasses.replace(recipe.model, encoders=(), connector=None)
    recipe = dataclasses.replace(recipe, description=strange, model=bare)
    (tmp_path / "again.toml").write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(tmp_path / "again.toml") == recipe


@pytest.mark.parametrize(
    ("assignment", "value"),
    [("1e-5", 1e-5), (" 0.5 ", 0.5), ("3", 3.0)],
)
def test_set_takes_toml_numbers(tiny: Path, assignment: str, value: float) -> None:
    assert load_recipe(tiny, [f"optimizer.eps={assignment}"]).optimizer.eps == value


def test_set_takes_bare_and_quoted_strings_booleans_and_list_entries(tiny: Path) -> None:
    overrides = ["data.root=/a/b c", 'data.tokenizer="t.json"', "parallel.sequence=true", "model.encoders.0.layers=3"]
    recipe = load_recipe(
        tiny,
        [*overrides, "optimizer.betas=[0.8, 0.9]", "model.encoders.1.widths=[8, 16]", "model.encoders.1.widths.1=32"],
    )
    assert (recipe.data.root, recipe.data.tokenizer, recipe.parallel.sequence) == ("/a/b c", "t.json", True)
    assert recipe.model.encoders[0].layers == 3
    assert recipe.optimizer.betas == (0.8, 0.9)
    assert recipe.model.encoders[1].widths == (8, 32)


def test_the_last_set_wins(tiny: Path) -> None:
    assert load_recipe(tiny, ["train.steps=3", "train.steps=4"]).train.steps == 4


def test_a_set_cannot_smuggle_in_a_second_line(tiny: Path) -> None:
    assert "must be an integer" in str(refusal(tiny, "train.steps=1\nseed = 3").what)


def test_missing_file_and_folder_and_bytes_are_named(tmp_path: Path) -> None:
    assert "no such recipe file" in refusal(tmp_path / "none.toml").what
    folder = tmp_path / "folder.toml"
    folder.mkdir()
    assert "cannot be read" in refusal(folder).what
    (tmp_path / "bytes.toml").write_bytes(b"name = '\xff'")
    error = refusal(tmp_path / "bytes.toml")
    assert "not UTF-8" in error.what
    assert str(tmp_path) in error.where


def test_unknown_name_offers_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmoe.recipe.load.list_recipes", lambda: ["quickstart", "other"])
    assert refusal("quickstrat").fix == "did you mean 'quickstart'?"
    assert "quickstart, other" in refusal("zzz").fix


def test_broken_toml_names_the_file_and_the_line(tiny: Path) -> None:
    tiny.write_text("name = \n")
    error = refusal(tiny)
    assert "line 1" in error.what
    assert error.where == str(tiny)


def test_unknown_key_names_the_nearest_in_its_table_and_elsewhere(tiny: Path) -> None:
    tiny.write_text(tiny.read_text().replace("top_k", "topk"))
    error = refusal(tiny)
    assert (error.what, error.where) == ("unknown key 'model.moe.topk'", str(tiny))
    assert error.fix == "did you mean 'model.moe.top_k'?"


@pytest.mark.parametrize(
    ("override", "what", "fix"),
    [
        ("train.lr=1", "unknown key 'train.lr'", "did you mean 'optimizer.lr'?"),
        ("trian.steps=1", "unknown key 'trian'", "did you mean 'train'?"),
        ("model.encoders.0.qqq=1", "unknown key 'model.encoders.0.qqq'", "the keys here are name, image_size"),
        ("train.steps=many", "train.steps must be an integer, found the string 'many'", ""),
        ("train.steps=true", "train.steps must be an integer, found true", ""),
        ("parallel.sequence=1", "parallel.sequence must be true or false, found the integer 1", ""),
        ("data.mixture=3", "data.mixture must be a string, found the integer 3", ""),
        ("data=3", "data must be a table, found the integer 3", ""),
        ("data.root=1979-05-27", "data.root must be a string, found a date", ""),
        ("model.encoders={}", "model.encoders must be a list, each entry a table, found a table", ""),
        ("optimizer.betas=[0.1]", "optimizer.betas must be a list of 2 entries, each a number", ""),
        ("optimizer.betas=[0.1, true]", "optimizer.betas.1 must be a number, found true", ""),
        ("precision.dtype=fp16", "precision.dtype must be one of 'fp32', 'bf16'", ""),
        ("train.steps.more=1", "train.steps is a value, not a table", ""),
        ("model.encoders.7.width=1", "model.encoders.7: no such entry", "2 entries"),
        ("nonsense", "not of the form key=value", "train.steps=100"),
        ("=3", "not of the form key=value", ""),
    ],
)
def test_refusals_of_set_name_the_assignment(tiny: Path, override: str, what: str, fix: str) -> None:
    error = refusal(tiny, override)
    assert what in error.what
    assert fix in error.fix
    assert error.where in (f"--set {override}", str(tiny))
    assert override in error.where or "entry" in error.what


def test_missing_key_says_what_it_must_be(tiny: Path) -> None:
    tiny.write_text(tiny.read_text().replace("steps = 10\n", ""))
    assert str(refusal(tiny)) == f"missing key 'train.steps' ({tiny}): it must be an integer"
