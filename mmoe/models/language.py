"""The language model: embedding, layers of the recipe's kind, final norm, output layer."""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.tensor_parallel import ColumnParallelLinear, vocab_parallel_cross_entropy
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlock,
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from torch import Tensor

from mmoe.layers.config import LanguageConfig, LongcatConfig
from mmoe.layers.dense import DenseLayer
from mmoe.layers.mtp import MTPLayer, look_ahead
from mmoe.layers.packed import Packed, additive, key_places, query_places, rotary, visibility
from mmoe.layers.providers import Norm
from mmoe.layers.scmoe import ScMoELayer
from mmoe.ops.hidden_z_loss import hidden_z_loss
from mmoe.parallel import engine
from mmoe.recipe.model import Llama, Longcat


def _is_trained(module: torch.nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


class LanguageModel(LanguageModule):
    """The layers of one pipeline stage, with the embedding on the first and the output layer on the last.

    Legend: b packs, s tokens, t those that this rank holds (context and sequence parallelism cut packs into parts), D
    hidden size, V vocabulary, n positions that carry loss.
    """

    def __init__(self, config: LanguageConfig, stage: int | None = None) -> None:
        super().__init__(config)
        self.config: LanguageConfig
        self.here = engine.ranks()
        self.pre_process, self.post_process = engine.is_first_stage(stage), engine.is_last_stage(stage)
        shape = config.backbone
        self.share_embeddings_and_output_weights = isinstance(shape, Llama) and shape.tied_embeddings
        if self.pre_process:
            # Images take the places of embeddings before the sequence is cut.
            self.embedding = LanguageModelEmbedding(
                config,
                shape.vocab_size,
                shape.max_position,
                position_embedding_type="none",
                scatter_to_sequence_parallel=False,
            )
        norm: Any = Norm
        layers = get_num_layers_to_build(config, stage, self.here.pipeline_rank)
        layer = ModuleSpec(module=ScMoELayer if isinstance(config, LongcatConfig) else DenseLayer)
        block = TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=norm)
        self.decoder = TransformerBlock(
            config, block, pre_process=self.pre_process, post_process=self.post_process, vp_stage=stage
        )
        if self.post_process:
            # The input is whole by then, and its gradient is summed where it was gathered.
            whole = dataclasses.replace(config, sequence_parallel=False)
            self.output_layer = ColumnParallelLinear(
                shape.hidden_size,
                shape.vocab_size,
                config=whole,
                init_method=config.init_method,  # type: ignore[arg-type]
                bias=False,
                disable_grad_reduce=config.sequence_parallel,
                # On one pipeline stage the tied weight is the embedding's own.
                skip_weight_param_allocation=self.share_embeddings_and_output_weights and self.pre_process,
            )
            self.mtp = MTPLayer(config) if isinstance(config, LongcatConfig) and config.mtp else None
        self.setup_embeddings_and_output_layer()
        self.register_buffer("auxiliary", torch.zeros(3, dtype=torch.float64), persistent=False)
        self.auxiliary: Tensor

    def mine(self, size: int, device: torch.device) -> Tensor:
        """int64 [size / context-parallel ranks]: this rank's places in a pack of ``size`` tokens."""
        return query_places(size, self.here.context_size, self.here.context_rank, device)

    def held(self, size: int, device: torch.device) -> Tensor:
        """int64 [t]: this rank's places in a pack of ``size`` tokens within the layers, where sequence parallelism cuts
        :meth:`mine` once more."""
        places = self.mine(size, device)
        return (
            places.view(self.here.tensor_size, -1)[self.here.tensor_rank] if self.config.sequence_parallel else places
        )

    def embed(self, tokens: Tensor) -> Tensor:
        """int64 [b, s] → [s, b, D]."""
        return self.embedding(input_ids=tokens, position_ids=None)

    def forward(
        self,
        hidden: Tensor | None,
        batch: dict[str, Any],
        behind: Mapping[int, Callable[[Tensor], Tensor]] | None = None,
    ) -> Tensor:
        """One stage of the layers.

        hidden: embeddings [s / context ranks, b, D] on the first stage; None on the others, which have the stage before
        them as input. batch: whole packs (docs/architecture.md). Returns [t, b, D] to the next stage; on the last one
        behind the final norm, [s / context ranks, b, D]. ``behind``: what the output [t, b, D] of a layer goes through
        before the next one, by the layer's number from 0. In training the last stage attaches the auxiliary losses of
        what is not frozen; a frozen layer of multi-token prediction does not run.
        """
        if hidden is not None and self.config.recompute != "none" and torch.is_grad_enabled():
            # What is computed again is a function of its input alone: without a gradient there (embedding and encoders
            # frozen, or a batch of text) its weights would have none either, in silence.
            hidden = hidden if hidden.requires_grad else hidden.detach().requires_grad_()
        if hidden is not None and self.config.sequence_parallel:
            hidden = scatter_to_sequence_parallel_region(hidden)
        packed = self._packed(batch)
        attaches = self.post_process and self.training and torch.is_grad_enabled()
        with contextlib.ExitStack() as stack:
            if attaches and self.config.backbone.hidden_z_coefficient:
                norm: Any = self.decoder.final_layernorm
                handle = norm.register_forward_pre_hook(lambda _, inputs: self._penalised(inputs[0], batch))
                stack.callback(handle.remove)
            for number, function in (behind or {}).items():
                layer: Any = self.decoder.layers[number]
                handle = layer.register_forward_hook(lambda _, __, out, function=function: (function(out[0]), *out[1:]))
                stack.callback(handle.remove)
            hidden_out: Tensor = self.decoder(hidden_states=hidden, attention_mask=None, packed_seq_params=packed)
        if not self.post_process:
            return hidden_out
        looks_ahead = attaches and self.mtp is not None and _is_trained(self.mtp)
        ahead = self._loss_ahead(hidden_out, packed, batch) if looks_ahead else None
        if self.config.sequence_parallel:
            hidden_out = gather_from_sequence_parallel_region(hidden_out)
        return hidden_out if ahead is None else engine.attach_loss(hidden_out, ahead)

    def _penalised(self, z: Tensor, batch: dict[str, Any]) -> Tensor:
        """z [t, b, D] with the hidden z-loss of this rank's tokens attached, as a part of the micro-batch's mean; it is
        counted alone where all layers that make z are frozen."""
        sequence, valid = self.config.sequence_parallel, batch["document"] > 0
        mine = valid[:, self.held(valid.size(1), z.device)].t()
        loss = hidden_z_loss(z.flatten(0, 1), self.config.backbone.hidden_z_coefficient, valid=mine.reshape(-1))
        weighted = loss * mine.sum() / valid.sum().clamp(min=1) * batch["loss_mask"].sum()
        if sequence or self.here.tensor_rank == 0:
            self.auxiliary[0] += weighted.detach()
        return engine.attach_loss(z, weighted) if _is_trained(self.decoder.layers) else z

    def _loss_ahead(self, hidden: Tensor, packed: Packed, batch: dict[str, Any]) -> Tensor:
        """This rank's part of the weighted multi-token-prediction loss, a mean over the micro-batch's tokens that have
        one, times loss tokens."""
        assert self.mtp is not None
        assert self.config.mtp is not None
        mine, ahead = self.mine(batch["tokens"].size(1), hidden.device), look_ahead(batch)
        out = self.mtp(hidden, ahead.tokens[:, mine], ahead.follows[:, mine], packed)
        counts = ahead.counts[:, mine]
        losses_n = self.losses(out.transpose(0, 1)[counts], ahead.labels[:, mine][counts])
        if self.here.tensor_rank == 0:
            self.auxiliary[1:] += self.auxiliary.new_tensor([losses_n.detach().double().sum(), losses_n.numel()])
        mean = losses_n.sum() / ahead.counts.sum().clamp(min=1)
        return self.config.mtp.loss_weight * mean * packed.loss_tokens

    def take_auxiliary(self) -> Tensor:
        """fp64 [3], of this rank's tokens since the last call: hidden z-loss × loss tokens, the sum of the losses of
        multi-token prediction, and how many they are. Summed over all ranks they are the global batch's."""
        taken = self.auxiliary.clone()
        self.auxiliary.zero_()
        return taken

    def _packed(self, batch: dict[str, Any]) -> Packed:
        position, document, branch = batch["position"], batch["document"], batch["branch"]
        shape, here, size = self.config.backbone, self.here, position.size(1)
        queries = self.mine(size, position.device)
        # MLA gathers its latents over the context-parallel ranks before the tensor-parallel ones put their parts
        # together, attention with ordinary keys after that.
        latent = isinstance(shape, Longcat)
        shards = here.tensor_size if self.config.sequence_parallel and latent else 1
        keys = key_places(size, here.context_size, shards, position.device)
        dtype = self.config.params_dtype
        cos, sin = rotary(position, shape.qk_rope_head_dim if latent else shape.head_dim, shape.rope_theta, dtype)
        routed = queries.view(here.tensor_size, -1)[here.tensor_rank]
        return Packed(
            mask=additive(visibility(document, branch, queries, keys), dtype),
            rotary_q=(cos[queries], sin[queries]),
            rotary_k=(cos[keys], sin[keys]),
            valid=(document[:, routed] > 0).t(),
            loss_tokens=batch["loss_mask"].sum(),
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """[…, D] → fp32 […, V / tensor-parallel ranks]."""
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        return self.output_layer(hidden, weight)[0].float()

    def losses(self, hidden_nD: Tensor, labels_n: Tensor) -> Tensor:
        """Cross-entropy in nats, fp32 [n]."""
        return vocab_parallel_cross_entropy(self.logits(hidden_nD.unsqueeze(1)), labels_n.unsqueeze(1)).squeeze(1)
