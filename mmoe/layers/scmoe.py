"""The shortcut-connected MoE layer of LongCat-Flash (arXiv 2509.01322, section 2.2; ScMoE, arXiv 2404.05019).

h1 = x  + MLA_0(norm(x));      n1 = norm(h1)
m  = MoE(n1)                   its dispatch runs beside FFN_0, its combine beside MLA_1 and FFN_1
h2 = h1 + FFN_0(n1)
h3 = h2 + MLA_1(norm(h2))
y  = h3 + FFN_1(norm(h3)) + m

With ``moe.order = "sequential"`` the experts read norm(h3) instead, as in a model without the shortcut.
"""

from typing import Any

from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_layer import BaseTransformerLayer, get_transformer_layer_offset
from torch import Tensor

from mmoe.layers import providers
from mmoe.layers.config import LongcatConfig
from mmoe.layers.mla import MLA
from mmoe.layers.modules import ShardedList
from mmoe.layers.moe import ZeroExpertMoE
from mmoe.layers.packed import Packed
from mmoe.parallel import engine


class ScMoELayer(MegatronModule, BaseTransformerLayer):
    """Built by Megatron's TransformerBlock; ``layer_number`` counts from 1 over the whole model."""

    def __init__(
        self,
        config: LongcatConfig,
        layer_number: int = 1,
        pg_collection: Any = None,
        vp_stage: int | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config)
        self.config: LongcatConfig
        self.layer_number = layer_number + get_transformer_layer_offset(config, vp_stage, pg_collection.pp.rank())

        def norms() -> ShardedList:
            return ShardedList(providers.Norm(config, config.hidden_size, config.layernorm_epsilon) for _ in range(2))

        self.input_layernorm = norms()
        self.attention = ShardedList(MLA(config) for _ in range(2))
        self.post_attention_layernorm = norms()
        self.mlp = ShardedList(providers.mlp(config, pg_collection.tp) for _ in range(2))
        self.moe = ZeroExpertMoE(config)

    def forward(self, hidden_states: Tensor, packed_seq_params: Packed, **_: Any) -> tuple[Tensor, None]:
        """[t, b, D] → the same; the second value is Megatron's cross-attention context, which there is none of."""
        x, packed = hidden_states, packed_seq_params
        h1 = x + self._attend(0, x, packed)
        n1 = self.post_attention_layernorm[0](h1)
        if self.config.moe.order == "sequential":
            h2 = h1 + self.mlp[0](n1)[0]
            h3 = h2 + self._attend(1, h2, packed)
            n3 = self.post_attention_layernorm[1](h3)
            return h3 + self.mlp[1](n3)[0] + self.moe(n3, packed), None
        dispatched = self.moe.dispatch(n1, packed)
        h2 = h1 + self.mlp[0](n1)[0]
        computed = self.moe.compute(dispatched)
        h3 = h2 + self._attend(1, h2, packed)
        y = h3 + self.mlp[1](self.post_attention_layernorm[1](h3))[0]
        return y + self.moe.combine(computed, dispatched), None

    def _attend(self, block: int, x: Tensor, packed: Packed) -> Tensor:
        def attend(x: Tensor) -> Tensor:
            return self.attention[block](self.input_layernorm[block](x), packed)

        if self.config.recompute == "selective" and self.training:
            return engine.recompute(attend, x)
        return attend(x)
