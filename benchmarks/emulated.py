"""``mmoe bench ops --emulated``: the memory traffic of the CUDA kernels, counted by the emulator, against the least.

The floor of a call reads each of its tensors once and writes each result once. Shapes keep the widths of the real ones,
which decide how memory is accessed, and have few tokens. See :mod:`mmoe.ops.emulated` for what is counted.
"""

from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks import report
from benchmarks.case import MoeShape, SvaShape
from benchmarks.measure import size_of
from mmoe.errors import UserError
from mmoe.ops import load_library
from mmoe.ops.emulated import Counters, count

MOE = [MoeShape("LongCat-Flash T 24", 24, 512, 256, 12, 6144), MoeShape("small MoE T 256", 256, 16, 8, 4, 512)]
# Without rows of 6144 there is time for enough tokens to make little of what a block does once.
ROUTING = [MoeShape("LongCat-Flash T 256", 256, 512, 256, 12, 6144), MOE[1]]
# 16 queries a block on the two multiprocessors that the emulator plays, as a chunk has on a GPU: positions are read
# once a block.
SVA = SvaShape("Cambrian-1 8B, 8 × 8 queries", 1, 8, 16, 64, (1, 1, 1, 4))
DTYPES = (torch.bfloat16, torch.float32)
MOST_BYTES, MOST_SECTORS = 1.10, 1.05


@dataclass(frozen=True)
class Call:
    """One call of an operator's schema; ``arguments`` as it takes them."""

    operator: str
    shape: str
    dtype: torch.dtype
    arguments: Sequence[Any]


@dataclass
class Row:
    """What a call moves, all of its kernels (``kernel`` is empty) or one of them, which has no floor of its own."""

    name: str
    shape: str
    dtype: str
    kernel: str
    bytes: int
    floor: int | None
    bytes_ratio: float | None
    sector_ratio: float
    bank_conflicts: int
    barriers: int
    atomics: int
    met: bool | None


def hidden_z_loss() -> Iterator[Call]:
    for shape in MOE:
        for dtype in DTYPES:
            z = torch.randn(shape.tokens, shape.width).to(dtype)
            _, lse, counted = torch.ops.mmoe.hidden_z_loss(z, None, 1e-7)
            yield Call("hidden_z_loss", shape.name, dtype, [z, None, 1e-7])
            yield Call("hidden_z_loss_backward", shape.name, dtype, [torch.ones(()), z, lse, counted, 1e-7])


def router() -> Iterator[Call]:
    for shape in ROUTING:
        columns = shape.experts + shape.zero_experts
        logits, bias = torch.randn(shape.tokens, columns), 0.01 * torch.randn(columns)
        ways = [shape.zero_experts, shape.top_k, shape.scaling, "softmax", False, 8, 1, 1, "scaled"]
        out = torch.ops.mmoe.router(logits, bias, None, *ways)
        weights, identity, group_probs, stats, ids, _ = out
        grads = [torch.randn_like(part) for part in (weights, identity, group_probs)]
        back = [shape.zero_experts, shape.scaling, "softmax", False, 8, "scaled"]
        yield Call("router", shape.name, logits.dtype, [logits, bias, None, *ways])
        yield Call("router_backward", shape.name, logits.dtype, [*grads, logits, None, ids, stats, *back])


def permute_index() -> Iterator[Call]:
    for shape in ROUTING:
        yield Call("permute_index", shape.name, torch.int64, [shape.routing(), shape.experts])


def permute() -> Iterator[Call]:
    for shape in MOE:
        row_of_slot, slot_of_row, _ = torch.ops.mmoe.permute_index(shape.routing(), shape.experts)
        for dtype in DTYPES:
            x, grad = (torch.randn(count, shape.width).to(dtype) for count in (shape.tokens, len(slot_of_row)))
            yield Call("permute", shape.name, dtype, [x, row_of_slot, slot_of_row])
            yield Call("permute_backward", shape.name, dtype, [grad, row_of_slot])
        yield Call("permute_fp8", shape.name, torch.bfloat16, [x.bfloat16(), row_of_slot, slot_of_row])


def unpermute() -> Iterator[Call]:
    for shape in MOE:
        row_of_slot, slot_of_row, _ = torch.ops.mmoe.permute_index(shape.routing(), shape.experts)
        weights, identity = torch.rand(row_of_slot.shape), torch.rand(shape.tokens)
        for dtype in DTYPES:
            rows = torch.randn(len(slot_of_row), shape.width).to(dtype)
            x, grad = (torch.randn(shape.tokens, shape.width).to(dtype) for _ in range(2))
            arguments = [rows, row_of_slot, weights, x, identity, slot_of_row]
            yield Call("unpermute", shape.name, dtype, arguments)
            yield Call("unpermute_backward", shape.name, dtype, [grad, *arguments])


