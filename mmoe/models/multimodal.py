"""Encoders, connector and backbone put together from a recipe: images become rows that replace <image> embeddings."""

from typing import Any

import torch
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from mmoe.layers.config import LongcatConfig, make_config
from mmoe.models.backbones.longcat import LongcatModel
from mmoe.models.connectors.sva import Connector
from mmoe.models.encoders import build_encoder
from mmoe.recipe.schema import Recipe
from mmoe.recipe.tokens import IMAGE


class MultimodalModel(MegatronModule):
    """A batch (docs/architecture.md) in, losses or logits out."""

    model_type = ModelType.encoder_or_decoder

    def __init__(self, recipe: Recipe, config: LongcatConfig) -> None:
        super().__init__(config)
        shape = recipe.model
        self.encoders = torch.nn.ModuleDict({encoder.name: build_encoder(encoder) for encoder in shape.encoders})
        self.connector = None
        if shape.connector is not None:
            parts: list[Any] = list(self.encoders.values())
            self.connector = Connector(
                shape.connector, [part.channels for part in parts], [part.grid for part in parts], config.hidden_size
            )
        self.language = LongcatModel(config)

    def set_input_tensor(self, input_tensor: list[Any]) -> None:
        """Called by the pipeline schedule with the previous stage's output; None on the first stage."""
        self.language.decoder.set_input_tensor(input_tensor[0])

    def _splice(self, tokens: Tensor, images: Tensor) -> Tensor:
        """Token embeddings [s, b, D] with the connector's rows in the <image> places, in order over the batch."""
        hidden = self.language.embed(tokens)
        if self.connector is None or images.size(0) == 0:
            return hidden
        rows = self.connector([encoder(images.to(hidden.dtype)) for encoder in self.encoders.values()])
        places = tokens == IMAGE
        if int(places.sum()) != rows.size(0) * rows.size(1):
            raise ValueError(f"{int(places.sum())} <image> tokens for {tuple(rows.shape[:2])} image rows")
        by_pack = hidden.transpose(0, 1)
        by_pack = by_pack.masked_scatter(places.unsqueeze(-1), rows.to(hidden.dtype))
        return by_pack.transpose(0, 1).contiguous()

    def hidden(self, batch: dict[str, Any]) -> Tensor:
        """The backbone's output behind the final norm, [s, b, D]."""
        return self.language(
            self._splice(batch["tokens"], batch["images"]),
            batch["position"],
            batch["document"],
            batch["branch"],
            batch["loss_mask"].sum(),
        )

    def forward(self, batch: dict[str, Any]) -> Tensor:
        """Cross-entropy, fp32 [n], of the n positions with loss_mask 1, in the order of the flattened [b, s]."""
        places = batch["loss_mask"].bool()
        hidden = self.hidden(batch).transpose(0, 1)[places]
        return self.language.losses(hidden, batch["labels"][places])

    def logits(self, batch: dict[str, Any]) -> Tensor:
        """fp32 [b, s, V]."""
        return self.language.logits(self.hidden(batch)).transpose(0, 1)


def build(recipe: Recipe) -> MultimodalModel:
    """The model of ``recipe`` with its first weights, in the recipe's dtype (the routers stay in fp32)."""
    config = make_config(recipe)
    model = MultimodalModel(recipe, config)
    if config.params_dtype != torch.float32:
        model.encoders.to(config.params_dtype)
        if model.connector is not None:
            model.connector.to(config.params_dtype)
    return model
