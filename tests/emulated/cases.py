"""Small runs, forward and backward, of every operator that has CUDA kernels: what the sanitizers and schedules see.

A function for each operator, of its name; it takes ``torch.ops.mmoe_emulated`` and gives every result. The shapes reach
every branch of the kernels but those for values that are not finite, and every loop twice or more: vectors and single
elements, several blocks, several rounds of a block, a warp, a lane, ragged ends. ThreadSanitizer is slow: nothing more.
"""

import itertools
from typing import Any

import torch
from sva_arguments import Case, draw
from torch import Tensor

from mmoe.reference.permute_index import permute_index as permute_index_of


def hidden_z_loss(ops: Any) -> list[Tensor]:
    results = []
    # Rows of several rounds of a warp.
    for dtype, width, masked in [(torch.float32, 264, True), (torch.bfloat16, 35, False), (torch.float16, 8, True)]:
        z = torch.randn(5, width).to(dtype)
        z[0] = 0
        valid = torch.arange(5) % 4 != 2 if masked else None
        loss, lse, count = ops.hidden_z_loss(z, valid, 0.5)
        results += [loss, lse, count, ops.hidden_z_loss_backward(torch.ones(()), z, lse, count, 0.5)]
    # More tokens than the threads that add them up.
    return [*results, *ops.hidden_z_loss(torch.randn(260, 1), None, 0.5)]


def permute_index(ops: Any) -> list[Tensor]:
    ids = torch.arange(60).view(20, 3)
    negative = ids.where(ids != 7, -1)
    return [
        *ops.permute_index(torch.arange(1500).view(500, 3) % 40, 35),
        *ops.permute_index(ids.int() % 7, 5, align=8, max_rows=30),
        # More experts than a round of the scan takes; padding of more rows than a warp has lanes, after every expert
        # and, of more than the blocks have, at the end.
        *ops.permute_index(negative * 18, 1050, align=64, max_rows=5000),
    ]


def router(ops: Any) -> list[Tensor]:
    results = []
    # Every instance, by the columns that a lane holds, on and off the vector grid; the first has more tokens than the
    # grid has warps, forward and backward.
    for tokens, columns, zeros, top_k, groups, score, identity in [
        (70, 24, 8, 4, 2, "softmax", "unscaled"),
        (5, 132, 0, 12, 4, "sigmoid", "copy"),
        (9, 135, 7, 17, 1, "sigmoid", "unscaled"),
        (5, 260, 100, 16, 1, "softmax", "drop"),
        (5, 516, 256, 32, 1, "softmax", "scaled"),
        (5, 257, 57, 32, 2, "softmax", "unscaled"),
        (5, 772, 256, 12, 1, "softmax", "scaled"),
        (5, 770, 257, 17, 1, "sigmoid", "scaled"),
    ]:
        logits = torch.randn(tokens, columns)
        logits[-1] = 0  # ties: where columns are many, the list of candidates overflows
        bias = 0.1 * (torch.arange(columns) % 5 == 0)
        valid = torch.arange(tokens) % 4 != 2 if zeros else None
        renormalize = score == "sigmoid"
        experts = columns - zeros
        balance = 2 if experts % 2 == 0 else 1
        weights, mixed, probs, stats, ids, counts = ops.router(
            logits, bias, valid, zeros, top_k, 2.0, score, renormalize, balance, groups, 1, identity
        )
        results += [weights, mixed, probs, stats, ids, counts]
        for grads in [(weights, mixed, probs), (None, None, None)]:
            results.append(
                ops.router_backward(
                    *grads, logits, valid, ids, stats, zeros, 2.0, score, renormalize, balance, identity
                )
            )
    return results


# Tokens, slots of each, width, dtype: a vector a thread; elements; more slots than a warp has lanes or a block threads;
# a row in several rounds of a block, in vectors and in elements.
MOVED = [
    (5, 3, 264, torch.float32),
    (5, 3, 7, torch.float32),
    (3, 40, 24, torch.bfloat16),
    (2, 3, 8200, torch.float32),
    (2, 3, 2051, torch.float16),
]


