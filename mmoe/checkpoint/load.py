"""Reads checkpoints: to go on training, to evaluate on one process, or to convert."""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from mmoe import reading
from mmoe.checkpoint import layout
from mmoe.checkpoint.shards import Shards
from mmoe.data.batch import to_device
from mmoe.data.tokenizer import Vocabulary, load_tokenizer
from mmoe.errors import UserError
from mmoe.layers.router import CONTROLLER_STATE
from mmoe.models.encoders.vit import ViT, resize_position
from mmoe.models.multimodal import MultimodalModel, build
from mmoe.parallel import calls, cpu_platform, engine, state
from mmoe.parallel.state import CheckpointingException
from mmoe.recipe.load import load_recipe
from mmoe.recipe.model import ViT as ViTTable
from mmoe.recipe.schema import Parallel, Recipe


@calls.phase("loading a checkpoint")
def resume(checkpoint: Path, models: Sequence[Any], optimizer: Any) -> dict:
    """Fills the pipeline chunks ``models``, ``optimizer`` and the random states; returns the progress beside them."""
    state.load(checkpoint / "state", models, optimizer)
    return reading.json_object((checkpoint / "progress.json").read_bytes())


@calls.phase("taking over a stage's weights")
def hand_over(checkpoint: Path, models: Sequence[Any]) -> None:
    """Fills the pipeline chunks ``models`` with the weights, and what the controller remembers, of ``checkpoint``.

    A ViT's learned positions are interpolated where its images have another size than there.

    Raises:
        UserError: they are weights of a model with other tensors.
    """
    before = {encoder.name: encoder for encoder in load_recipe(str(checkpoint / "recipe.toml")).model.encoders}
    resized = {}
    for model in models:
        for name, encoder in model.encoders.items():
            had = before.get(name)
            if not isinstance(encoder, ViT) or encoder.position is None or not isinstance(had, ViTTable):
                continue
            if had.image_size != encoder.config.image_size:
                rows = had.class_token + (had.image_size // had.patch_size) ** 2
                fit = partial(resize_position, config=encoder.config)
                resized[f"encoders.{name}.position"] = (rows, had.width), fit
    try:
        state.load(checkpoint / "state", models, None, resized)
    except (CheckpointException, CheckpointingException) as error:
        # Its files are whole: what does not fit is the model.
        what = f"its weights are those of another model: {str(error).strip().splitlines()[-1]}"
        fix = "its recipe.toml says of which; begin with a checkpoint of this one"
        raise UserError(what, str(checkpoint), fix) from None


class Loaded:
    """A trained model on one process, whatever layout it was trained at; evaluation mode, no gradients."""

    def __init__(self, recipe: Recipe, network: MultimodalModel, tokenizer: Path) -> None:
        self.recipe = recipe
        self.network = network.eval()
        self.tokenizer_path = tokenizer
        self.image_tokens, self.image_sizes = recipe.model.image_tokens, recipe.model.image_sizes

    @cached_property
    def tokenizer(self) -> Vocabulary:
        """Read only where texts are: an imported model may bring one of another kind, and converts all the same.

        Raises:
            UserError: see :func:`mmoe.data.tokenizer.load_tokenizer`.
        """
        return load_tokenizer(self.tokenizer_path, self.recipe.model.special, images=self.image_tokens > 0)

    @torch.no_grad()
    def forward_batch(self, batch: dict[str, Any]) -> Tensor:
        """Logits fp32 [b, s, V] of a batch as docs/architecture.md describes it."""
        return self.network.logits(to_device(batch, cpu_platform.device()))

    @torch.no_grad()
    def losses(self, batch: dict[str, Any]) -> Tensor:
        """Cross-entropy fp32 [n] of the n places of a batch where loss_mask is 1, in the order of the flattened batch:
        what a training step adds up."""
        return self.network(to_device(batch, cpu_platform.device()))

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


def begin(recipe: Recipe, checkpoint: Path | None) -> Loaded:
    """The model that a run of ``recipe``, one without stages, begins with, on one process.

    Args:
        checkpoint: whose weights are handed over to it (:func:`hand_over`); None: the recipe's first ones.

    Raises:
        UserError: a file is missing or altered, or the weights are those of another model.
    """
    if checkpoint is not None:
        layout.verify(checkpoint)
    with torch.random.fork_rng():  # the caller's random numbers stay as they were
        engine.start(Parallel(), recipe.train.seed, alone=True)
        network = build(_plain(recipe)).to(cpu_platform.device())
        if checkpoint is not None:
            hand_over(checkpoint, [network])
    return Loaded(recipe, network, Path(recipe.data.root) / recipe.data.tokenizer)


def state_dict(path: str | Path) -> tuple[Recipe, Shards, Path]:
    """Recipe, weights (:func:`weights`), which are read when they are asked for, and the tokenizer's path.

    Of the files with tensors the checksums are left to :func:`mmoe.checkpoint.layout.verify`.

    Raises:
        UserError: a file is missing or altered, or the weights are not the recipe's.
    """
    checkpoint = Path(path)
    layout.verify(checkpoint, only=lambda name: not layout.is_tensors(name))
    recipe = load_recipe(str(checkpoint / "recipe.toml"), [])
    places = {name: place for name, place in state.places(blank(recipe)).items() if _is_weight(name)}
    known = hashlib.sha256(repr(layout.manifest(checkpoint)).encode()).hexdigest()
    return recipe, Shards(checkpoint / "state", places, known), checkpoint / "tokenizer.json"


def blank(recipe: Recipe) -> MultimodalModel:
    """The model on one process, without memory for its tensors."""
    with torch.random.fork_rng():  # the caller's random numbers stay as they were
        engine.start(Parallel(), recipe.train.seed, alone=True)
        with torch.device("meta"):
            return build(_plain(recipe))


def _tensors(network: MultimodalModel) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in network.state_dict().items() if torch.is_tensor(tensor)}


def weights(network: MultimodalModel) -> dict[str, Tensor]:
    """Every weight under its name (docs/conversion.md): the state without what the controller remembers."""
    return {name: tensor for name, tensor in _tensors(network).items() if _is_weight(name)}


def _is_weight(name: str) -> bool:
    return not name.endswith(CONTROLLER_STATE)


def fill(network: MultimodalModel, tensors: Mapping[str, Tensor]) -> None:
    """Gives ``network`` all of its :func:`weights`; the controller's memory stays as it is."""
    kept = {name: tensor for name, tensor in _tensors(network).items() if not _is_weight(name)}
    network.load_state_dict(kept | dict(tensors))
