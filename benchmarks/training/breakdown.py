"""``mmoe bench step --profile``: where a step's time goes, from torch's profiler, written as a page.

Every operator's own time (without what it calls) goes to one part. A matrix product is one whatever module asks for it;
anything else belongs to the innermost scope around it: scopes are opened around modules in the forward, and around the
pieces of the step that are no module. An operator of the backward belongs to the part of the forward operator that made
its node of the graph, which the profiler's sequence numbers tell.
"""

import functools
import time
from argparse import Namespace
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from rich.console import Console
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.training.ours import Ours, recipe
from mmoe.layers.mla import MLA
from mmoe.layers.moe import GroupedExperts, ZeroExpertMoE
from mmoe.layers.norms import RMSNorm
from mmoe.layers.router import ZeroExpertRouter
from mmoe.models.multimodal import MultimodalModel

PREFIX = "part: "
REST, BACKWARD = "rest", "backward"
BACKWARD_SCOPE = 1
"""torch's RecordScope::BACKWARD_FUNCTION."""
PRODUCTS = {
    "aten::mm",
    "aten::addmm",
    "aten::bmm",
    "aten::_grouped_mm",
    "GeneratedBackwardFor_mmoe_grouped_linear_default",  # the forward, by the name of the node that it is called from
    "mmoe::grouped_linear_grad_rows",
    "mmoe::grouped_linear_grad_weight",
    "mmoe::grouped_linear_add_grad_weight",
}
ATTENTION = "scaled_dot_product"
MODULES: dict[type, str] = {
    RMSNorm: "norms",
    ZeroExpertRouter: "router",
    GroupedExperts: "experts, activation",
    MLA: "attention, rotary embedding and copies",
    ZeroExpertMoE: "permute, unpermute",
    MultimodalModel: "loss, embedding, residual sums",
}
MOST = 12
"""Operators that the page lists one by one."""


def scoped(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with record_function(PREFIX + name):
            return function(*args, **kwargs)

    return call


def open_scopes(ours: Ours) -> None:
    """Puts a scope around the methods that do the work; ZeroExpertMoE is called by its steps."""
    for module in ours.model.modules():
        name = MODULES.get(type(module))
        for method in ("dispatch", "combine") if isinstance(module, ZeroExpertMoE) else ("forward",):
            if name:
                setattr(module, method, scoped(name, getattr(module, method)))
        if type(module).__name__ == "MLP":
            module.forward = scoped("dense FFN, activation", module.forward)  # type: ignore[method-assign]
    optimizer, config = ours.stepper.optimizer, ours.model.config
    for method in ("prepare_grads", "get_grad_norm", "step_with_ready_grads", "zero_grad"):
        setattr(optimizer, method, scoped("optimizer", getattr(optimizer, method)))
    config.finalize_model_grads_func = scoped("gradient buffers", config.finalize_model_grads_func)  # type: ignore
    for wrapped in ours.stepper.wrapped:
        setattr(wrapped, "zero_grad_buffer", scoped("gradient buffers", wrapped.zero_grad_buffer))


def parts(events: Any) -> dict[str, tuple[float, int]]:
    """Microseconds and calls by part."""
    forward: dict[int, str] = {}
    for event in events:
        scope = innermost(event, {})
        if event.sequence_nr >= 0 and scope not in (REST, BACKWARD):
            # Operators that make no node carry the number of the next one that does, so the last with a number counts.
            forward[event.sequence_nr] = scope
    found: defaultdict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    for event in events:
        if event.name.startswith(PREFIX):
            part = "Python between operators"
        elif event.name in PRODUCTS:
            part = "matrix products"
        elif ATTENTION in event.name:
            part = "attention, scores and sums"
        else:
            part = innermost(event, forward)
        found[REST if part == BACKWARD else part][0] += event.self_cpu_time_total
        found[REST if part == BACKWARD else part][1] += 1
    return {part: (took, int(count)) for part, (took, count) in found.items()}


def innermost(event: Any, forward: dict[int, str]) -> str:
    """The part of the nearest scope or node of the backward around ``event``; ``forward`` tells the nodes' parts."""
    while event is not None:
        if event.name.startswith(PREFIX):
            return event.name.removeprefix(PREFIX)
        if "AccumulateGrad" in event.name:
            return "gradient buffers"
        if event.scope == BACKWARD_SCOPE:
            return forward.get(event.sequence_nr, BACKWARD)
        event = event.cpu_parent
    return REST


def measure(
    dtype: str, *, quick: bool, steps: int
) -> tuple[float, dict[str, tuple[float, int]], list[tuple[str, float]], str]:
    """Seconds a step (measured, unprofiled), its parts and its longest operators in µs a step, and the model."""
    from benchmarks.training.compare import shape_of

    settings = recipe(quick=quick, dtype=dtype)
    ours = Ours(settings, balanced=True)
    ours.step()
    plain = []
    for _ in range(steps):
        start = time.perf_counter()
        ours.step()
        plain.append(time.perf_counter() - start)
    open_scopes(ours)
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as run:
        for _ in range(steps):
            with record_function(PREFIX + REST):
                ours.step()
    events = run.events() or []
    grouped = {part: (took / steps, round(count / steps)) for part, (took, count) in parts(events).items()}
    single: defaultdict[str, float] = defaultdict(float)
    for event in events:
        if not event.name.startswith(PREFIX):
            single[event.name] += event.self_cpu_time_total / steps
    longest = sorted(single.items(), key=lambda item: -item[1])[:MOST]
    return sorted(plain)[len(plain) // 2], grouped, longest, shape_of(settings, ours.tokens, ours.active_experts())


def run(options: Namespace, console: Console, machine: str) -> None:
    """Measures both dtypes and writes profile.md into ``options.out``."""
    lines = [
        "# Where a step's time goes",
        "",
        f"Written by `mmoe bench step --profile{' --quick' if options.quick else ''}`: forward, backward and AdamW, "
        f"balanced routing. {machine}.",
        "",
        "The operators' own times from torch's profiler; those of the backward count for their forward's part.",
    ]
    for dtype in ("float32", "bfloat16"):
        seconds, grouped, longest, shape = measure(dtype, quick=options.quick, steps=2 if options.quick else 5)
        total = sum(took for took, _ in grouped.values())
        lines += [
            "",
            f"## {dtype}",
            "",
            f"{shape}: {seconds * 1e3:.0f} ms a step unprofiled, {total / 1e3:.0f} ms profiled.",
        ]
        lines += ["", "| part | ms | share | operator calls |", "|---|---|---|---|"]
        lines += [
            f"| {part} | {took / 1e3:.1f} | {took / total:.1%} | {count} |"
            for part, (took, count) in sorted(grouped.items(), key=lambda item: -item[1][0])
        ]
        lines += ["", "| longest operators | ms | share |", "|---|---|---|"]
        lines += [f"| `{name}` | {took / 1e3:.1f} | {took / total:.1%} |" for name, took in longest]
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "profile.md"
    path.write_text("\n".join(lines) + "\n")
    console.print("\n".join(lines), highlight=False, markup=False)
    console.print(f"written: {path}", highlight=False)
