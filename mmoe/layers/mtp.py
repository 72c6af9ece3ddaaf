"""Multi-token prediction: a dense layer behind the model that predicts the token after the next.

Shape and names as in LongCat-Flash's released checkpoints, whose code for serving is what defines them:

    x_t = W [norm(E x_{t+1}) ; norm(h_t)],  h_t the model's output behind its final norm, E an embedding of its own
    x   = x + MLA(norm(x));  x = x + FFN(norm(x));  norm(x) → the model's output layer → the token at t + 2

t + 1 is the place behind t in the same document and branch. Where there is none E x_{t+1} is 0: what stands behind a
prefix differs from branch to branch, and no branch may see another.
"""

from typing import Any, NamedTuple

import torch
from megatron.core.tensor_parallel import VocabParallelEmbedding
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from mmoe.layers import providers
from mmoe.layers.config import LongcatConfig
from mmoe.layers.mla import MLA
from mmoe.layers.packed import Packed
from mmoe.parallel import engine


class Ahead(NamedTuple):
    """A batch one place further, all [b, s]: the next token, whether there is one, and what to predict behind it."""

    tokens: Tensor
    follows: Tensor
    labels: Tensor
    counts: Tensor
    """bool: where the prediction carries loss."""


def look_ahead(batch: dict[str, Any]) -> Ahead:
    """What :class:`MTPLayer` reads and predicts at every place of ``batch`` (docs/architecture.md)."""

    def shift(x_bs: Tensor) -> Tensor:
        return x_bs.roll(-1, dims=1)

    document, branch = batch["document"], batch["branch"]
    follows = (document > 0) & (shift(document) == document) & (shift(branch) == branch)
    follows[:, -1] = False
    counts = follows & shift(batch["loss_mask"]).bool()
    return Ahead(shift(batch["tokens"]), follows, shift(batch["labels"]), counts)


class MTPLayer(MegatronModule):
    """Stands on the last pipeline stage."""

    def __init__(self, config: LongcatConfig) -> None:
        super().__init__(config)
        self.config: LongcatConfig
        shape, init = config.backbone, config.init_method
        hidden = shape.hidden_size

        def norm() -> Any:
            return providers.Norm(config, hidden, config.layernorm_epsilon)

        self.embed_tokens = VocabParallelEmbedding(shape.vocab_size, hidden, init_method=init, config=config)  # type: ignore[arg-type]
        self.enorm, self.hnorm = norm(), norm()
        self.eh_proj = providers.replicated(config, 2 * hidden, hidden, "mtp")
        self.input_layernorm, self.post_attention_layernorm = norm(), norm()
        self.attention = MLA(config)
        self.mlp = providers.mlp(config, engine.tensor_group())
        self.final_layernorm = norm()

    def forward(self, hidden: Tensor, tokens: Tensor, follows: Tensor, packed: Packed) -> Tensor:
        """hidden [t, b, D], the tokens that this rank holds; tokens int64 and follows bool [b, s / context ranks].
        Returns [s / context ranks, b, D]."""

        def attend(x: Tensor) -> Tensor:
            return x + self.attention(self.input_layernorm(x), packed)

        embedded = (self.embed_tokens(tokens) * follows.unsqueeze(-1)).transpose(0, 1).contiguous()
        if self.config.sequence_parallel:
            embedded = scatter_to_sequence_parallel_region(embedded)
        x = self.eh_proj(torch.cat((self.enorm(embedded), self.hnorm(hidden)), dim=-1))
        x = engine.recompute(attend, x) if self.config.recompute != "none" and self.training else attend(x)
        x = self.final_layernorm(x + self.mlp(self.post_attention_layernorm(x))[0])
        return gather_from_sequence_parallel_region(x) if self.config.sequence_parallel else x
