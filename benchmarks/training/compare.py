"""One step of ours beside one of each peer, and beside the matrix product's rate: tokens/s, FLOP/s."""

from collections.abc import Iterator

import torch

from benchmarks import allocator
from benchmarks.measure import Effort, alternate, repeat
from benchmarks.report import Row
from benchmarks.training import flops, parts_of, peers
from benchmarks.training.ours import ROUTINGS, Ours, recipe
from mmoe.recipe.schema import Recipe

PEERS = {"transformers": "transformers", "megatron": "Megatron-Core"}
DTYPES = ("float32", "bfloat16")


def name_of(routing: str) -> str:
    return f"step.{routing}"


def rows(routing: str, dtype: str, *, quick: bool, skip: set[str], effort: Effort, gemm_side: int) -> Iterator[Row]:
    """The rows of one routing and dtype; ``skip`` holds names of PEERS."""
    settings = recipe(quick=quick, dtype=dtype)
    ours = Ours(settings, balanced=routing == "balanced")
    active = ours.active_experts()
    shape = shape_of(settings, ours.tokens, active)
    for name, title in PEERS.items():
        if name in skip:
            continue
        allocator.release()
        balanced = routing == "balanced"
        peer = (
            peers.Transformers(ours)
            if name == "transformers"
            else peers.Megatron(settings, ours.batch, balanced=balanced)
        )
        mine, theirs = alternate(repeat(ours.step), repeat(peer.step), effort)
        yield Row(
            name_of(routing),
            shape,
            dtype,
            ours.tokens / mine.seconds,
            ours.tokens / theirs.seconds,
            title,
            unit="tokens/s",
            ratio=theirs.seconds / mine.seconds,
            spread=mine.spread,
        )
        del peer
    allocator.release()
    a, b = (torch.randn(gemm_side, gemm_side).to(getattr(torch, dtype)) for _ in range(2))
    mine, product = alternate(repeat(ours.step), repeat(lambda: a @ b), effort)
    rate = ours.tokens * flops.per_token(settings.model, active, settings.data.sequence_length) / mine.seconds / 1e9
    ceiling = 2 * gemm_side**3 / product.seconds / 1e9
    yield Row(
        name_of(routing),
        shape,
        dtype,
        rate,
        peer_name="gemm",
        unit="GFLOP/s",
        ratio=rate / ceiling,
        ceiling=ceiling,
        spread=mine.spread,
    )


def shape_of(settings: Recipe, tokens: int, active: float) -> str:
    """The model in a few words; active weights are those of matrix products for the mean token."""
    _, moe = parts_of(settings.model)
    weights = flops.active_weights(settings.model, active) / 1e6
    return f"T {tokens} N {moe.experts} Z {moe.zero_experts} K {active:.2f}, {weights:.3g} M active"


def all_names() -> list[str]:
    return [name_of(routing) for routing in ROUTINGS]
