"""What the ranks of a pool run of a ViT by itself: outputs and gradients, checkpoints of its parts."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmoe.models.encoders import build_encoder
from mmoe.models.encoders_parallel import Encoders, shard
from mmoe.parallel import engine, state
from mmoe.recipe import model, schema

IMAGES = 3


def _encoder(seed: int, options: dict[str, Any]) -> tuple[Encoders, bool]:
    fields = {"image_size": 16, "patch_size": 4, "width": 16, "layers": 2, "heads": 4, **options}
    torch.manual_seed(seed)
    encoder = build_encoder(model.ViT(name="vit", type="vit", **fields)).double()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return Encoders({"vit": encoder}), shard(encoder)


def run(tensor: int, saved: str = "", resumed: str = "", **options: Any) -> dict[str, Any]:
    """Features, gradients and weights (with where a rank's part stands) of a ViT over ``tensor`` ranks; written as a
    checkpoint to ``saved``, or read from ``resumed`` into other weights first."""
    engine.start(schema.Parallel(tensor=tensor), 0)
    encoders, cut = _encoder(1 if resumed else 0, options)
    if resumed:
        state.load(Path(resumed), [encoders], None)
    generator = torch.Generator().manual_seed(2)
    pixels = torch.randn(IMAGES, 3, 16, 16, generator=generator, dtype=torch.float64)
    features = encoders["vit"](pixels)[0]
    features.backward(torch.randn(features.shape, generator=generator, dtype=torch.float64))
    if saved:
        write = state.Write(Path(saved), state.sharded([encoders], None))
        write.run()
        write.finish()
    parameters = dict(encoders.named_parameters())
    return {
        "cut": cut,
        "features": features.detach(),
        "weights": {name: parameter.detach() for name, parameter in parameters.items()},
        "gradients": {name: parameter.grad for name, parameter in parameters.items() if parameter.grad is not None},
        "axes": {name: p.partition_dim for name, p in parameters.items() if getattr(p, "tensor_model_parallel", False)},
    }


def whole(results: list[dict[str, Any]], name: str, gated: bool) -> dict[str, Tensor]:
    """The ranks' parts put together; what each has whole is the same on all."""
    tensors: dict[str, Tensor] = {}
    for key, first in results[0][name].items():
        parts = [result[name][key] for result in results]
        if key not in results[0]["axes"]:
            assert all(torch.equal(first, part) for part in parts), key
            tensors[key] = first
            continue
        axis = results[0]["axes"][key]
        halves = zip(*(part.chunk(2 if gated and ".mlp_in." in key else 1, axis) for part in parts), strict=True)
        tensors[key] = torch.cat([torch.cat(half, axis) for half in halves], axis)
    return tensors