def permute(ops: Any) -> list[Tensor]:
    results = []
    for tokens, top_k, width, dtype in MOVED:
        index = _index(tokens, top_k)
        rows = ops.permute(torch.randn(tokens, width).to(dtype), *index)
        results += [rows, ops.permute_backward(rows, index[0])]
    return results


def permute_fp8(ops: Any) -> list[Tensor]:
    results = []
    # The last row has more scales than its block has threads.
    for tokens, top_k, width, dtype, start in [
        (5, 3, 256, torch.float32, 0),
        (5, 3, 256, torch.float32, 1),
        (3, 40, 128, torch.bfloat16, 2),
        (1, 2, 66048, torch.bfloat16, 0),
    ]:
        x = torch.randn(tokens * width + start).to(dtype)[start:].view(tokens, width)
        x[0, :128] = 0
        results += ops.permute_fp8(x, *_index(tokens, top_k))
    return results


def unpermute(ops: Any) -> list[Tensor]:
    results = []
    for (tokens, top_k, width, dtype), padded in zip(MOVED, itertools.cycle([True, False]), strict=False):
        row_of_slot, slot_of_row = _index(tokens, top_k, align=4 if padded else 1)
        x, rows = (torch.randn(count, width).to(dtype) for count in (tokens, len(slot_of_row)))
        weights, identity = torch.rand(tokens, top_k), torch.rand(tokens)
        arguments = [rows, row_of_slot, weights, x, identity, slot_of_row if padded else None]
        out = ops.unpermute(*arguments)
        results += [out, *ops.unpermute_backward(out, *arguments)]
    return results


def _index(tokens: int, top_k: int, align: int = 4) -> list[Tensor]:
    """Where the rows of the tokens' slots lie: 5 of 7 experts have some, with padding where they are aligned."""
    ids = torch.arange(tokens * top_k).view(tokens, top_k) % 7
    row_of_slot, slot_of_row, _ = permute_index_of(ids, 5, align=align)
    return [row_of_slot, slot_of_row]


# Heads of 32, 64 and 128 in vectors, heads of single elements, of more warps than one and with lanes left over; windows
# of more cells than a warp has lanes. Absorbed: vectors, single elements; rows of several items a lane, held and, the
# positions left where they are, read again; more keys, more heads than a tile; more queries than blocks. Both kinds.
SVA = [
    (Case(2, 2, 1, 3, 32, (1, 2), masked=True), torch.float32),
    (Case(1, 1, 2, 5, 64, (6,), masked=True), torch.float32),
    (Case(1, 1, 2, 2, 128, (1, 2)), torch.bfloat16),
    (Case(1, 1, 2, 2, 31, (2,), masked=True), torch.float16),
    (Case(1, 3, 3, 2, 32, (), ((2, 8),), masked=True), torch.float32),
    (Case(1, 1, 2, 17, 8, (), ((5, 264),), masked=True), torch.bfloat16),
    (Case(1, 1, 2, 2, 16, (), ((4, 1024),)), torch.float32),
    (Case(1, 1, 2, 17, 8, (), ((5, 33), (1, 33)), masked=True), torch.float32),
    (Case(1, 2, 1, 2, 32, (2,), ((1, 264), (2, 264)), masked=True), torch.float32),
]


def sva(ops: Any) -> list[Tensor]:
    results = []
    for i, (case, dtype) in enumerate(SVA):
        arguments = draw(case, dtype)
        out, lse, pooled, mass = ops.sva(*arguments, 1e-5)
        results += [out, lse, *pooled, *mass]
        all_grads = [(torch.ones_like(out), pooled, mass)]
        if i >= len(SVA) - 2:  # both kinds of absorbed rows
            none = torch.empty(0)
            all_grads.append((none, [none] * len(pooled), [none] * len(mass)))
        for grads in all_grads:
            grad_q, *groups = ops.sva_backward(*grads, *arguments, lse, 1e-5)
            results += [grad_q, *itertools.chain.from_iterable(groups)]
    return results
