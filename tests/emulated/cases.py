"""A tiny run, forward and backward, of every operator that has CUDA kernels: what the sanitizers watch.

A function for each operator, of its name; it takes ``torch.ops.mmoe_emulated``. The shapes reach every branch of the
kernels (a vector path and a scalar one, more than a block, a ragged end) and no more: ThreadSanitizer is slow.
"""

from typing import Any

import torch


def hidden_z_loss(ops: Any) -> None:
    for dtype, width in [(torch.float32, 24), (torch.bfloat16, 7)]:
        z = torch.randn(5, width).to(dtype)
        valid = torch.arange(5) != 2
        _, lse, count = ops.hidden_z_loss(z, valid, 0.5)
        ops.hidden_z_loss_backward(torch.ones(()), z, lse, count, 0.5)


def permute_index(ops: Any) -> None:
    ops.permute_index(torch.arange(1500).view(500, 3) % 40, 35)
    ops.permute_index(torch.arange(60, dtype=torch.int32).view(20, 3) % 7, 5, align=8, max_rows=100)


def router(ops: Any) -> None:
    # The last row is all ties: the list of candidates overflows.
    for slots, zeros, top_k, groups, score in [(24, 8, 4, 2, "softmax"), (135, 7, 17, 1, "sigmoid")]:
        logits = torch.randn(9, slots)
        logits[8] = 0
        valid = torch.arange(9) != 2
        weights, identity, probs, stats, ids, _ = ops.router(
            logits, torch.zeros(slots), valid, zeros, top_k, 2.0, score, True, 2, groups, 1, "scaled"
        )
        ops.router_backward(weights, identity, probs, logits, valid, ids, stats, zeros, 2.0, score, True, 2, "scaled")


def permute(ops: Any) -> None:
    _, index = _routed(ops)
    for dtype, width in [(torch.float32, 24), (torch.bfloat16, 7)]:
        rows = ops.permute(torch.randn(5, width).to(dtype), *index)
        ops.permute_backward(rows, index[0])


def permute_fp8(ops: Any) -> None:
    _, index = _routed(ops)
    for dtype, start in [(torch.float32, 0), (torch.bfloat16, 2)]:
        ops.permute_fp8(torch.randn(5 * 256 + start).to(dtype)[start:].view(5, 256), *index)


def unpermute(ops: Any) -> None:
    weights, (row_of_slot, slot_of_row) = _routed(ops)
    for dtype, width in [(torch.float32, 264), (torch.bfloat16, 7)]:
        x, rows = (torch.randn(count, width).to(dtype) for count in (5, len(slot_of_row)))
        arguments = [rows, row_of_slot, weights, x, torch.rand(5), slot_of_row]
        ops.unpermute_backward(ops.unpermute(*arguments), *arguments)


def _routed(ops: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Weights of five tokens' slots, and where their rows lie, padding among them."""
    row_of_slot, slot_of_row, _ = ops.permute_index(torch.arange(15).view(5, 3) % 7, 5, align=4, max_rows=40)
    return torch.rand(5, 3), [row_of_slot, slot_of_row]


def sva(ops: Any) -> None:
    """Vectors, then single elements; a projected encoder beside an absorbed one."""
    for dtype, m, width, channels in [(torch.float32, 1, 32, 8), (torch.bfloat16, 2, 31, 33)]:
        query = (2, 1, 2, 1)
        q = torch.randn(1, 2, 1, 2, width).to(dtype)
        key, value = (torch.randn(1, 2 * m, m, 2 * width).to(dtype) for _ in range(2))
        features, position = torch.randn(1, 4, 2, channels).to(dtype), torch.randn(4, channels).to(dtype)
        mask = torch.ones(1, 4, 2, dtype=torch.bool)
        mask[0, :2, :2] = False
        masks = [torch.empty(0, dtype=torch.bool), mask]
        absorbed, constants = torch.randn(*query, channels).to(dtype), torch.randn(query)
        arguments = [q, [key], [value], [features], [position], [absorbed], [constants], masks]
        out, lse, pooled, mass = ops.sva(*arguments, 1e-5)
        ops.sva_backward(torch.ones_like(out), pooled, mass, *arguments, lse, 1e-5)
