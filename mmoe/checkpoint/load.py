"""Reads checkpoints: to go on training, to evaluate on one process, or to convert."""

import dataclasses
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from mmoe import reading
from mmoe.checkpoint import layout
from mmoe.data.batch import to_device
from mmoe.data.tokenizer import load_tokenizer
from mmoe.layers.router import CONTROLLER_STATE
from mmoe.models.multimodal import MultimodalModel, build
from mmoe.parallel import calls, cpu_platform, engine, state
from mmoe.recipe.load import load_recipe
from mmoe.recipe.schema import Parallel, Recipe


@calls.phase("loading a checkpoint")
def resume(checkpoint: Path, models: Sequence[Any], optimizer: Any) -> dict:
    """Fills the pipeline chunks ``models``, ``optimizer`` and the random states; returns the progress beside them."""
    state.load(checkpoint / "state", models, optimizer)
    return reading.json_object((checkpoint / "progress.json").read_bytes())


class Loaded:
    """A trained model on one process, whatever layout it was trained at; evaluation mode, no gradients."""

    def __init__(self, recipe: Recipe, network: MultimodalModel, tokenizer: Path) -> None:
        self.recipe = recipe
        self.network = network.eval()
        self.tokenizer_path = tokenizer
        self.image_tokens, self.image_sizes = recipe.model.image_tokens, recipe.model.image_sizes

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Read only where texts are: an imported model may bring one that is not ours, and converts all the same.

        Raises:
            UserError: it is not of our kind.
        """
        return load_tokenizer(self.tokenizer_path)

    @torch.no_grad()
    def forward_batch(self, batch: dict[str, Any]) -> Tensor:
        """Logits fp32 [b, s, V] of a batch as docs/architecture.md describes it."""
        return self.network.logits(to_device(batch, cpu_platform.device()))

    def logits(
        self,
        input_ids: Tensor,
        images: Tensor | dict[int, Tensor] | None = None,
        original_sizes: Tensor | None = None,
    ) -> Tensor:
        """Logits fp32 [b, s, V] of plain sequences.

        Args:
            input_ids: int64 [b, s].
            images: fp32 [n, 3, side, side], in the order of the <image> runs; for encoders of several image sizes a
                dict of one such tensor a side.
            original_sizes: int64 [n, 2], the pictures' heights and widths; square, where it is None.
        """
        b, s = input_ids.shape
        if images is None:
            images = {side: torch.zeros(0, 3, side, side) for side in self.image_sizes}
        elif not isinstance(images, dict):
            images = {images.size(-1): images}
        if sorted(images) != sorted(self.image_sizes):
            raise ValueError(f"images of sides {sorted(images)}, the encoders read {sorted(self.image_sizes)}")
        if original_sizes is None:
            largest = max(images, default=0)
            original_sizes = torch.full((len(images.get(largest, ())), 2), largest)
        return self.forward_batch(
            {
                "tokens": input_ids,
                "loss_mask": torch.zeros(b, s),
                "position": torch.arange(s).expand(b, s),
                "document": torch.ones(b, s, dtype=torch.int32),
                "branch": torch.zeros(b, s, dtype=torch.int32),
                "images": images,
                "original_sizes": original_sizes,
            }
        )


def _plain(recipe: Recipe) -> Recipe:
    """The recipe's model on one process, with our own layers and its weights as they are: no quantised GEMMs."""
    precision = dataclasses.replace(recipe.precision, provider="local", fp8="none")
    return dataclasses.replace(recipe, parallel=Parallel(), precision=precision)


def load(path: str | Path) -> Loaded:
    """The model of the checkpoint at ``path``, on one process.

    Raises :class:`mmoe.errors.UserError` where a file is missing or altered.
    """
    checkpoint = Path(path)
    layout.verify(checkpoint)
    recipe = load_recipe(str(checkpoint / "recipe.toml"), [])
    with torch.random.fork_rng():  # the caller's random numbers stay as they were
        engine.start(Parallel(), recipe.train.seed, alone=True)
        network = build(_plain(recipe)).to(cpu_platform.device())
        state.load(checkpoint / "state", [network], None)
    return Loaded(recipe, network, checkpoint / "tokenizer.json")


def state_dict(path: str | Path) -> tuple[Recipe, dict[str, Tensor], Path]:
    """Recipe, weights (:func:`weights`) and the tokenizer's path."""
    loaded = load(path)
    return loaded.recipe, weights(loaded.network), loaded.tokenizer_path


def _tensors(network: MultimodalModel) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in network.state_dict().items() if torch.is_tensor(tensor)}


def weights(network: MultimodalModel) -> dict[str, Tensor]:
    """Every weight under its name (docs/conversion.md): the state without what the controller remembers."""
    return {name: tensor for name, tensor in _tensors(network).items() if not name.endswith(CONTROLLER_STATE)}


def fill(network: MultimodalModel, tensors: dict[str, Tensor]) -> None:
    """Gives ``network`` all of its :func:`weights`; the controller's memory stays as it is."""
    kept = {name: tensor for name, tensor in _tensors(network).items() if name.endswith(CONTROLLER_STATE)}
    network.load_state_dict(kept | tensors)
