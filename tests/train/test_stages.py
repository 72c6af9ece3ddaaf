"""A recipe's stages: frozen modules stay, weights are handed on, a run goes on in the stage that it was in."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import sets
import small
import torch
import training

from mmoe.checkpoint.load import hand_over, weights
from mmoe.errors import Interrupted, UserError
from mmoe.models.encoders.vit import resize_position
from mmoe.models.multimodal import build
from mmoe.parallel import engine
from mmoe.parallel.optimizer import parts
from mmoe.recipe import load_recipe
from mmoe.recipe.schema import ModuleRate, Optimizer, Recipe
from mmoe.train import stages
from mmoe.train.step import Stepper, module_factor

STAGES = """
[[stages]]
name = "align"
train = { steps = 3, frozen = ["encoders", "language"] }
optimizer = { lr = 1e-2, warmup_steps = 1, reference_batch = 1 }

[[stages]]
name = "tune"
train = { steps = 4, frozen = ["encoders.convnet"] }
checkpoint.every = 2

[[stages.optimizer.modules]]
name = "connector"
lr = 1e-3

[[stages.model.encoders]]
name = "vit"
image_size = 32
grid = 4
"""


@pytest.fixture(scope="module")
def staged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A recipe of two stages and its finished run."""
    root = tmp_path_factory.mktemp("staged")
    sets.write_set(root, "varied", sets.varied(40))
    recipe = training.write_recipe(root, sets.write_mixture(root, varied=1.0))
    recipe.write_text(recipe.read_text() + STAGES)
    done = training.run(recipe, root / "whole")
    assert done.returncode == 0, done.stderr
    assert "stage 1 of 2: align" in done.stderr
    return recipe, root / "whole"


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    """The modules in which a weight differs, encoders by name."""
    names = [name for name, tensor in before.items() if not torch.equal(tensor, after[name])]
    return {".".join(name.split(".")[: 2 if name.startswith("encoders") else 1]) for name in names}


@pytest.mark.latest
def test_each_stage_trains_what_it_thaws(staged: tuple[Path, Path]) -> None:
    recipe, run = staged
    assert sorted(path.name for path in run.iterdir()) == ["1-align", "2-tune", "recipe.toml"]
    assert load_recipe(run / "recipe.toml") == load_recipe(recipe)
    assert [row["step"] for row in training.curve(run / "1-align")] == [1, 2, 3]
    assert training.curve(run / "1-align")[1]["lr"] == 2e-2  # 1e-2 · √(4 packs / 1)
    first, aligned = training.last(run / "1-align")
    engine.start(first.parallel, first.train.seed, alone=True)
    begin = {name: tensor.clone() for name, tensor in weights(build(first)).items()}
    assert changed(begin, aligned) == {"connector"}
    _, tuned = training.last(run / "2-tune")
    positions = {name: tuned.pop(name) for name in ("encoders.vit.position",)}
    assert positions["encoders.vit.position"].shape == (64, 16)
    del aligned["encoders.vit.position"]
    assert changed(aligned, tuned) == {"encoders.vit", "connector", "language"}


def test_nothing_is_lost_between_stages(staged: tuple[Path, Path]) -> None:
    """Every weight is handed on as it was; the ViT's positions are interpolated."""
    recipe, run = staged
    (_, aligned), tune = training.last(run / "1-align"), load_recipe(recipe).stages[1]
    engine.start(tune.parallel, tune.train.seed, alone=True)
    model = build(tune)
    hand_over(run / "1-align/checkpoints/step_00000003", [model])
    handed = weights(model)
    name = "encoders.vit.position"
    vit = next(encoder for encoder in tune.model.encoders if encoder.name == "vit")
    assert torch.equal(handed.pop(name), resize_position(aligned.pop(name), vit))
    assert handed.keys() == aligned.keys()
    assert all(torch.equal(handed[name], tensor) for name, tensor in aligned.items())


@pytest.mark.parametrize(
    "change", ["model.backbone.layers=1", "model.backbone.hidden_size=64", "model.encoders.0.name=eye"]
)
def test_weights_of_another_model_are_refused(staged: tuple[Path, Path], change: str) -> None:
    recipe = load_recipe(staged[1] / "1-align/recipe.toml", [change])
    engine.start(recipe.parallel, recipe.train.seed, alone=True)
    with pytest.raises(UserError, match="weights are those of another model"):
        hand_over(staged[1] / "1-align/checkpoints/step_00000003", [build(recipe)])


def test_a_run_goes_on_in_its_stage(staged: tuple[Path, Path], tmp_path: Path) -> None:
    recipe, run = staged[0], tmp_path / "run"
    shutil.copytree(staged[1], run)
    whole = training.curve(run / "2-tune")
    shutil.rmtree(run / "2-tune/checkpoints/step_00000004")
    (run / "2-tune/checkpoints/latest").write_text("step_00000002\n")
    done = training.run(recipe, run, "--resume")
    assert done.returncode == 0, done.stderr
    assert "align" not in done.stderr
    assert training.curve(run / "2-tune") == whole


def test_a_stage_by_its_name_from_a_checkpoint(staged: tuple[Path, Path], tmp_path: Path) -> None:
    recipe, run = staged[0], tmp_path / "run"
    aligned = staged[1] / "1-align/checkpoints/step_00000003"
    done = training.run(recipe, run, "--stage", "tune", "--from", str(aligned))
    assert done.returncode == 0, done.stderr
    assert training.curve(run / "2-tune") == training.curve(staged[1] / "2-tune")


