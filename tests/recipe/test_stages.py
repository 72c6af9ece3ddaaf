"""Stages: differences laid over the recipe's own tables, written as such, read back as they were."""

from pathlib import Path

import pytest

from mmoe.errors import UserError
from mmoe.recipe import dump_recipe, load_recipe

STAGES = """
[[stages]]
name = "align"
train = { steps = 3, frozen = ["encoders", "language"] }
optimizer.lr = 1e-2

[[stages]]
name = "tune"
data.mixture = "stamps"

[[stages.model.encoders]]
name = "vit"
image_size = 64
grid = 4

[[stages.optimizer.modules]]
name = "connector"
lr = 1e-4
"""


@pytest.fixture
def staged(tiny: Path) -> Path:
    tiny.write_text(tiny.read_text() + STAGES)
    return tiny


def test_a_stage_is_the_recipe_with_its_own_keys(staged: Path) -> None:
    recipe = load_recipe(staged)
    align, tune = recipe.stages
    assert (align.name, tune.name) == ("tiny-align", "tiny-tune")
    assert (align.train.steps, tune.train.steps, recipe.train.steps) == (3, 10, 10)
    assert align.train.frozen == ("encoders", "language")
    assert tune.train.frozen == ()
    assert (align.optimizer.lr, tune.optimizer.lr) == (1e-2, 1e-3)
    assert (align.data.mixture, tune.data.mixture) == ("scenes", "stamps")
    # The entry of a list goes by its name; what it does not say, and the others, stay.
    assert [(e.name, e.image_size, e.grid) for e in tune.model.encoders] == [("vit", 64, 4), ("conv", 32, None)]
    assert align.model == recipe.model
    assert [(module.name, module.lr) for module in tune.optimizer.modules] == [("connector", 1e-4)]
    assert align.stages == tune.stages == ()


def test_what_is_written_reads_back(staged: Path, tmp_path: Path) -> None:
    recipe, again = load_recipe(staged), tmp_path / "again.toml"
    again.write_text(dump_recipe(recipe))
    assert load_recipe(again) == recipe
    # Its stages are written as differences.
    written = dump_recipe(recipe)
    assert written.count("[[stages]]") == 2
    assert written.count("vocab_size") == 1
    single = tmp_path / "single.toml"
    single.write_text(dump_recipe(recipe.stages[1]))
    assert load_recipe(single) == recipe.stages[1]


def test_set_reaches_the_recipe_and_each_stage(staged: Path) -> None:
    recipe = load_recipe(staged, ["train.steps=7", "stages.0.train.steps=2", "stages.1.optimizer.lr=0.5"])
    assert [stage.train.steps for stage in recipe.stages] == [2, 7]
    assert [stage.optimizer.lr for stage in recipe.stages] == [1e-2, 0.5]


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (('name = "tune"', 'name = "align"'), "stages.1.name must be a name of its own, found the string 'align'"),
        (('name = "tune"\n', ""), "stages.1.name must be a name of its own"),
        (("optimizer.lr = 1e-2", "optimizer.lr = -1"), "stage 'align': optimizer.lr: -1.0 is not positive"),
        (("optimizer.lr = 1e-2", "optimiser.lr = 1"), "stage 'align': unknown key 'optimiser'"),
        (('name = "tune"', 'name = "tune/1"'), "stage 'tune/1': name: 'tiny-tune/1' is no name of a folder"),
        (("image_size = 64", "image_size = 60"), "stage 'tune': model.encoders.0.image_size: 60 is not a multiple"),
        (("optimizer.lr = 1e-2", "stages = []"), "a stage has no stages"),
        (("grid = 4\n", ""), "stage 'tune': model.encoders.0.grid: 8 cells a side give each query 4² of them, not 2²"),
        (("grid = 4\n", "grid = 4\nlayers = 3\n"), "model.encoders: they differ from the stage before in more than"),
        (('data.mixture = "stamps"', "model.backbone.layers = 2"), "model.backbone: it differs from the stage"),
        (
            ('data.mixture = "stamps"', "model.connector.layers = 2"),
            "model.connector: it differs from the stage",
        ),
    ],
)
def test_refusals_name_the_stage(staged: Path, change: tuple[str, str], what: str) -> None:
    text = staged.read_text()
    assert change[0] in text
    staged.write_text(text.replace(*change))
    with pytest.raises(UserError) as caught:
        load_recipe(staged)
    assert what in caught.value.what


def test_features_of_a_cache_may_be_the_recipes_and_the_freezing_its_stages(staged: Path) -> None:
    recipe = load_recipe(staged, ['stages.1.data.features=""', "data.features=cache"])
    assert [stage.data.features for stage in recipe.stages] == ["cache", ""]
    with pytest.raises(UserError, match=r"stage 'tune': data\.features: no encoder is frozen"):
        load_recipe(staged, ["data.features=cache"])


def test_stages_are_a_list_of_tables(tiny: Path) -> None:
    tiny.write_text("stages = [1]\n" + tiny.read_text())
    with pytest.raises(UserError, match="stages must be a list, each entry a table"):
        load_recipe(tiny)
