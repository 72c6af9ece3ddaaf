"""Any encoder set, connector and backbone compose: the loss reaches every encoder and the connector."""

import dataclasses
import itertools

import pytest
import small
import torch
from test_llama import SHAPE

from mmoe.models.count import count
from mmoe.models.multimodal import build
from mmoe.parallel import engine
from mmoe.recipe.checks import problems
from mmoe.recipe.model import MLP, SVA, ConvNet, ConvNeXt, Inside, Linear, Model, ViT
from mmoe.recipe.schema import Parallel
from mmoe.recipe.tokens import OURS

CLIP = ViT(
    name="clip", type="vit", image_size=32, patch_size=8, width=16, layers=2, heads=2, activation="quick_gelu",
    class_token=True, pre_norm=True, patch_bias=False, final_norm=False, pooling="norm", feature_layer=-2,
)  # fmt: skip
DINO = ViT(
    name="dino", type="vit", image_size=24, patch_size=4, width=16, layers=1, heads=2, position="rope",
    class_token=True, registers=2, layer_scale=True, key_bias=False, activation="swiglu", grid=4,
)  # fmt: skip
NEXT = ConvNeXt(
    name="next", type="convnext", image_size=48, widths=(8, 16), depths=(1, 1), feature_stages=(0, 1), grid=8
)
PLAIN = ConvNet(name="plain", type="convnet", image_size=32, widths=(8, 8, 8))
ENCODERS = {
    "CLIP": (CLIP,),
    "ConvNet": (PLAIN,),
    "CLIP, DINO, ConvNeXt": (CLIP, DINO, NEXT),
    "ConvNeXt, ConvNet": (NEXT, PLAIN),
}
CONNECTORS = {
    "linear": Linear(type="linear", grid=4),
    "MLP": MLP(type="mlp", grid=3),
    "MLP, norms": MLP(type="mlp", grid=4, norm=True, newline=True),
    "SVA joint": SVA(grid=4, width=16, heads=2, layers=2),
    "SVA sep": SVA(grid=2, width=16, heads=2, mixing="sep", mask_padding=True),
    "SVA groups, inside": SVA(
        grid=4, width=16, heads=2, groups=(2, 4), newline=True, inside=Inside(stride=1, layers=2)
    ),
}
BACKBONES = {
    "LongCat": {"backbone": small.BACKBONE, "moe": small.MIXTURE},
    "Llama": {"backbone": SHAPE},
}
MATRIX = [
    pytest.param(encoders, connector, backbone, id=f"{backbone}: {connector}: {encoders}")
    for encoders, connector, backbone in itertools.product(ENCODERS, CONNECTORS, BACKBONES)
]


@pytest.mark.parametrize(("encoders", "connector", "backbone"), MATRIX)
def test_losses_reach_every_encoder(encoders: str, connector: str, backbone: str) -> None:
    model = Model(encoders=ENCODERS[encoders], connector=CONNECTORS[connector], **BACKBONES[backbone])
    padded = isinstance(model.connector, SVA) and model.connector.mask_padding
    data = dataclasses.replace(small.RECIPE.data, fit="pad" if padded else "stretch")
    recipe = dataclasses.replace(small.RECIPE, model=model, data=data)
    assert list(problems(recipe)) == []
    engine.start(Parallel(), seed=0)
    made = build(recipe)
    assert count(model).vision == sum(p.numel() for n, p in made.named_parameters() if not n.startswith("language."))
    tokens = torch.randint(4, 64, (2, 32), generator=torch.Generator().manual_seed(5))
    for row, begin in ((0, 1), (1, 3)):
        tokens[row, begin : begin + model.image_tokens] = OURS.image
    images = {size: torch.randn(2, 3, size, size) for size in model.image_sizes}
    sizes = torch.tensor([[40, 30], [10, 40]])
    losses = made.train()(small.batch(tokens, images=images, original_sizes=sizes))
    assert losses.isfinite().all()
    losses.sum().backward()
    vision = {n: p.grad for n, p in made.named_parameters() if p.requires_grad and not n.startswith("language.")}
    assert [name for name, gradient in vision.items() if gradient is None] == []
    reached = {".".join(name.split(".")[:2]) for name, gradient in vision.items() if gradient.any()}
    assert reached >= {f"encoders.{encoder.name}" for encoder in model.encoders}
    assert any(name.startswith("connector.") for name in reached)
