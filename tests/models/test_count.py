"""Parameters counted from a recipe: as many as the model has, and at full size as many as were published."""

import pytest
import torch
from exporting import MODEL
from transformers import LongcatFlashConfig, LongcatFlashForCausalLM

from mmoe import cli
from mmoe.convert.families import longcat
from mmoe.models.count import count
from mmoe.models.multimodal import build
from mmoe.parallel import engine
from mmoe.recipe import load_recipe
from mmoe.recipe.model import Model
from mmoe.recipe.schema import Parallel


def counted_by_transformers(model: Model) -> int:
    """Parameters of LongcatFlashForCausalLM on the meta device, without the projections that no computation reads."""
    fields = longcat.to_config(model.backbone, model.moe, "float32")
    config = LongcatFlashConfig(**{k: v for k, v in fields.items() if k not in ("architectures", "model_type")})
    with torch.device("meta"):
        total = sum(parameter.numel() for parameter in LongcatFlashForCausalLM(config).parameters())
    one_expert = 2 * model.moe.expert_hidden_size * model.backbone.hidden_size
    return total - model.backbone.layers * model.moe.zero_experts * one_expert


@pytest.mark.parametrize("name", ["longcat_flash_560b", "longcat_flash_2b_16b", "longcat_flash_3b_20b"])
def test_transformers_has_as_many(name: str) -> None:
    model = load_recipe(name).model
    assert count(model).total == counted_by_transformers(model)


@pytest.mark.parametrize("name", ["quickstart", "longcat_small"])
def test_the_model_has_as_many(name: str) -> None:
    recipe = load_recipe(name)
    engine.start(Parallel(), seed=0, alone=True)
    counted = count(recipe.model)
    assert counted.total + counted.mtp == sum(parameter.numel() for parameter in build(recipe).parameters())
    assert bool(counted.mtp) == (name == "longcat_small")
    assert count(MODEL).vision > 0


def test_full_size_is_as_published() -> None:
    """arXiv 2509.01322: "560B", of which 18.6B to 31.3B are active, about 27B on average; cut after the digits."""
    counted = count(load_recipe("longcat_flash_560b").model)
    assert counted.total // 10**9 == 560
    assert [int(counted.active(experts) / 1e8) for experts in (0, 12)] == [186, 313]
    assert round(counted.active(8) / 1e9) == 27


@pytest.mark.parametrize(("name", "active", "total"), [("2b_16b", 2.4, 16), ("3b_20b", 3.0, 20)])
def test_proxies_meet_the_counts_of_the_report(name: str, active: float, total: float) -> None:
    model = load_recipe(f"longcat_flash_{name}").model
    assert count(model).total == pytest.approx(total * 1e9, rel=0.01)
    assert count(model).active(model.moe.active_experts) == pytest.approx(active * 1e9, rel=0.01)


def test_recipes_count_prints_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["recipes", "longcat_flash_560b", "--count"]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert rows[0].split() == ["total", "560,664,958,976"]
    assert rows[-1].endswith("12 FFN experts")
    assert cli.main(["recipes", "--count"]) == 2
    assert "needs a recipe's name" in capsys.readouterr().err