def sva() -> Iterator[Call]:
    """All encoders projected, then the one of several keys a query absorbed."""
    shape, width = SVA, SVA.width
    side, heads = shape.side, shape.heads
    query = (heads, shape.batch, side, side)
    none = torch.empty(0, dtype=torch.bool)
    for dtype in DTYPES:
        q = torch.randn(shape.batch, side, side, heads, shape.head_width).to(dtype)

        def grid(m: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.randn(shape.batch, m * side, m * side, width).to(dtype)

        for name, projected in [("", shape.windows), (" absorbed", [m for m in shape.windows if m == 1])]:
            folded = shape.windows[len(projected) :]
            keys, values = ([grid(m) for m in projected] for _ in range(2))
            features = [grid(m) for m in folded]
            positions = [torch.randn(m * m, width).to(dtype) for m in folded]
            absorbed = [torch.randn(*query, width).to(dtype) for _ in folded]
            constants = [torch.randn(query) for _ in folded]
            masks = [none] * len(shape.windows)
            arguments = [q, keys, values, features, positions, absorbed, constants, masks]
            out, lse, pooled, mass = torch.ops.mmoe.sva(*arguments, 1e-5)
            grads = [torch.ones_like(out), pooled, mass]
            yield Call("sva", shape.name + name, dtype, [*arguments, 1e-5])
            yield Call("sva_backward", shape.name + name, dtype, [*grads, *arguments, lse, 1e-5])


OPERATORS: dict[str, Callable[[], Iterator[Call]]] = {
    made.__name__: made for made in (hidden_z_loss, router, permute_index, permute, unpermute, sva)
}


def measure(call: Call) -> list[Row]:
    """One row for the call, then one a kernel."""
    results: list[Any] = []
    found = count(lambda operators: results.append(getattr(operators, call.operator)(*call.arguments)))
    floor = size_of(*tensors(call.arguments), *tensors(results))
    rows = [row_of(call, kernel, numbers) for kernel, numbers in found.items()]
    total = row_of(call, "", Counters(*(sum(column) for column in zip(*found.values(), strict=True))))
    total.floor, total.bytes_ratio = floor, total.bytes / floor
    total.met = total.bytes_ratio <= MOST_BYTES and total.sector_ratio <= MOST_SECTORS and total.bank_conflicts == 0
    return [total, *rows]


def row_of(call: Call, kernel: str, numbers: Counters) -> Row:
    return Row(
        name=call.operator,
        shape=call.shape,
        dtype=str(call.dtype).removeprefix("torch."),
        kernel=kernel,
        bytes=numbers.bytes,
        floor=None,
        bytes_ratio=None,
        sector_ratio=numbers.sector_ratio,
        bank_conflicts=numbers.bank_conflicts,
        barriers=numbers.barriers,
        atomics=numbers.atomics,
        met=None,
    )


def tensors(parts: Any) -> Iterator[Tensor]:
    """The tensors among arguments or results, and in lists of them."""
    if isinstance(parts, Tensor):
        yield parts
    elif isinstance(parts, list | tuple):
        for part in parts:
            yield from tensors(part)


def show(rows: Sequence[Row], console: Console) -> None:
    table = Table(box=None, pad_edge=False)
    for column in ("call, kernels", "shape", "dtype"):
        table.add_column(column, no_wrap=True)
    for column in ("bytes", "÷ floor", "sectors ÷ ideal", "conflicts", "barriers", "atomics"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("")
    for row in rows:
        where = [f"  {row.kernel}", "", ""] if row.kernel else [row.name, row.shape, row.dtype]
        ratio = "" if row.bytes_ratio is None else f"{row.bytes_ratio:.3f}"
        mark = {None: "", True: "met", False: "[bold red]missed[/]"}[row.met]
        counts = [f"{value:,}" for value in (row.bank_conflicts, row.barriers, row.atomics)]
        table.add_row(*where, f"{row.bytes:,}", ratio, f"{row.sector_ratio:.3f}", *counts, mark)
    console.print(table)
    console.print()


def run(options: Namespace, console: Console) -> None:
    """The command; ``options.only`` and ``options.json`` as for the timings.

    Raises:
        UserError: the operators or their emulation cannot be built.
    """
    if not load_library():
        raise UserError("the operators are not built", "", "run `make build`")
    torch.manual_seed(0)
    rows: list[Row] = []
    progress = Console(stderr=True)
    for name in options.only or OPERATORS:
        mine: list[Row] = []
        with progress.status(name):
            for call in OPERATORS[name]():
                mine += measure(call)
        show(mine, console)
        rows += mine
    calls = [row for row in rows if row.met is not None]
    asked = f"bytes ÷ floor ≤ {MOST_BYTES}, sectors ÷ ideal ≤ {MOST_SECTORS}, no bank conflict"
    console.print(f"{sum(row.met is True for row in calls)} of {len(calls)} calls met all targets: {asked}")
    if options.json:
        report.write(options.json, rows)
