"""The mixture of N FFN experts and Z zero-computation (identity) experts.

Zero slots never leave the token: they enter no permutation, no all-to-all and no GEMM, and come back as
``identity weight · x`` in unpermute, which carries their gradient to x and to the router.

T: tokens of this rank, D: hidden size, R: rows sent to experts, N: experts, n: experts of this rank, F: expert width,
f: this rank's share of F under expert tensor parallelism.
"""

from dataclasses import dataclass

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.nn.functional import silu

from mmoe.layers import providers
from mmoe.layers.config import LongcatConfig
from mmoe.layers.packed import Packed
from mmoe.layers.router import ZeroExpertRouter
from mmoe.ops.permute import permute
from mmoe.ops.router import RouterOutput
from mmoe.ops.unpermute import unpermute
from mmoe.parallel import engine
from mmoe.parallel.collectives import Exchange, reorder


class GroupedExperts(MegatronModule):
    """The FFN experts of this rank as two grouped GEMMs: w1 [n, 2, f, D] (gate, then up), w2 [n, D, f]."""

    def __init__(self, config: LongcatConfig) -> None:
        super().__init__(config)
        self.config: LongcatConfig
        moe, hidden, here = config.moe, config.hidden_size, engine.ranks()
        self.local = moe.experts // here.expert_size
        width, dtype = moe.expert_hidden_size // here.expert_tensor_size, config.params_dtype
        self.w1 = torch.nn.Parameter(torch.empty(self.local, 2, width, hidden, dtype=dtype))
        self.w2 = torch.nn.Parameter(torch.empty(self.local, hidden, width, dtype=dtype))
        self.grouped1 = providers.grouped_linear(config, self.local, hidden, 2 * width)
        self.grouped2 = providers.grouped_linear(config, self.local, width, hidden)

    def forward(self, rows_RD: Tensor, ends: Tensor) -> Tensor:
        """Rows sorted by expert; ``ends`` int32 [n] is where each expert's rows end. Under expert tensor parallelism
        the result is this rank's part of a sum."""
        gate, up = self.grouped1(rows_RD, self.w1, ends).chunk(2, dim=-1)
        return self.grouped2(silu(gate) * up, self.w2, ends)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        here, axis = engine.ranks(), len(sharded_offsets)
        state: dict = {
            f"{prefix}{name}": ShardedTensor.from_rank_offsets(
                f"{prefix}{name}",
                weight,
                *sharded_offsets,
                (axis, here.expert_rank, here.expert_size),
                (axis + 2, here.expert_tensor_rank, here.expert_tensor_size),
                replica_id=(0, 0, engine.expert_replica()),
                prepend_axis_num=axis,
            )
            for name, weight in (("w1", self.w1), ("w2", self.w2))
        }
        for name, grouped in self.named_children():
            state.update(grouped.sharded_state_dict(f"{prefix}{name}.", sharded_offsets))  # type: ignore[operator]
        return state


@dataclass
class Dispatched:
    """Rows on their way to the experts, and what is needed to bring them home."""

    rows: Tensor
    exchange: Exchange | None
    incoming: Tensor
    """int64 [ranks of the exchange, n]: rows that come from each rank for each expert here."""
    routed: RouterOutput
    row_of_slot: Tensor
    slot_of_row: Tensor
    x_TD: Tensor
    shape: torch.Size
    """[t, b], or [T], of the tokens that this rank routes."""


@dataclass
class Computed:
    """The experts' results on their way back."""

    rows: Tensor
    exchange: Exchange | None