def test_what_is_not_this_recipes_is_refused_before_anything_is_trained(
    staged: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages.run, "train", lambda *_: pytest.fail("it was trained"))
    shutil.copytree(staged[1], tmp_path / "run")
    before = (tmp_path / "run/recipe.toml").read_text()
    for change in ("stages.0.optimizer.lr=0.5", "stages.1.optimizer.lr=0.5"):
        with pytest.raises(UserError, match="holds another recipe's run"):
            stages.train(load_recipe(staged[0], [change]), tmp_path / "run", resume=True)
    with pytest.raises(UserError, match="holds a run already"):
        stages.train(load_recipe(staged[0]), tmp_path / "run")
    shutil.rmtree(tmp_path / "run/1-align")
    with pytest.raises(UserError, match="holds a run already"):
        stages.train(load_recipe(staged[0]), tmp_path / "run")
    assert (tmp_path / "run/recipe.toml").read_text() == before


def test_a_stop_between_two_stages(staged: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes with the last step of a stage: the next one does not begin, and is what --resume begins with."""
    recipe, run, trained = load_recipe(staged[0]), tmp_path / "run", []

    def train(stage: Recipe, out: Path, resume: bool, initial: Path | None) -> bool:
        trained.append((stage.name, resume, initial))
        shutil.copytree(staged[1] / out.name, out)
        return stage.name.endswith("align")

    monkeypatch.setattr(stages.run, "train", train)
    with pytest.raises(Interrupted, match="stopped after stage 'align'"):
        stages.train(recipe, run)
    stages.train(recipe, run, resume=True)
    aligned = run / "1-align/checkpoints/step_00000003"
    assert trained == [("tiny-align", False, None), ("tiny-tune", False, aligned)]


def test_a_run_that_began_with_a_later_stage_goes_on_there(staged: tuple[Path, Path], tmp_path: Path) -> None:
    recipe, run = load_recipe(staged[0]), tmp_path / "run"
    assert stages.resumed(recipe, run, 0, named=False) == 0
    shutil.copytree(staged[1] / "2-tune", run / "2-tune")
    assert stages.resumed(recipe, run, 0, named=False) == 1
    assert stages.resumed(recipe, run, 0, named=True) == 0
    shutil.copytree(staged[1] / "1-align", run / "1-align")
    shutil.rmtree(run / "2-tune")
    assert stages.resumed(recipe, run, 0, named=False) == 1


@pytest.mark.parametrize(
    ("first", "what"),
    [("tune", "stage 'align' is not complete"), ("polish", "no stage is called 'polish'")],
)
def test_refused_stages(staged: tuple[Path, Path], tmp_path: Path, first: str, what: str) -> None:
    with pytest.raises(UserError, match=what):
        stages.train(load_recipe(staged[0]), tmp_path / "run", first=first)


def test_a_recipe_without_stages_has_none_to_begin_with(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no stage is called 'align'"):
        stages.train(small.RECIPE, tmp_path / "run", first="align")


def stepper(*frozen: str, **optimizer: object) -> Stepper:
    recipe = dataclasses.replace(
        small.RECIPE,
        train=dataclasses.replace(small.RECIPE.train, frozen=frozen),
        optimizer=dataclasses.replace(small.RECIPE.optimizer, **optimizer),
    )
    engine.start(recipe.parallel, recipe.train.seed, alone=True)
    return Stepper(recipe, [build(recipe)])


def test_frozen_parameters_have_neither_gradient_nor_optimizer_state() -> None:
    made = stepper("language.decoder.layers", "language.embedding")
    names = {name for name, parameter in made.models[0].named_parameters() if parameter.requires_grad}
    assert names == {"language.decoder.final_layernorm.weight", "language.output_layer.weight"}
    left = sum(parameter.numel() for parameter in made.models[0].parameters() if parameter.requires_grad)
    wrapped = made.wrapped[0]
    buffers = [*wrapped.buffers, *wrapped.expert_parallel_buffers]
    assert sum(parameter.numel() for buffer in buffers for parameter in buffer.params) == left
    kept = [state for part in parts(made.optimizer) for state in part.optimizer.state.values()]
    assert sum(state["exp_avg"].numel() for state in kept) == left
    outcome = made.step(iter([small.batch(torch.randint(4, 64, (2, 32))) | {"samples": [[], []], "skipped": []}]), 1e-3)
    assert outcome.taken


@pytest.mark.parametrize(
    ("frozen", "what"), [(("connector",), "no module 'connector'"), (("language",), "nothing is left to train")]
)
def test_what_cannot_be_frozen(frozen: tuple[str, ...], what: str) -> None:
    with pytest.raises(UserError, match=what):
        stepper(*frozen)


def test_a_rate_of_no_module_is_refused() -> None:
    with pytest.raises(UserError, match=r"no module 'encoder' \(optimizer\.modules\)"):
        stepper(modules=(ModuleRate(name="encoder", lr=1e-4),))


def test_the_longest_name_has_its_rate() -> None:
    modules = (ModuleRate(name="encoders", lr=1e-4), ModuleRate(name="encoders.clip", lr=1e-5))
    settings = Optimizer(lr=1e-3, modules=modules)
    names = ("encoders.clip.norm.weight", "encoders.clipped.norm.weight", "connector.query")
    assert [module_factor(name, settings) for name in names] == pytest.approx([1e-2, 1e-1, 1.0])
    made = stepper(modules=(ModuleRate(name="language.embedding", lr=1e-4),))
    made.step(iter([small.batch(torch.randint(4, 64, (2, 32))) | {"samples": [[], []], "skipped": []}]), 1e-3)
    groups = [group for part in parts(made.optimizer) for group in part.optimizer.param_groups]
    rates = {parameter: group["lr"] for group in groups for parameter in group["params"]}
    assert rates.pop(made.models[0].get_parameter("language.embedding.word_embeddings.weight")) == pytest.approx(1e-4)
    assert set(rates.values()) == {1e-3}
