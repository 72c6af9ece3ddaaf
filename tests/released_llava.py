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
from mmoe.recipe import model as tables
from mmoe.recipe.schema import Recipe

LLAMA = exporting.LLAMA
CLIP = dataclasses.replace(exporting.CLIP, width=24, mlp_width=96, layers=3)
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
        network = exporting.scattered(self.recipe)
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
