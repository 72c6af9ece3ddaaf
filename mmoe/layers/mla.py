"""Multi-head latent attention with LongCat-Flash's scale correction (arXiv 2509.01322, section 2.3.1).

    q        = √(d/d_q)  · W_qb norm(W_qa x)            both the nope and the rope part
    k_n, v   = W_kvb (√(d/d_kv) · norm(c)),   (c | k_r) = W_kva x
    k        = (k_n | rope(k_r)),  k_r shared by all heads and NOT scaled

Built from Megatron's parallel linears rather than on its MLASelfAttention: that one loses part of the rope key's
gradient under tensor parallelism, needs Transformer Engine for context parallelism, and knows neither per-token
positions nor branches. The scale stands on the norm's weight: both maps are linear, so it commutes with them.

s: tokens of a pack, q: those of this context-parallel rank, b: packs, D: hidden size, H: heads on this rank.
"""

import math

import torch
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from mmoe.layers import providers
from mmoe.layers.config import LongcatConfig
from mmoe.layers.packed import Packed, rotate
from mmoe.parallel import engine
from mmoe.parallel.collectives import gather_first, sum_gradient

LATENT_NORM_EPS = 1e-6
"""Hard-coded in the released model (LongcatFlashMLA), whatever rms_norm_eps says."""

LEAST_QUERIES = 256


def attend(q_bHqk: Tensor, k_bHsk: Tensor, v_bHsv: Tensor, mask: Tensor, *, in_order: bool) -> Tensor:
    """torch's attention → [b, H, q, v]. ``in_order``: query i is token i of the pack, as key i is.

    On the CPU, where it is made of plain products because keys and values have heads of two sizes, each quarter of the
    queries leaves out the keys behind it, which the mask hides anyway: up to 3/8 less work.
    """
    size = q_bHqk.size(2)
    step = max(LEAST_QUERIES, -(-size // 4)) if in_order and q_bHqk.device.type == "cpu" else size
    if step >= size:
        return scaled_dot_product_attention(q_bHqk, k_bHsk, v_bHsv, attn_mask=mask)
    parts = []
    for begin in range(0, size, step):
        end = min(begin + step, size)
        seen = mask[:, :, begin:end, :end]
        q, k, v = q_bHqk[:, :, begin:end], k_bHsk[:, :, :end], v_bHsv[:, :, :end]
        parts.append(scaled_dot_product_attention(q, k, v, attn_mask=seen))
    return torch.cat(parts, dim=2)


class MLA(MegatronModule):
    def __init__(self, config: LongcatConfig) -> None:
        super().__init__(config)
        self.config: LongcatConfig
        shape = config.backbone
        hidden = shape.hidden_size
        self.heads = shape.heads // config.tensor_model_parallel_size
        self.dims_qk = [shape.qk_nope_head_dim, shape.qk_rope_head_dim]
        self.dims_kv = [shape.qk_nope_head_dim, shape.v_head_dim]
        self.latent = [shape.kv_lora_rank, shape.qk_rope_head_dim]
        kind, latent_q, latent_kv = "attention", shape.q_lora_rank, shape.kv_lora_rank
        self.q_a_proj = providers.replicated(config, hidden, latent_q, kind)
        self.q_a_layernorm = providers.Norm(config, latent_q, LATENT_NORM_EPS, scale=math.sqrt(hidden / latent_q))
        self.q_b_proj = providers.column(config, latent_q, shape.heads * sum(self.dims_qk), kind)
        self.kv_a_proj_with_mqa = providers.replicated(config, hidden, sum(self.latent), kind)
        self.kv_a_layernorm = providers.Norm(config, latent_kv, LATENT_NORM_EPS, scale=math.sqrt(hidden / latent_kv))
        self.kv_b_proj = providers.column(config, latent_kv, shape.heads * sum(self.dims_kv), kind)
        self.o_proj = providers.row(config, shape.heads * shape.v_head_dim, hidden, kind)

    def forward(self, x: Tensor, packed: Packed) -> Tensor:
        """[t, b, D] → [t, b, D]; t: the tokens of the packs that this rank holds."""
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))[0]
        # Context-parallel ranks share the latents, d_kv + rope numbers a token, and each expands all of them itself: a
        # gather of keys and values would be H (nope + rope + v) numbers.
        compressed = gather_first(self.kv_a_proj_with_mqa(x), engine.context_group())
        latent, k_rope = compressed.split(self.latent, dim=-1)
        kv = self.kv_b_proj(self.kv_a_layernorm(latent))[0]
        # The one rope key serves the heads of all tensor-parallel ranks: its gradient is their sum.
        group = engine.tensor_group()
        k_rope = gather_first(k_rope, group) if self.config.sequence_parallel else sum_gradient(k_rope, group)

        q_nope, q_rope = q.unflatten(-1, (self.heads, -1)).split(self.dims_qk, dim=-1)
        k_nope, v = kv.unflatten(-1, (self.heads, -1)).split(self.dims_kv, dim=-1)
        q_rope = rotate(q_rope, *packed.rotary_q)
        k_rope = rotate(k_rope.unsqueeze(2), *packed.rotary_k).expand(-1, -1, self.heads, -1)
        q_bHqk = torch.cat((q_nope, q_rope), dim=-1).permute(1, 2, 0, 3)
        k_bHsk = torch.cat((k_nope, k_rope), dim=-1).permute(1, 2, 0, 3)
        out = attend(q_bHqk, k_bHsk, v.permute(1, 2, 0, 3), packed.mask, in_order=engine.context_group().size() == 1)
        return self.o_proj(out.permute(2, 0, 1, 3).flatten(2))[0]
