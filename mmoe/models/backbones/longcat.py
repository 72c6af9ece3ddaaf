"""The LongCat-Flash shaped language model: embedding, ScMoE layers, final norm, untied output layer."""

from typing import Any

from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.tensor_parallel import ColumnParallelLinear, vocab_parallel_cross_entropy
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from torch import Tensor

from mmoe.layers.config import LongcatConfig
from mmoe.layers.norms import RMSNorm
from mmoe.layers.packed import Packed, additive, rotary, visibility
from mmoe.layers.scmoe import layer_spec


class LongcatModel(LanguageModule):
    """Legend: b packs, s tokens, D hidden size, V vocabulary, n positions that carry loss."""

    def __init__(self, config: LongcatConfig) -> None:
        super().__init__(config)
        self.config: LongcatConfig
        self.pre_process = self.post_process = True
        self.share_embeddings_and_output_weights = False
        shape = config.backbone
        self.embedding = LanguageModelEmbedding(
            config, shape.vocab_size, shape.max_position, position_embedding_type="none"
        )
        norm: Any = RMSNorm
        block = TransformerBlockSubmodules(layer_specs=[layer_spec()] * shape.layers, layer_norm=norm)
        init: Any = config.init_method
        self.decoder = TransformerBlock(config, block)
        self.output_layer = ColumnParallelLinear(
            shape.hidden_size, shape.vocab_size, config=config, init_method=init, bias=False
        )
        self.setup_embeddings_and_output_layer()

    def embed(self, tokens: Tensor) -> Tensor:
        """int64 [b, s] → [s, b, D]."""
        return self.embedding(input_ids=tokens, position_ids=None)

    def forward(
        self, hidden_sbD: Tensor, position: Tensor, document: Tensor, branch: Tensor, loss_tokens: Tensor
    ) -> Tensor:
        """Embeddings [s, b, D] through the layers and the final norm, [s, b, D]; ids int [b, s] as in a batch."""
        shape = self.config.backbone
        cos, sin = rotary(position, shape.qk_rope_head_dim, shape.rope_theta, hidden_sbD.dtype)
        mask = additive(visibility(document, branch), hidden_sbD.dtype)
        packed = Packed(mask, cos, sin, (document > 0).t(), loss_tokens)
        return self.decoder(hidden_states=hidden_sbD, attention_mask=None, packed_seq_params=packed)

    def logits(self, hidden: Tensor) -> Tensor:
        """[…, D] → fp32 […, V]."""
        return self.output_layer(hidden)[0].float()

    def losses(self, hidden_nD: Tensor, labels_n: Tensor) -> Tensor:
        """Cross-entropy in nats, fp32 [n]."""
        return vocab_parallel_cross_entropy(self.logits(hidden_nD.unsqueeze(1)), labels_n.unsqueeze(1)).squeeze(1)
