"""Where in a layer the experts stand: the layer against its equations, written out with the layer's own parts."""

import dataclasses
from typing import Any, Literal

import pytest
import small
import torch
from torch import Tensor

from mmoe.layers.scmoe import ScMoELayer
from mmoe.models.multimodal import build_stages
from mmoe.parallel import engine
from mmoe.recipe.model import Model
from mmoe.recipe.schema import Parallel

Order = Literal["shortcut", "sequential"]


def called(order: Order) -> tuple[ScMoELayer, Tensor, Any, Tensor]:
    """A model's first layer, what it was called with on a batch, and what it gave."""
    engine.start(Parallel(), seed=0)
    moe = dataclasses.replace(small.MIXTURE, order=order)
    (model,) = build_stages(dataclasses.replace(small.RECIPE, model=Model(backbone=small.BACKBONE, moe=moe)))
    layer: Any = model.language.decoder.layers[0]
    seen: list[Any] = []

    def look(_: Any, arguments: tuple, keywords: dict, output: tuple) -> None:
        x = arguments[0] if arguments else keywords["hidden_states"]
        seen.append((x.detach(), keywords["packed_seq_params"], output[0].detach()))

    layer.register_forward_hook(look, with_kwargs=True)
    tokens = torch.randint(4, 60, (2, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.eval()(small.batch(tokens))
    ((x, packed, y),) = seen
    return layer, x, packed, y


@pytest.mark.parametrize("order", ["shortcut", "sequential"])
@torch.no_grad()
def test_what_the_experts_read(order: Order) -> None:
    layer, x, packed, y = called(order)
    parts: Any = layer
    attention, mlp = parts.attention, parts.mlp
    h1 = x + attention[0](parts.input_layernorm[0](x), packed)
    n1 = parts.post_attention_layernorm[0](h1)
    h2 = h1 + mlp[0](n1)[0]
    h3 = h2 + attention[1](parts.input_layernorm[1](h2), packed)
    n3 = parts.post_attention_layernorm[1](h3)
    of = {"shortcut": parts.moe(n1, packed), "sequential": parts.moe(n3, packed)}
    torch.testing.assert_close(y, h3 + mlp[1](n3)[0] + of[order], rtol=1e-5, atol=1e-6)
    assert (of["shortcut"] - of["sequential"]).abs().max() > 1e-3
