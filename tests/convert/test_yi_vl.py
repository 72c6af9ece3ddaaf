"""Yi-VL against parts that transformers and torch have: CLIP's tower, the released projector's sequence, a Llama."""

import dataclasses
from pathlib import Path

import exporting
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

from mmoe.checkpoint.load import Loaded, weights
from mmoe.convert import read_hf, to_hf
from mmoe.convert.families import vision
from mmoe.data.tokenizer import train_tokenizer
from mmoe.models.encoders.vit import resize_position
from mmoe.models.multimodal import build
from mmoe.recipe import load_recipe
from mmoe.recipe.model import Llama, Model, ViT
from mmoe.recipe.schema import Recipe

POSITION = "encoders.open_clip.position"
IMAGES = 2


def recipe_of(stage: int) -> Recipe:
    """A stage of ``yi_vl_tiny``, narrower."""
    model = load_recipe("yi_vl_tiny").stages[stage].model
    (encoder,) = model.encoders
    assert isinstance(model.backbone, Llama)
    assert isinstance(encoder, ViT)
    narrow = {"vocab_size": 300, "hidden_size": 48, "heads": 4, "head_dim": 12, "ffn_hidden_size": 64}
    backbone = dataclasses.replace(model.backbone, **narrow)
    encoders = (dataclasses.replace(encoder, width=32, layers=3),)
    data = dataclasses.replace(exporting.RECIPE.data, sequence_length=512)
    shape = Model(backbone=backbone, encoders=encoders, connector=model.connector)
    return dataclasses.replace(exporting.RECIPE, model=shape, data=data)


class Pair:
    """A random model of the first stage, or the same handed over to the second."""

    def __init__(self, stage: int, folder: Path) -> None:
        tokenizer = folder / "tokenizer.json"
        train_tokenizer(["how many zebras ?"], 300).save(str(tokenizer))
        first, recipe = recipe_of(0), recipe_of(stage)
        small, network = exporting.scattered(first), build(recipe)
        (encoder,) = recipe.model.encoders
        assert isinstance(encoder, ViT)
        state = dict(small.state_dict())
        self.position = state[POSITION]
        network.load_state_dict(state | {POSITION: resize_position(self.position, encoder)})
        self.ours, self.encoder, self.weights = Loaded(recipe, network, tokenizer), encoder, dict(weights(network))
        to_hf(folder, folder / "hf", form="llava_llama", load=lambda _: (recipe, self.weights, tokenizer))
        self.language = transformers.LlamaForCausalLM.from_pretrained(folder / "hf/language").eval()
        tower = {name.removeprefix("encoders.open_clip."): part for name, part in state.items() if "open_clip" in name}
        (smaller,) = first.model.encoders
        assert isinstance(smaller, ViT)
        fields = vision.to_config(smaller)
        config = transformers.CLIPVisionConfig(
            **{k: v for k, v in fields.items() if k not in ("architectures", "model_type")}
        )
        self.tower = transformers.CLIPVisionModel(config).eval()
        self.tower.load_state_dict(dict(vision.table(smaller).write(tower)))
        wide, d = smaller.width, recipe.model.backbone.hidden_size
        # 01-ai/Yi, VL/llava/model/multimodal_projector/builder.py: mlp2x_gelu_Norm
        self.projector = nn.Sequential(nn.Linear(wide, d), nn.LayerNorm(d), nn.GELU(), nn.Linear(d, d), nn.LayerNorm(d))
        parts = {0: "first", 1: "norms.0", 3: "further.0", 4: "norms.1"}
        self.projector.load_state_dict(
            {
                f"{i}.{part}": state[f"connector.{name}.{part}"]
                for i, name in parts.items()
                for part in ("weight", "bias")
            }
        )
        self.pixels = torch.randn(
            IMAGES, 3, encoder.image_size, encoder.image_size, generator=torch.Generator().manual_seed(2)
        )
        picture = [3] * self.ours.image_tokens
        self.ids = torch.tensor([[1, *picture, 40, 50], [1, *picture, 60, 70]])

    @torch.no_grad()
    def theirs(self) -> Tensor:
        """transformers interpolates the smaller picture's positions itself."""
        mean, std = (torch.tensor(value)[:, None, None] for value in (self.encoder.mean, self.encoder.std))
        seen = self.tower(
            (self.pixels / 4 + 0.5 - mean) / std, output_hidden_states=True, interpolate_pos_encoding=True
        )
        rows = self.projector(seen.hidden_states[-2][:, 1:])
        embeds = self.language.get_input_embeddings()(self.ids)
        embeds[self.ids == 3] = rows.flatten(0, 1)
        return self.language(inputs_embeds=embeds).logits

    def difference(self) -> float:
        return float((self.ours.logits(self.ids, self.pixels) - self.theirs()).abs().max())


@pytest.mark.parametrize("stage", [0, 1], ids=["64 pixels", "128 pixels"])
def test_the_released_layout(stage, tmp_path):
    """The exported projector is the released sequence's state, and all comes back."""
    pair = Pair(stage, tmp_path)
    front, stored = "model.mm_projector.", load_file(tmp_path / "hf/model.safetensors")
    there = {name.removeprefix(front): part for name, part in stored.items() if name.startswith(front)}
    here = pair.projector.state_dict()
    assert there.keys() == here.keys()
    assert all(torch.equal(there[name], here[name]) for name in here)
    imported = read_hf(tmp_path / "hf")
    assert imported.recipe == pair.ours.recipe
    assert imported.state.keys() == pair.weights.keys()
    assert all(torch.equal(imported.state[name], part) for name, part in pair.weights.items())


@pytest.mark.parametrize("stage", [0, 1], ids=["64 pixels", "128 pixels"])
def test_logits(stage, tmp_path):
    pair = Pair(stage, tmp_path)
    assert pair.theirs().abs().max() > 0.1
    assert pair.difference() < 1e-5
    pair.pixels = pair.pixels.flip(0)
    wanted = pair.theirs()
    pair.pixels = pair.pixels.flip(0)
    assert (pair.theirs() - wanted).abs().max() > 1e-3
