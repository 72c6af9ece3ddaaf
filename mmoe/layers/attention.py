"""Grouped-query attention with rotary positions, as in Llama (arXiv 2302.13971; GQA: arXiv 2305.13245).

    q, k, v = W_q x, W_k x, W_v x;   q, k rotated by their places;   a head of k and v serves heads / kv_heads of q

Built from Megatron's parallel linears rather than on its SelfAttention, which knows neither per-token positions nor
branches (:mod:`mmoe.layers.mla` has the same reasons). Tensor-parallel ranks hold whole groups of heads.

s: tokens of a pack, q: those of this context-parallel rank, b: packs, D: hidden size, H: heads on this rank.
"""

import torch
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from mmoe.layers import providers
from mmoe.layers.config import LlamaConfig
from mmoe.layers.mla import attend
from mmoe.layers.packed import Packed, rotate_halves
from mmoe.parallel import engine
from mmoe.parallel.collectives import gather_first


class GroupedQueryAttention(MegatronModule):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.config: LlamaConfig
        shape = config.backbone
        self.width, self.sharing, kind = shape.head_dim, shape.heads // shape.kv_heads, "attention"
        keys = shape.kv_heads * shape.head_dim
        self.q_proj = providers.column(config, shape.hidden_size, shape.heads * shape.head_dim, kind)
        self.k_proj = providers.column(config, shape.hidden_size, keys, kind)
        self.v_proj = providers.column(config, shape.hidden_size, keys, kind)
        self.o_proj = providers.row(config, shape.heads * shape.head_dim, shape.hidden_size, kind)

    def forward(self, x: Tensor, packed: Packed) -> Tensor:
        """[t, b, D] → [t, b, D]; t: the tokens of the packs that this rank holds."""
        q, k, v = (self._heads(projection(x)[0]) for projection in (self.q_proj, self.k_proj, self.v_proj))
        if engine.context_group().size() > 1:
            k, v = gather_first(torch.stack((k, v), dim=1), engine.context_group()).unbind(1)
        q, k = rotate_halves(q, *packed.rotary_q), rotate_halves(k, *packed.rotary_k)
        q_bHqw, k_bHsw, v_bHsw = (part.permute(1, 2, 0, 3) for part in (q, *map(self._shared, (k, v))))
        out = attend(q_bHqw, k_bHsw, v_bHsw, packed.mask, in_order=engine.context_group().size() == 1)
        return self.o_proj(out.permute(2, 0, 1, 3).flatten(2))[0]

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.width))

    def _shared(self, x: Tensor) -> Tensor:
        return x.repeat_interleave(self.sharing, dim=2) if self.sharing > 1 else x
