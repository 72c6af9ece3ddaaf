"""The LongCat-Flash shaped language model: embedding, ScMoE layers, final norm, untied output layer."""

import dataclasses
from typing import Any

import torch
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.tensor_parallel import ColumnParallelLinear, vocab_parallel_cross_entropy
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.transformer_block import (
    TransformerBlock,
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from torch import Tensor

from mmoe.layers.config import LongcatConfig
from mmoe.layers.packed import Packed, additive, key_places, query_places, rotary, visibility
from mmoe.layers.providers import Norm
from mmoe.layers.scmoe import layer_spec
from mmoe.parallel import engine


class LongcatModel(LanguageModule):
    """The layers of one pipeline stage, with the embedding on the first and the output layer on the last.

    Legend: b packs, s tokens, t those that this rank holds (context and sequence parallelism cut packs into parts), D
    hidden size, V vocabulary, n positions that carry loss.
    """

    def __init__(self, config: LongcatConfig, stage: int | None = None) -> None:
        super().__init__(config)
        self.config: LongcatConfig
        self.here = engine.ranks()
        self.pre_process, self.post_process = engine.is_first_stage(stage), engine.is_last_stage(stage)
        self.share_embeddings_and_output_weights = False
        shape = config.backbone
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
        block = TransformerBlockSubmodules(layer_specs=[layer_spec()] * layers, layer_norm=norm)
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
            )
        self.setup_embeddings_and_output_layer()

    def mine(self, size: int, device: torch.device) -> Tensor:
        """int64 [size / context-parallel ranks]: this rank's places in a pack of ``size`` tokens."""
        return query_places(size, self.here.context_size, self.here.context_rank, device)

    def embed(self, tokens: Tensor) -> Tensor:
        """int64 [b, s] → [s, b, D]."""
        return self.embedding(input_ids=tokens, position_ids=None)

    def forward(
        self, hidden: Tensor | None, position: Tensor, document: Tensor, branch: Tensor, loss_tokens: Tensor
    ) -> Tensor:
        """One stage of the layers.

        hidden: embeddings [s / context ranks, b, D] on the first stage; None on the others, which have the stage before
        them as input. position, document, branch: int [b, s] as in a batch. Returns [t, b, D] to the next stage; on the
        last one behind the final norm, [s / context ranks, b, D].
        """
        if hidden is not None and self.config.sequence_parallel:
            hidden = scatter_to_sequence_parallel_region(hidden)
        packed = self._packed(position, document, branch, loss_tokens)
        hidden_out: Tensor = self.decoder(hidden_states=hidden, attention_mask=None, packed_seq_params=packed)
        if self.post_process and self.config.sequence_parallel:
            return gather_from_sequence_parallel_region(hidden_out)
        return hidden_out

    def _packed(self, position: Tensor, document: Tensor, branch: Tensor, loss_tokens: Tensor) -> Packed:
        shape, here, size = self.config.backbone, self.here, position.size(1)
        queries = self.mine(size, position.device)
        shards = here.tensor_size if self.config.sequence_parallel else 1
        keys = key_places(size, here.context_size, shards, position.device)
        dtype = self.config.params_dtype
        cos, sin = rotary(position, shape.qk_rope_head_dim, shape.rope_theta, dtype)
        routed = queries.view(here.tensor_size, -1)[here.tensor_rank]
        return Packed(
            mask=additive(visibility(document, branch, queries, keys), dtype),
            rotary_q=(cos[queries], sin[queries]),
            rotary_k=(cos[keys], sin[keys]),
            valid=(document[:, routed] > 0).t(),
            loss_tokens=loss_tokens,
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """[…, D] → fp32 […, V / tensor-parallel ranks]."""
        return self.output_layer(hidden)[0].float()

    def losses(self, hidden_nD: Tensor, labels_n: Tensor) -> Tensor:
        """Cross-entropy in nats, fp32 [n]."""
        return vocab_parallel_cross_entropy(self.logits(hidden_nD.unsqueeze(1)), labels_n.unsqueeze(1)).squeeze(1)
