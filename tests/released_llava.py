"""Random models in the layout of released LLaVAs and Yi-VLs, and their exports."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import exporting
import torch

from mmoe.checkpoint.load import Loaded, weights
from mmoe.convert import to_hf
from mmoe.data.tokenizer import train_tokenizer
from mmoe.models.multimodal import build
from mmoe.parallel import engine
from mmoe.recipe import model as tables
from mmoe.recipe.schema import Parallel, Recipe

LLAMA = tables.Llama(
    type="llama",
    vocab_size=300,
    hidden_size=32,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=8,
    ffn_hidden_size=48,
    max_position=128,
)
CLIP = tables.ViT(
    name="clip",
    type="vit",
    image_size=16,
    patch_size=4,
    width=24,
    mlp_width=96,
    layers=3,
    heads=2,
    activation="quick_gelu",
    class_token=True,
    pre_norm=True,
    patch_bias=False,
    feature_layer=-2,
    final_norm=False,
    pooling="norm",
)
CONNECTORS = {
    "linear": tables.Linear(type="linear", grid=4),
    "mlp2x_gelu": tables.MLP(type="mlp", grid=4),
    "mlp2x_gelu_Norm": tables.MLP(type="mlp", grid=4, norm=True),
}


def recipe_of(**changes: Any) -> Recipe:
    shape = tables.Model(backbone=LLAMA, encoders=(CLIP,), connector=CONNECTORS["mlp2x_gelu_Norm"])
    data = dataclasses.replace(exporting.RECIPE.data, fit="pad", interpolation="cubic")
    return dataclasses.replace(exporting.RECIPE, model=dataclasses.replace(shape, **changes), data=data)


class Made:
    """A random model, and its export."""

    def __init__(self, folder: Path, kind: str, dtype: str | None = None, **changes: Any) -> None:
        self.kind, self.recipe = kind, recipe_of(**{"connector": CONNECTORS[kind]} | changes)
        self.tokenizer, self.hf = folder / "tokenizer.json", folder / "hf"
        train_tokenizer(["how many zebras ?"], 300).save(str(self.tokenizer))
        engine.start(Parallel(), seed=0, alone=True)
        network = build(self.recipe)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for tensor in network.parameters():
                tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))
        self.ours, self.state = Loaded(self.recipe, network, self.tokenizer), dict(weights(network))
        to_hf(folder, self.hf, dtype, lambda _: (self.recipe, self.state, self.tokenizer), form="llava_llama")
        self.config = json.loads((self.hf / "config.json").read_text())

    def bare(self, folder: Path, **changes: Any) -> Path:
        """As it is published: without our recipe."""
        hf = Path(shutil.copytree(self.hf, folder / "bare"))
        (hf / "mmoe_recipe.toml").unlink()
        (hf / "config.json").write_text(json.dumps(self.config | changes))
        return hf

    def is_same(self, state: Any) -> bool:
        return state.keys() == self.state.keys() and all(torch.equal(state[k], part) for k, part in self.state.items())
