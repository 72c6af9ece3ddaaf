"""The shipped recipes of published systems: as many parameters as transformers' classes have, and as were published."""

import dataclasses
import functools
import math

import pytest
import torch
import transformers

from mmoe.convert.families import llama, llava, llava_llama, vision
from mmoe.models.count import count, describe
from mmoe.parallel import layout
from mmoe.recipe import load_recipe
from mmoe.recipe.load import list_recipes
from mmoe.recipe.model import SVA, AnyEncoder, ConvNeXt, Llama, Model, ViT

PUBLISHED = {
    "llava_1_5_7b": 7.06e9,  # llava-hf/llava-1.5-7b-hf
    "llava_1_5_13b": 13.35e9,  # llava-hf/llava-1.5-13b-hf
    "longcat_flash_560b": 560e9,  # arXiv 2509.01322
    "longcat_sva_560b": 560e9,  # the encoders and the connector are half a percent more
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
    config = llava.to_config(model, "float32")
    assert count(model).total == parameters(transformers.LlavaForConditionalGeneration, config)


@pytest.mark.parametrize("name", ["yi_vl_6b", "yi_vl_34b", "yi_vl_tiny", "llava_7b"])
def test_yi_vl_and_the_first_llava_are_the_sums_of_their_parts(name: str) -> None:
    model = load_recipe(name).model
    (encoder,), backbone = model.encoders, model.backbone
    assert isinstance(encoder, ViT)
    assert isinstance(backbone, Llama)
    text = parameters(transformers.LlamaForCausalLM, llama.to_config(backbone, "float32"))
    tower = parameters(transformers.CLIPVisionModel, vision.to_config(encoder))
    d = backbone.hidden_size
    connector = encoder.width * d + d  # a linear map
    if name.startswith("yi_vl"):
        connector += (d * d + d) + 2 * 2 * d  # another one, two LayerNorms
    assert count(model).total == text + tower + connector
    assert not list(llava_llama.problems(model))


CAMBRIAN = ["cambrian_1_8b", "cambrian_1_13b", "cambrian_1_34b", "cambrian_tiny"]
FLAGSHIP = ["longcat_sva_560b", "longcat_sva_tiny"]
LLAVA = ["llava_7b", "llava_1_5_7b", "llava_1_5_13b", "yi_vl_6b", "yi_vl_34b"]


def sva_parameters(model: Model) -> int:
    """Of the connector, by the released modules' shapes (cambrian/model/vision_sampler.py)."""
    sva, d = model.connector, model.backbone.hidden_size
    assert isinstance(sva, SVA)
    c, norm = sva.width, 2 * sva.width
    features = [e.width if isinstance(e, ViT) else sum(e.widths) for e in model.encoders]
    sides = [e.grid or e.image_size // e.patch_size for e in model.encoders if isinstance(e, ViT | ConvNeXt)]
    windows = [(side // sva.grid) ** 2 for side in sides]
    projectors = sum((f * c + c) + (c * c + c) + norm for f in features)
    attention = norm + 2 * c * c  # of the queries: norm and projection; and what goes out
    attention += sum(2 * (norm + c * c) + (keys * c if keys > 1 else 0) for keys in windows)

    def layer(queries: int) -> int:
        return c * c + (queries + c) * c + attention + norm + (c * c + c * queries)

    inside = sva.inside.layers * layer(d) if sva.inside else 0
    return projectors + c + sva.layers * layer(c) + inside + (c * d + d) + (d * d + d) + d


@functools.cache
def tower_parameters(encoders: tuple[AnyEncoder, ...]) -> int:
    """Of the encoders, transformers' models: its ConvNeXt has an epsilon of its own, and as many parameters."""
    total = 0
    for encoder in encoders:
        assert isinstance(encoder, ViT | ConvNeXt)
        if isinstance(encoder, ConvNeXt):
            config = vision.to_config(dataclasses.replace(encoder, norm_eps=1e-6, pooled_norm_eps=1e-6))
        else:
            config = vision.to_config(encoder)
        total += parameters(getattr(transformers, config["architectures"][0]), config)
    return total


@pytest.mark.parametrize("name", CAMBRIAN)
def test_cambrian_is_the_sum_of_its_parts(name: str) -> None:
    model = load_recipe(name).model
    assert isinstance(model.backbone, Llama)
    text = parameters(transformers.LlamaForCausalLM, llama.to_config(model.backbone, "float32"))
    assert count(model).total == text + tower_parameters(model.encoders) + sva_parameters(model)


@pytest.mark.parametrize("name", FLAGSHIP)
def test_the_flagship_is_the_sum_of_its_parts(name: str) -> None:
    model = load_recipe(name).model
    alone = dataclasses.replace(model, encoders=(), connector=None)
    assert count(model).total == count(alone).total + tower_parameters(model.encoders) + sva_parameters(model)


def test_the_flagship_sees_with_cambrian_and_thinks_with_longcat() -> None:
    """About 27B active parameters on average (arXiv 2509.01322), on the encoders of Cambrian-1 34B."""
    model, text, cambrian = (load_recipe(name).model for name in (FLAGSHIP[0], "longcat_flash_560b", CAMBRIAN[2]))
    assert (model.backbone, model.moe, model.mtp) == (text.backbone, text.moe, text.mtp)
    assert model.encoders == cambrian.encoders
    assert isinstance(cambrian.connector, SVA)
    assert model.connector == dataclasses.replace(cambrian.connector, inside=None)
    shown = next(line for line in describe(model).splitlines() if line.startswith("active, mean"))
    assert int(shown.split()[2].replace(",", "")) == pytest.approx(27e9, rel=0.01)


def test_cambrian_as_released() -> None:
    """cambrian-mllm/cambrian, README.md and scripts/cambrian."""
    for name, batch, lr, stride, inside in zip(
        CAMBRIAN, (512, 512, 1024), (4e-5, 4e-5, 2e-5), (3, 4, 7), (10, 10, 9), strict=False
    ):
        recipe = load_recipe(name)
        sva = recipe.model.connector
        assert isinstance(sva, SVA)
        assert (sva.tokens, sva.sides, sva.layers, sva.mixing, sva.scale) == (600, (24,), 3, "joint", "head")
        assert sva.inside is not None
        assert (sva.inside.start, sva.inside.stride, sva.inside.layers) == (0, stride, inside)
        assert [encoder.image_size for encoder in recipe.model.encoders] == [384, 336, 378, 1024]
        assert [encoder.grid for encoder in recipe.model.encoders] == [24, 24, 24, 96]
        align, instruct = recipe.stages
        assert (align.optimizer.lr, instruct.optimizer.lr) == (1e-3, lr)
        assert {module.lr for module in align.optimizer.modules} == {1e-4}
        assert (align.train.frozen, instruct.train.frozen) == (("encoders", "language"), ("encoders",))
        for stage, samples in ((align, 2.5e6), (instruct, 7e6)):
            assert stage.optimizer.reference_batch == stage.train.global_batch == batch
            assert stage.train.steps == -(-samples // batch)


@pytest.mark.parametrize(
    ("name", "ranks"),
    [
        *zip(CAMBRIAN, (32, 64, 128, 2), strict=True),
        *zip(FLAGSHIP, (224, 2), strict=True),
        *zip(LLAVA, (8, 8, 8, 8, 32), strict=True),
    ],
)
def test_the_layout_is_possible(name: str, ranks: int) -> None:
    for stage in load_recipe(name).stages:
        layout.check(stage, ranks)


def test_the_first_llava_as_published() -> None:
    """arXiv 2304.08485, and the first release's README: 595K pairs once, 158K instructions three times."""
    align, instruct = load_recipe("llava_7b").stages
    for stage, batch, lr, samples, frozen in (
        (align, 128, 2e-3, 595e3, ("encoders", "language")),
        (instruct, 32, 2e-5, 3 * 158e3, ("encoders",)),
    ):
        assert (stage.train.global_batch, stage.optimizer.lr, stage.optimizer.weight_decay) == (batch, lr, 0)
        assert stage.train.steps == -(-samples // batch)
        assert stage.optimizer.warmup_steps == math.ceil(0.03 * stage.train.steps)
        assert (stage.train.frozen, stage.data.fit, stage.data.sequence_length) == (frozen, "crop", 2048)
        assert (stage.model.image_sizes, stage.model.image_tokens) == ((224,), 256)


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
