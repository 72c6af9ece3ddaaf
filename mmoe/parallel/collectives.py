"""Collectives that autograd follows: each backward is the forward's adjoint over the same group."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function


class _SumGradient(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


def sum_gradient(x: Tensor, group: Any) -> Tensor:
    """``x``, which all ranks of ``group`` hold alike and each uses for a part: its gradient is the sum of theirs.

    Not Megatron's copy_to_tensor_model_parallel_region: in 0.16.1 that leaves a strided gradient unreduced
    (tensor_parallel/mappings.py:31 reduces a contiguous copy and returns its input).
    """
    return x if group.size() == 1 else _SumGradient.apply(x, group)  # type: ignore[return-value]


class _GatherFirst(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        out = x.new_empty(group.size() * x.size(0), *x.shape[1:])
        dist.all_gather_single(out, x.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0].contiguous()
        out = grad.new_empty(grad.size(0) // ctx.group.size(), *grad.shape[1:])
        dist.reduce_scatter_single(out, grad, group=ctx.group)
        return out, None


def gather_first(x: Tensor, group: Any) -> Tensor:
    """The ranks' ``x`` one after another along the first dimension, on every rank; gradients are summed back."""
    return x if group.size() == 1 else _GatherFirst.apply(x, group)  # type: ignore[return-value]


class Exchange:
    """An all-to-all of rows [R, D] that runs while other work is done, forward and backward.

    ``start`` sends, ``finish`` waits. In the backward ``finish`` sends the gradients home and ``start`` waits for them,
    so what stood between the two in the forward runs beside the communication both times: autograd executes nodes in
    the reverse order of their creation. ``overlap=False`` waits at once, for comparison.

    Works on the collective's own thread (gloo) or stream (NCCL); a rank may send and receive no rows at all.
    """

    def __init__(self, group: Any, sent: list[int], received: list[int], *, overlap: bool = True) -> None:
        self.group, self.sent, self.received, self.overlap = group, sent, received, overlap
        self.work: Any = None
        self.returned: Tensor | None = None

    def _launch(self, rows: Tensor, out_sizes: list[int], in_sizes: list[int]) -> Tensor:
        out = rows.new_empty(sum(out_sizes), *rows.shape[1:])
        # Kept until the wait: gloo reads it from another thread.
        self.source = rows.contiguous()
        self.work = dist.all_to_all_single(out, self.source, out_sizes, in_sizes, group=self.group, async_op=True)
        if not self.overlap:
            self._wait()
        return out

    def _wait(self) -> None:
        if self.work is not None:
            self.work.wait()
        self.work = self.source = None

    def start(self, rows: Tensor) -> Tensor:
        """Rows by destination rank → the buffer that ``finish`` takes; it holds nothing before that."""
        return _Start.apply(rows, self)  # type: ignore[return-value]

    def finish(self, buffer: Tensor) -> Tensor:
        """The rows by source rank."""
        return _Finish.apply(buffer, self)  # type: ignore[return-value]


class _Start(Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange._launch(rows, exchange.received, exchange.sent)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None]:
        exchange = ctx.exchange
        exchange._wait()
        grad, exchange.returned = exchange.returned, None
        return grad, None


class _Finish(Function):
    @staticmethod
    def forward(ctx: Any, buffer: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        exchange._wait()
        return buffer.view_as(buffer)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        exchange = ctx.exchange
        exchange.returned = exchange._launch(grads[0], exchange.sent, exchange.received)
        # The gradient is on its way; autograd only wants a tensor of the right shape to carry on with.
        return grads[0].new_zeros(()).expand_as(grads[0]), None


class _Reorder(Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.inverse = inverse
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0].index_select(0, ctx.inverse), None, None


def reorder(rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """rows[order] for a permutation and its inverse; the backward gathers too, where autograd's own would scatter."""
    return _Reorder.apply(rows, order, inverse)  # type: ignore[return-value]
