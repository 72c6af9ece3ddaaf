"""Every parameter has a role, and the proxy's spread and rate become the wide model's as arXiv 2509.01322 says."""

import dataclasses

import pytest
import small

from mmoe.layers.roles import init_std, lr_multiplier, role_of
from mmoe.models.multimodal import MultimodalModel
from mmoe.recipe.schema import Transfer

WIDE = dataclasses.replace(small.RECIPE, transfer=Transfer(base_width=8))
"""Four times the proxy's width."""


def test_every_parameter_has_a_role() -> None:
    model = MultimodalModel(small.RECIPE, small.config())
    roles = {name: role_of(name) for name, _ in model.named_parameters()}
    vectors = {name for name, parameter in model.named_parameters() if parameter.ndim == 1}
    assert {name for name, role in roles.items() if role == "vector"} == vectors
    assert set(roles.values()) == {
        "embedding", "unembedding", "hidden", "residual", "router", "expert_in", "expert_out", "vector",
    }  # fmt: skip
    layer = "language.decoder.layers.1"
    assert roles[f"{layer}.attention.0.o_proj.weight"] == roles[f"{layer}.mlp.1.linear_fc2.weight"] == "residual"
    assert roles[f"{layer}.moe.experts.w2"] == "expert_out"


def test_names_outside_of_the_language_model() -> None:
    assert role_of("encoders.vit.blocks.0.qkv.weight") == role_of("connector.query") == "vision"
    with pytest.raises(KeyError, match="has no role"):
        role_of("language.decoder.layers.0.extra.weight")


def test_without_transfer_the_recipe_is_taken_as_it_is() -> None:
    shape = small.RECIPE.model.backbone
    assert init_std("hidden", small.RECIPE) == shape.init_std
    assert init_std("expert_out", small.RECIPE) == shape.residual_init_std
    assert init_std("router", small.RECIPE) == small.MIXTURE.router_init_std
    assert lr_multiplier("hidden", small.RECIPE) == 1.0


@pytest.mark.parametrize("role", ["unembedding", "hidden", "residual", "router", "expert_in", "expert_out"])
def test_variance_and_rate_are_divided_by_the_width_factor(role) -> None:
    assert init_std(role, WIDE) == init_std(role, small.RECIPE) / 2
    assert lr_multiplier(role, WIDE) == 0.25


def test_embedding_is_unchanged_and_vectors_keep_their_rate() -> None:
    assert init_std("embedding", WIDE) == small.RECIPE.model.backbone.embedding_init_std
    assert [lr_multiplier(role, WIDE) for role in ("embedding", "vector", "vision")] == [1.0] * 3
    with pytest.raises(KeyError):
        init_std("vector", WIDE)
