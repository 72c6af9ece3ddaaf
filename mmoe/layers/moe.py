"""The mixture of N FFN experts and Z zero-computation (identity) experts.

Zero slots never leave the token: they enter no permutation, no all-to-all and no GEMM, and come back as
``identity weight · x`` in unpermute, which carries their gradient to x and to the router.

T: tokens of this rank, D: hidden size, R: rows sent to experts, N: experts, E: expert-parallel ranks.
"""

from dataclasses import dataclass

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.tensor_parallel.mappings import all_to_all
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.nn.functional import grouped_mm, silu

from mmoe.layers.config import LongcatConfig
from mmoe.layers.packed import Packed
from mmoe.layers.router import ZeroExpertRouter
from mmoe.ops.permute import permute
from mmoe.ops.router import RouterOutput
from mmoe.ops.unpermute import unpermute
from mmoe.parallel import engine


class GroupedExperts(MegatronModule):
    """The FFN experts of this rank as two grouped GEMMs: w1 [n, 2F, D] (gate rows, then up rows), w2 [n, D, F]."""

    def __init__(self, config: LongcatConfig, layer: int) -> None:
        super().__init__(config)
        self.config: LongcatConfig
        moe, hidden = config.moe, config.hidden_size
        here = engine.ranks()
        self.local = moe.experts // here.expert_size
        self.first = here.expert_rank * self.local
        self.w1 = torch.nn.Parameter(
            torch.empty(self.local, 2 * moe.expert_hidden_size, hidden, dtype=config.params_dtype)
        )
        self.w2 = torch.nn.Parameter(torch.empty(self.local, hidden, moe.expert_hidden_size, dtype=config.params_dtype))
        for index in range(self.local):
            # One generator an expert: its first weights do not depend on which rank holds it.
            generator = torch.Generator().manual_seed((config.seed * 1009 + layer) * 100_003 + self.first + index)
            for weight, std in (
                (self.w1, config.backbone.init_std),
                (self.w2, config.backbone.residual_init_std),
            ):
                weight.data[index].copy_(torch.randn(weight[index].shape, generator=generator) * std)

    def forward(self, rows_RD: Tensor, ends: Tensor) -> Tensor:
        """Rows sorted by expert; ``ends`` int32 [n] is where each expert's rows end."""
        gate, up = grouped_mm(rows_RD, self.w1.transpose(1, 2), offs=ends).chunk(2, dim=-1)
        return grouped_mm(silu(gate) * up, self.w2.transpose(1, 2), offs=ends)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        here = engine.ranks()
        axis = len(sharded_offsets)
        return {
            f"{prefix}{name}": ShardedTensor.from_rank_offsets(
                f"{prefix}{name}",
                weight,
                *sharded_offsets,
                (axis, here.expert_rank, here.expert_size),
                replica_id=(0, 0, engine.expert_replica()),
                prepend_axis_num=axis,
            )
            for name, weight in (("w1", self.w1), ("w2", self.w2))
        }


@dataclass
class Dispatched:
    """Rows on their way to the experts, and what is needed to bring them home."""

    rows: Tensor
    ends: Tensor
    sent: list[int]
    received: list[int]
    chunks: list[int]
    routed: RouterOutput
    row_of_slot: Tensor
    slot_of_row: Tensor
    x_TD: Tensor


class ZeroExpertMoE(MegatronModule):
    """forward = combine(experts(dispatch(x))); the three steps stand apart so that ScMoE can put work between them."""

    def __init__(self, config: LongcatConfig, layer: int) -> None:
        super().__init__(config)
        self.config: LongcatConfig
        self.router = ZeroExpertRouter(config)
        self.experts = GroupedExperts(config, layer)
        self.sent_rows = 0
        """Rows that the last dispatch handed to experts; zero experts' slots are not among them."""

    def dispatch(self, x_TD: Tensor, packed: Packed) -> Dispatched:
        valid_T = packed.valid.reshape(-1)
        routed, loss = self.router(x_TD, valid_T)
        weighted_loss = loss * packed.loss_tokens
        if torch.is_grad_enabled() and self.training:
            # Under recompute the first forward runs without gradients: only the second one counts.
            self.router.count(routed, valid_T, weighted_loss.detach())
            x_TD = engine.attach_loss(x_TD, weighted_loss)
        rows, row_of_slot, slot_of_row, offsets = permute(x_TD, routed.ids, self.config.moe.experts)
        self.sent_rows = rows.size(0)
        sizes = engine.ranks().expert_size
        if sizes == 1:
            return Dispatched(rows, offsets[1:], [], [], [], routed, row_of_slot, slot_of_row, x_TD)

        counts = offsets.diff().view(sizes, -1)
        incoming = torch.empty_like(counts)
        torch.distributed.all_to_all_single(incoming, counts, group=engine.expert_group())
        sent, received = counts.sum(1).tolist(), incoming.sum(1).tolist()
        rows = all_to_all(engine.expert_group(), rows, received, sent)
        # Rows arrive by source rank, then expert; the grouped GEMM wants them by expert.
        chunks = incoming.reshape(-1).tolist()
        rows = _regroup(rows, chunks, sizes)
        ends = incoming.sum(0).cumsum(0).to(torch.int32)
        return Dispatched(rows, ends, sent, received, chunks, routed, row_of_slot, slot_of_row, x_TD)

    def combine(self, rows_RD: Tensor, state: Dispatched) -> Tensor:
        """[R, D] from the experts → [T, D]: weighted sum over each token's slots plus identity weight · x."""
        sizes = engine.ranks().expert_size
        if sizes > 1:
            by_expert = torch.tensor(state.chunks).view(sizes, -1).t().reshape(-1).tolist()
            rows_RD = _regroup(rows_RD, by_expert, self.experts.local)
            rows_RD = all_to_all(engine.expert_group(), rows_RD, state.sent, state.received)
        routed = state.routed
        return unpermute(
            rows_RD, state.row_of_slot, routed.weights, state.x_TD, routed.identity, slot_of_row=state.slot_of_row
        )

    def forward(self, x_TD: Tensor, packed: Packed) -> Tensor:
        state = self.dispatch(x_TD, packed)
        return self.combine(self.experts(state.rows, state.ends), state)


def _regroup(rows: Tensor, chunks: list[int], outer: int) -> Tensor:
    """Rows that lie as [outer][inner] chunks, rearranged to [inner][outer]."""
    pieces = rows.split(chunks)
    inner = len(chunks) // outer
    return torch.cat([pieces[i * inner + j] for j in range(inner) for i in range(outer)])
