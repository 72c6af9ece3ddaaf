"""The layer of a dense language model, as in Llama (arXiv 2302.13971).

h = x + attention(norm(x));   y = h + FFN(norm(h))
"""

from typing import Any

from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_layer import BaseTransformerLayer, get_transformer_layer_offset
from torch import Tensor

from mmoe.layers import providers
from mmoe.layers.attention import GroupedQueryAttention
from mmoe.layers.config import LlamaConfig
from mmoe.layers.packed import Packed
from mmoe.parallel import engine


class DenseLayer(MegatronModule, BaseTransformerLayer):
    """Built by Megatron's TransformerBlock; ``layer_number`` counts from 1 over the whole model."""

    def __init__(
        self,
        config: LlamaConfig,
        layer_number: int = 1,
        pg_collection: Any = None,
        vp_stage: int | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config)
        self.config: LlamaConfig
        self.layer_number = layer_number + get_transformer_layer_offset(config, vp_stage, pg_collection.pp.rank())
        self.input_layernorm = providers.Norm(config, config.hidden_size, config.layernorm_epsilon)
        self.attention = GroupedQueryAttention(config)
        self.post_attention_layernorm = providers.Norm(config, config.hidden_size, config.layernorm_epsilon)
        self.mlp = providers.mlp(config, pg_collection.tp)

    def forward(self, hidden_states: Tensor, packed_seq_params: Packed, **_: Any) -> tuple[Tensor, None]:
        """[t, b, D] → the same; the second value is Megatron's cross-attention context, which there is none of."""

        def attend(x: Tensor) -> Tensor:
            return self.attention(self.input_layernorm(x), packed_seq_params)

        again = self.config.recompute == "selective" and self.training
        h = hidden_states + (engine.recompute(attend, hidden_states) if again else attend(hidden_states))
        return h + self.mlp(self.post_attention_layernorm(h))[0], None
