"""Encoders, connector and backbone put together from a recipe: images become rows that replace <image> embeddings."""

from typing import Any

import torch
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from mmoe.layers.config import LongcatConfig, make_config
from mmoe.layers.initialise import initialise
from mmoe.models.backbones.longcat import LongcatModel
from mmoe.models.connectors.sva import Connector
from mmoe.models.encoders import build_encoder
from mmoe.parallel import engine
from mmoe.recipe.schema import Recipe
from mmoe.recipe.tokens import IMAGE


class MultimodalModel(MegatronModule):
    """A batch (docs/architecture.md) in, losses or logits out; or one pipeline stage of it, hidden states out.

    The encoders and the connector stand on the first stage. Its tensor- and context-parallel ranks encode the same
    images: context-parallel ones put in the rows of their own part of the packs, and gradients add up.
    """

    model_type = ModelType.encoder_or_decoder

    def __init__(self, recipe: Recipe, config: LongcatConfig, stage: int | None = None) -> None:
        super().__init__(config)
        self.vp_stage = stage
        # Read by Megatron's schedule and by its reduction of shared embeddings' gradients, of which there are none.
        self.pre_process, self.post_process = engine.is_first_stage(stage), engine.is_last_stage(stage)
        self.share_embeddings_and_output_weights = False
        shape = recipe.model
        self.encoders, self.connector = torch.nn.ModuleDict(), None
        if self.pre_process:
            self.encoders.update({encoder.name: build_encoder(encoder) for encoder in shape.encoders})
            if shape.connector is not None:
                parts: list[Any] = list(self.encoders.values())
                channels, grids = [part.channels for part in parts], [part.grid for part in parts]
                self.connector = Connector(shape.connector, channels, grids, config.hidden_size)
        self.language = LongcatModel(config, stage)
        initialise(self, recipe)

    def set_input_tensor(self, input_tensor: list[Any]) -> None:
        """Called by the pipeline schedule with the previous stage's output; None on the first stage."""
        self.language.decoder.set_input_tensor(input_tensor[0])

    def _splice(self, tokens: Tensor, images: Tensor) -> Tensor:
        """Embeddings [s / context ranks, b, D] with the connector's rows in the <image> places, in order over the
        batch; ``tokens`` are whole packs, int64 [b, s]."""
        mine, places = self.language.mine(tokens.size(1), tokens.device), tokens == IMAGE
        hidden = self.language.embed(tokens[:, mine])
        if self.connector is None or images.size(0) == 0:
            return hidden
        rows = self.connector([encoder(images.to(hidden.dtype)) for encoder in self.encoders.values()])
        if int(places.sum()) != rows.size(0) * rows.size(1):
            raise ValueError(f"{int(places.sum())} <image> tokens for {tuple(rows.shape[:2])} image rows")
        rows = rows.flatten(0, 1).to(hidden.dtype)
        if mine.numel() < tokens.size(1):
            row_of_place = places.flatten().cumsum(0).view_as(places) - 1
            places = places[:, mine]
            rows = rows[row_of_place[:, mine][places]]
        by_pack = hidden.transpose(0, 1).masked_scatter(places.unsqueeze(-1), rows)
        return by_pack.transpose(0, 1).contiguous()

    def hidden(self, batch: dict[str, Any]) -> Tensor:
        """This stage's output (:meth:`LongcatModel.forward`)."""
        hidden = self._splice(batch["tokens"], batch["images"]) if self.pre_process else None
        return self.language(hidden, batch)

    def forward(self, batch: dict[str, Any]) -> Tensor:
        """Cross-entropy, fp32 [n], of this rank's n positions with loss_mask 1, in the order of the flattened batch;
        before the last pipeline stage the hidden states for the next one, [t, b, D]."""
        hidden = self.hidden(batch)
        if not self.post_process:
            return hidden
        mine = self.language.mine(batch["tokens"].size(1), hidden.device)
        places = batch["loss_mask"][:, mine].bool()
        return self.language.losses(hidden.transpose(0, 1)[places], batch["labels"][:, mine][places])

    def logits(self, batch: dict[str, Any]) -> Tensor:
        """fp32 [b, s, V], on a single process."""
        return self.language.logits(self.hidden(batch)).transpose(0, 1)


def build(recipe: Recipe, stage: int | None = None, config: LongcatConfig | None = None) -> MultimodalModel:
    """The model of ``recipe``, or this rank's (virtual) pipeline ``stage`` of it, with its first weights, in the
    recipe's dtype (the routers stay in fp32)."""
    config = config or make_config(recipe)
    model = MultimodalModel(recipe, config, stage)
    if config.params_dtype != torch.float32:
        model.encoders.to(config.params_dtype)
        if model.connector is not None:
            model.connector.to(config.params_dtype)
    return model


def build_stages(recipe: Recipe) -> list[MultimodalModel]:
    """The pipeline stages that this rank trains: one, or several with virtual pipelining, on one configuration, in
    which Megatron's schedule finds the functions that a training step sets."""
    config = make_config(recipe)
    return [build(recipe, stage, config) for stage in engine.stages()]
