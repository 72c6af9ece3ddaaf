"""The shipped recipes of published systems: as many parameters as transformers' classes have, and as were published."""

import pytest
import torch
import transformers

from mmoe.convert.families import llama, llava, vision
from mmoe.models.count import count
from mmoe.recipe import load_recipe
from mmoe.recipe.load import list_recipes
from mmoe.recipe.model import Llama, ViT

PUBLISHED = {
    "llava_1_5_7b": 7.06e9,  # llava-hf/llava-1.5-7b-hf
    "llava_1_5_13b": 13.35e9,  # llava-hf/llava-1.5-13b-hf
    "longcat_flash_560b": 560e9,  # arXiv 2509.01322
    "yi_vl_6b": 6.06e9 + 0.63e9,  # 01-ai/Yi-6B, OpenCLIP's ViT-H/14
    "yi_vl_34b": 34.39e9 + 0.63e9,  # 01-ai/Yi-34B, the same
}
PRIVATE = ("architectures", "model_type")


def parameters(kind, fields: dict) -> int:
    """Of one of transformers' models, on the meta device."""
    config = kind.config_class(**{key: value for key, value in fields.items() if key not in PRIVATE})
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in kind(config).parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_as_many_parameters_as_published(name: str) -> None:
    assert name in list_recipes()
    assert count(load_recipe(name).model).total == pytest.approx(PUBLISHED[name], rel=0.01)


@pytest.mark.parametrize("name", ["llava_1_5_7b", "llava_1_5_13b", "llava_tiny"])
def test_llava_is_transformers(name: str) -> None:
    model = load_recipe(name).model
    assert not list(llava.problems(model))
    config = llava.to_config(model, "float32", 3)
    assert count(model).total == parameters(transformers.LlavaForConditionalGeneration, config)


@pytest.mark.parametrize("name", ["yi_vl_6b", "yi_vl_34b", "yi_vl_tiny"])
def test_yi_vl_is_the_sum_of_its_parts(name: str) -> None:
    model = load_recipe(name).model
    (encoder,), backbone = model.encoders, model.backbone
    assert isinstance(encoder, ViT)
    assert isinstance(backbone, Llama)
    text = parameters(transformers.LlamaForCausalLM, llama.to_config(backbone, "float32"))
    tower = parameters(transformers.CLIPVisionModel, vision.to_config(encoder))
    d = backbone.hidden_size
    connector = (encoder.width * d + d) + (d * d + d) + 2 * 2 * d  # two linear maps, two LayerNorms
    assert count(model).total == text + tower + connector


def test_stages_as_published() -> None:
    """arXiv 2310.03744, table 9; arXiv 2403.04652, section 7.2."""
    align, instruct = load_recipe("llava_1_5_7b").stages
    assert (align.train.global_batch, align.optimizer.lr, align.optimizer.weight_decay) == (256, 1e-3, 0)
    assert (instruct.train.global_batch, instruct.optimizer.lr, instruct.optimizer.weight_decay) == (128, 2e-5, 0)
    assert (align.train.frozen, instruct.train.frozen) == (("encoders", "language"), ("encoders",))
    assert load_recipe("llava_1_5_13b").stages[0].train == align.train
    for name in ("yi_vl_6b", "yi_vl_34b"):
        low, high, tune = load_recipe(name).stages
        assert [stage.model.image_sizes for stage in (low, high, tune)] == [(224,), (448,), (448,)]
        assert [stage.model.image_tokens for stage in (low, high, tune)] == [256, 1024, 1024]
        assert [stage.train.global_batch for stage in (low, high, tune)] == [4096, 4096, 256]
        assert [stage.optimizer.lr for stage in (low, high, tune)] == [1e-4, 1e-4, 2e-5]
        assert [stage.optimizer.clip_grad for stage in (low, high, tune)] == [0.5, 0.5, 1.0]
        assert [stage.train.frozen for stage in (low, high, tune)] == [("language",), ("language",), ()]