class ZeroExpertMoE(MegatronModule):
    """y = combine(compute(dispatch(x))). The steps stand apart so that ScMoE can put work beside the communication:
    ``dispatch`` and ``compute`` only start the all-to-all that the next step waits for."""

    def __init__(self, config: LongcatConfig) -> None:
        super().__init__(config)
        self.config: LongcatConfig
        self.router = ZeroExpertRouter(config)
        self.experts = GroupedExperts(config)
        self.sent_rows = 0
        """Rows that the last dispatch handed to experts; zero experts' slots are not among them."""
        here = engine.ranks()
        # Without sequence parallelism the tensor-parallel ranks hold the same tokens: each routes its part of them.
        self.scatters = here.tensor_size > 1 and not config.sequence_parallel

    def dispatch(self, x: Tensor, packed: Packed) -> Dispatched:
        """[t, b, D] or [T, D], the tokens that this rank holds; ``packed.valid`` is of those that it routes."""
        if self.scatters:
            x = scatter_to_sequence_parallel_region(x)
        shape, x_TD, valid_T = x.shape[:-1], x.reshape(-1, x.size(-1)), packed.valid.reshape(-1)
        routed, loss = self.router(x_TD, valid_T)
        weighted_loss = loss * packed.loss_tokens
        if torch.is_grad_enabled() and self.training:
            # Under recompute the first forward runs without gradients: only the second one counts.
            self.router.count(routed, valid_T, weighted_loss.detach())
            if self.router.measures and routed.weights.requires_grad:  # else all before it is frozen
                self.router.measure(routed, valid_T)
            if self.router.weight.requires_grad:  # a frozen router's balance is not for what lies before it to mend
                x_TD = engine.attach_loss(x_TD, weighted_loss)
        rows, row_of_slot, slot_of_row, offsets = permute(x_TD, routed.ids, self.config.moe.experts)
        self.sent_rows = rows.size(0)
        here, group = engine.ranks(), engine.expert_group()
        outgoing = offsets.diff().long().view(here.expert_size, -1)
        if group.size() == 1:
            return Dispatched(rows, None, outgoing, routed, row_of_slot, slot_of_row, x_TD, shape)

        # All ranks of an expert's tensor-parallel group get its rows.
        copies = here.expert_tensor_size
        outgoing = outgoing.repeat_interleave(copies, dim=0)
        incoming = torch.empty_like(outgoing)
        torch.distributed.all_to_all_single(incoming, outgoing, group=group)
        sent, received = torch.stack((outgoing.sum(1), incoming.sum(1))).tolist()
        if copies > 1:
            rows = torch.cat([part for part in rows.split(sent[::copies]) for _ in range(copies)])
        exchange = Exchange(group, sent, received, overlap=self.config.overlap_moe)
        return Dispatched(
            exchange.start(rows), exchange, incoming, routed, row_of_slot, slot_of_row, x_TD, x.shape[:-1]
        )

    def compute(self, state: Dispatched) -> Computed:
        """Waits for the rows, runs the experts on them and sends the results home."""
        ends = state.incoming.sum(0).cumsum(0).to(torch.int32)
        if state.exchange is None:
            return Computed(self.experts(state.rows, ends), None)
        rows = state.exchange.finish(state.rows)
        # Rows arrive by source rank, then expert; the grouped GEMM wants them by expert.
        ranks = state.incoming.size(0)
        experts = torch.arange(self.experts.local, device=rows.device).repeat(ranks)
        order = experts.repeat_interleave(state.incoming.flatten(), output_size=rows.size(0)).argsort(stable=True)
        home = torch.empty_like(order)
        home[order] = torch.arange(order.numel(), device=order.device)
        out = reorder(self.experts(reorder(rows, order, home), ends), home, order)
        sent, received = state.exchange.sent, state.exchange.received
        exchange = Exchange(engine.expert_group(), received, sent, overlap=self.config.overlap_moe)
        return Computed(exchange.start(out), exchange)

    def combine(self, computed: Computed, state: Dispatched) -> Tensor:
        """Waits for the results; as dispatched: weighted sum over each token's slots plus identity weight · x."""
        rows = computed.rows
        if computed.exchange is not None:
            rows = computed.exchange.finish(rows)
            copies = engine.ranks().expert_tensor_size
            if copies > 1:
                parts = rows.split(computed.exchange.received)
                rows = torch.cat([torch.stack(parts[i : i + copies]).sum(0) for i in range(0, len(parts), copies)])
        routed = state.routed
        y_TD = unpermute(
            rows, state.row_of_slot, routed.weights, state.x_TD, routed.identity, slot_of_row=state.slot_of_row
        )
        y = y_TD.view(*state.shape, y_TD.size(1))
        return gather_from_sequence_parallel_region(y, tensor_parallel_output_grad=False) if self.scatters else y

    def forward(self, x: Tensor, packed: Packed) -> Tensor:
        state = self.dispatch(x, packed)
        return self.combine(self.compute(state), state)
