"""SVA within the language model, against the released arithmetic in hooks on transformers' Llama in float64."""

import dataclasses

import pytest
import released_sva
import small
import torch
from test_llama import SHAPE
from transformers import LlamaConfig, LlamaForCausalLM

from mmoe.checkpoint.load import weights
from mmoe.convert.families import cambrian, llama
from mmoe.models.multimodal import build
from mmoe.parallel import engine
from mmoe.recipe.model import SVA, Inside, Model, ViT
from mmoe.recipe.schema import Parallel
from mmoe.recipe.tokens import OURS

ENCODERS = tuple(
    ViT(name=name, type="vit", image_size=16, patch_size=patch, width=16, layers=1, heads=2)
    for name, patch in (("coarse", 8), ("fine", 4))
)
MODEL = Model(
    backbone=dataclasses.replace(SHAPE, layers=4),
    encoders=ENCODERS,
    connector=SVA(
        grid=2, width=16, heads=2, newline=True, mask_padding=True, inside=Inside(start=1, stride=2, layers=2)
    ),
)


@pytest.mark.parametrize(
    "places", [[(0, 1), (1, 0)], [(0, 1), (0, 9), (1, 5)], []], ids=["one each", "several", "none"]
)
@torch.no_grad()
def test_against_hooks_on_the_released_arithmetic(places):
    """Any number of images at any offset: their states are the queries, and what comes of them takes their places."""
    engine.start(Parallel(), seed=0)
    ours = build(dataclasses.replace(small.RECIPE, model=MODEL)).eval()
    generator = torch.Generator().manual_seed(3)
    for parameter in ours.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    tokens = torch.randint(4, 64, (2, 20), generator=generator)
    for row, begin in places:
        tokens[row, begin : begin + MODEL.image_tokens] = OURS.image
    pictures = torch.randn(len(places), 3, 16, 16, generator=generator)
    sizes = torch.tensor([[10, 40], [30, 20], [16, 16]])[: len(places)]
    batch = small.batch(tokens, images={16: pictures}, original_sizes=sizes)

    state = weights(ours)
    config = LlamaConfig.from_dict(llama.to_config(MODEL.backbone, "float64"))
    theirs = LlamaForCausalLM(config).double()
    theirs.load_state_dict(
        llama.table(MODEL.backbone).write({k: v for k, v in state.items() if k.startswith("language.")})
    )
    connector = {k: v.double() for k, v in state.items() if k.startswith("connector.")}
    released = cambrian.connector(MODEL).write(connector)
    maps = [encoder.double()(pictures.double()) for encoder in ours.encoders.values()]
    settings = {"grid": 2, "sides": (2,), "layers": 1, "heads": 2, "scale": 8**-0.5, "joint": True, "masked": True}
    images = [
        released_sva.image(
            released, [[part[i] for part in parts] for parts in maps], (2, 4), sizes[i].tolist(), **settings
        )
        for i in range(len(places))
    ]
    embeddings = theirs.get_input_embeddings()(tokens)
    for (row, begin), image in zip(places, images, strict=True):
        embeddings[row, begin : begin + MODEL.image_tokens] = image["rows"]

    def behind(number: int):
        def hook(_module, _inputs, hidden):
            for (row, begin), image in zip(places, images, strict=True):
                square = hidden[row, begin : begin + MODEL.image_tokens].view(2, 3, -1)
                square[:, :2] = image["ask"](f"model.vision_sampler_layers.{number}.layers.0", square[:, :2].clone())

        return hook

    for number, layer in enumerate((1, 3)):
        theirs.model.layers[layer].register_forward_hook(behind(number))
    ours.encoders.float()
    expected = theirs(inputs_embeds=embeddings).logits
    torch.testing.assert_close(ours.logits(batch).double(), expected, rtol=1e-4, atol=1e-4)
