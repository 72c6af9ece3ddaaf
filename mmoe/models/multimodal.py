"""Encoders, connector and backbone put together from a recipe: images become rows that replace <image> embeddings."""

from typing import Any

import torch
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from mmoe.layers.config import LanguageConfig, make_config
from mmoe.layers.initialise import initialise
from mmoe.models.connectors import MLPConnector, SVAConnector
from mmoe.models.connectors.sampler import Sampler, numbered, samplers
from mmoe.models.connectors.sva import Seen
from mmoe.models.encoders_parallel import Encoders, shard
from mmoe.models.language import LanguageModel
from mmoe.models.vision import build_vision
from mmoe.parallel import engine
from mmoe.parallel.collectives import sum_gradient
from mmoe.recipe.model import SVA
from mmoe.recipe.schema import Recipe


class MultimodalModel(MegatronModule):
    """A batch (docs/architecture.md) in, losses or logits out; or one pipeline stage of it, hidden states out.

    The encoders and the connector stand on the first stage. Its tensor- and context-parallel ranks encode the same
    images, tensor-parallel ones with a part of a ViT's heads each: context-parallel ones put in the rows of their own
    part of the packs, and gradients add up.
    """

    model_type = ModelType.encoder_or_decoder

    def __init__(self, recipe: Recipe, config: LanguageConfig, stage: int | None = None) -> None:
        super().__init__(config)
        self.vp_stage = stage
        # Read by Megatron's schedule and by its reduction of shared embeddings' gradients, of which there are none.
        self.pre_process, self.post_process = engine.is_first_stage(stage), engine.is_last_stage(stage)
        self.share_embeddings_and_output_weights = False
        self.shape = shape = recipe.model
        self.encoders, self.connector = Encoders(), None
        if self.pre_process:
            for name, module in build_vision(shape):
                if isinstance(module, MLPConnector | SVAConnector):
                    self.connector = module
                else:
                    self.encoders[name.removeprefix("encoders.")] = module
            if self.connector is not None:
                for parameter in self.connector.inside.parameters() if self.connector.inside else ():
                    # Sequence-parallel ranks have queries of their own: their gradients are summed.
                    setattr(parameter, "sequence_parallel", config.sequence_parallel)
            for encoder in self.encoders.values():
                shard(encoder)
        self.language = LanguageModel(config, stage)
        initialise(self, recipe)

    def set_input_tensor(self, input_tensor: list[Any]) -> None:
        """Called by the pipeline schedule with the previous stage's output; None on the first stage."""
        self.language.decoder.set_input_tensor(input_tensor[0])

    def _features(self, batch: dict[str, Any], dtype: torch.dtype) -> list[list[Tensor]]:
        """Every encoder's feature maps: those that the batch brings, or made of its images."""
        given, sizes = batch.get("features", {}), {encoder.name: encoder.image_size for encoder in self.shape.encoders}
        return [
            given[name] if name in given else encoder(batch["images"][sizes[name]].to(dtype))
            for name, encoder in self.encoders.items()
        ]

    def _splice(self, tokens: Tensor, places: Tensor, rows: Tensor | None) -> Tensor:
        """Embeddings [s / context ranks, b, D] with the connector's ``rows`` [n, tokens of an image, D] in the <image>
        ``places``, in order over the batch; ``tokens`` are whole packs, int64 [b, s]."""
        mine = self.language.mine(tokens.size(1), tokens.device)
        hidden = self.language.embed(tokens[:, mine])
        if rows is None:
            return hidden
        rows = rows.flatten(0, 1).to(hidden.dtype)
        if mine.numel() < tokens.size(1):
            row_of_place = numbered(places)
            places = places[:, mine]
            rows = rows[row_of_place[:, mine][places]]
        by_pack = hidden.transpose(0, 1).masked_scatter(places.unsqueeze(-1), rows)
        return by_pack.transpose(0, 1).contiguous()

    def hidden(self, batch: dict[str, Any]) -> Tensor:
        """This stage's output (:meth:`LanguageModel.forward`)."""
        if not self.pre_process:
            return self.language(None, batch)
        tokens, connector = batch["tokens"], self.connector
        # Behind a pack's last document stands 0, which may be the number of <image>.
        places = (tokens == self.shape.special.image) & (batch["document"] > 0)
        if connector is None or not (images := len(batch["original_sizes"])):
            return self.language(self._splice(tokens, places, None), batch)
        features = self._features(batch, self.config.params_dtype)
        each, there = connector.tokens, int(places.sum())
        if there != images * each:
            raise ValueError(f"{there} <image> tokens for {images} images of {each}")
        if not isinstance(connector, SVAConnector):
            return self.language(self._splice(tokens, places, connector(features, batch["original_sizes"])), batch)
        seen = connector.see(features, batch["original_sizes"])
        hidden = self._splice(tokens, places, connector.rows(seen))
        return self.language(hidden, batch, self._samplers(connector, seen, places))

    def _samplers(self, connector: SVAConnector, seen: Seen, places: Tensor) -> dict[int, Sampler]:
        """The connector's layers within the language model, by the layer that they stand behind."""
        if connector.inside is None:
            return {}
        shape = self.shape.connector
        assert isinstance(shape, SVA)
        assert shape.inside is not None
        if self.config.sequence_parallel:
            # Each tensor-parallel rank asks for its part of the sequence.
            seen = seen.map(lambda tensor: sum_gradient(tensor, engine.tensor_group()))
        numbers = torch.where(places, numbered(places), -1)[:, self.language.held(places.size(1), places.device)].t()
        inside = shape.inside
        return samplers(connector.inside, inside.start, inside.stride, seen, numbers, connector.grid, connector.tokens)

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


def build(recipe: Recipe, stage: int | None = None, config: LanguageConfig | None = None) -> MultimodalModel:
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
