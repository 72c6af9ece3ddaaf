"""Directories of tiny random models as they are published: what a checkpoint is put together of."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import exporting
import torch
import transformers

from mmoe.convert.families import llama, longcat, vision
from mmoe.data.tokenizer import train_tokenizer
from mmoe.recipe import model as tables
from mmoe.recipe.model import Model
from mmoe.recipe.schema import Recipe

LLAMA = dataclasses.replace(exporting.LLAMA, layers=3)
LONGCAT = exporting.MODEL.backbone
assert isinstance(LONGCAT, tables.Longcat)
assert exporting.MODEL.moe is not None
MOE = dataclasses.replace(exporting.MODEL.moe, expert_hidden_size=16)  # of a size that trains in bf16
SVA = tables.SVA(grid=4, width=16, heads=2, newline=True, inside=tables.Inside(start=0, stride=2, layers=1))
TOWER = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
WIDE = {**TOWER, "intermediate_size": 48}
STAGES = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "image_size": 64}
CLIP = transformers.CLIPConfig(
    vision_config=WIDE, text_config={"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
)
TOWERS: dict[str, Any] = {
    "clip": lambda: transformers.CLIPModel(CLIP),
    "siglip": lambda: transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**WIDE)),
    "dino": lambda: transformers.Dinov2WithRegistersModel(transformers.Dinov2WithRegistersConfig(**TOWER)),
    "dino3": lambda: transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**WIDE, num_register_tokens=2)),
    "convnext": lambda: transformers.ConvNextModel(transformers.ConvNextConfig(**STAGES)),
}
CHANGES: dict[str, dict[str, Any]] = {
    "clip": {"feature_layer": -2},
    "dino": {"image_size": 48, "grid": 4},
    "convnext": {"feature_stages": (0, 1), "grid": 8, "pooled_norm_eps": 1e-12},
    "siglip": {"pooling": "none"},
}
"""What the recipe has otherwise than from_config gives: the features, larger images than the part's."""


def save(theirs: Any, folder: Path) -> Any:
    torch.manual_seed(0)
    with torch.no_grad():
        for tensor in theirs.parameters():
            # Weights that are all 0 or 1 at first (norms, biases) would hide a swapped pair.
            tensor.add_(0.1 * torch.randn_like(tensor))
    theirs.eval().save_pretrained(folder)
    return theirs


class Parts:
    """Directories, what transformers has in them, and recipes of the models that they make up."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.theirs = {name: save(make(), folder / name) for name, make in TOWERS.items()}
        fields = {"llama": llama.to_config(LLAMA, "float32")}
        fields["longcat"] = longcat.to_config(LONGCAT, MOE, "float32")
        for name, config in fields.items():
            kind = config.pop("architectures")[0]
            made = transformers.AutoConfig.for_model(**config)
            self.theirs[name] = save(getattr(transformers, kind)(made), folder / name)
        self.tokenizer = folder / "llama/tokenizer.json"
        train_tokenizer(["how many zebras ?"], 300).save(str(self.tokenizer))
        encoders = []
        for name in TOWERS:
            config = json.loads((folder / name / "config.json").read_text())
            if name == "clip":
                config = {"model_type": "clip_vision_model", **config["vision_config"]}
            encoders.append(dataclasses.replace(vision.from_config(config, name, name), **CHANGES.get(name, {})))
        self.encoders = tuple(encoders)

    def __getitem__(self, name: str) -> Path:
        return self.folder / name

    def encoder(self, name: str) -> Any:
        return next(encoder for encoder in self.encoders if encoder.name == name)

    def recipe(self, *names: str, backbone: Any = LLAMA, connector: Any = SVA, **changes: Any) -> Recipe:
        moe = MOE if isinstance(backbone, tables.Longcat) else None
        encoders = tuple(self.encoder(name) for name in names)
        model = Model(backbone=backbone, moe=moe, encoders=encoders, connector=connector)
        return dataclasses.replace(exporting.RECIPE, model=model, **changes)

    def given(self, *names: str) -> list[tuple[str, Path]]:
        return [(f"encoders.{name}", self[name]) for name in names]
