"""Timing: both sides in turn (A B A B …), so that what else the machine does hits both; medians of the samples."""

import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

# A sample shorter than this measures the clock and the interpreter's mood, so short calls are timed in groups.
SAMPLE_SECONDS = 2e-3
MOST_CALLS = 64


class Side(NamedTuple):
    """One implementation: ``forward`` returns what carries gradient to ``inputs`` (and nothing else)."""

    forward: Callable[[], Tensor | Sequence[Tensor]]
    inputs: Sequence[Tensor] = ()


class Timing(NamedTuple):
    """Seconds a call: the median of the samples, and their interquartile range as a fraction of it."""

    seconds: float
    spread: float
    samples: int


@dataclass(frozen=True)
class Effort:
    """How long to measure a pair: until ``seconds`` are over, but ``least`` to ``most`` samples a side.

    Once a pair has taken ``longest`` seconds, ``enough`` samples are.
    """

    seconds: float = 2.0
    least: int = 5
    most: int = 41
    longest: float = 20.0
    enough: int = 3

    def satisfied(self, samples: int, seconds: float) -> bool:
        least = self.enough if seconds >= self.longest else self.least
        return samples >= least and (samples >= self.most or seconds >= self.seconds)


QUICK = Effort(seconds=0.02, least=2, most=5, enough=2)

# Runs a side so many times and returns the seconds that took, without what it had to prepare.
Run = Callable[[int], float]


def repeat(call: Callable[[], object]) -> Run:
    """Any call; what it returns is freed at once."""

    def run(calls: int) -> float:
        start = _now()
        for _ in range(calls):
            call()
        return _now() - start

    return run


def forward(side: Side) -> Run:
    """The forward pass, with the graph that training needs."""
    return repeat(side.forward)


def backward(side: Side) -> Run:
    """The backward pass alone, to all of ``inputs``; every timed call frees the graph of its own forward."""
    grads: list[Tensor] = []

    def run(calls: int) -> float:
        graphs = [_outputs(side) for _ in range(calls)]
        if not grads:
            grads.extend(torch.randn_like(part) for part in graphs[0])
        start = _now()
        while graphs:
            torch.autograd.grad(graphs.pop(), side.inputs, grads)
        return _now() - start

    return run


def step(side: Side) -> Run:
    """Forward and backward together."""
    grads: list[Tensor] = []

    def run(calls: int) -> float:
        if not grads:
            grads.extend(torch.randn_like(part) for part in _outputs(side))
        start = _now()
        for _ in range(calls):
            torch.autograd.grad(_outputs(side), side.inputs, grads)
        return _now() - start

    return run


def alternate(first: Run, second: Run, effort: Effort) -> tuple[Timing, Timing]:
    """Time two runs in turn. The first call of each is not counted: it compiles, allocates and warms up."""
    runs = first, second
    calls = []
    for run in runs:
        run(1)
        calls.append(calls_of(run(1)))
    samples: tuple[list[float], list[float]] = [], []
    start = time.perf_counter()
    collecting = gc.isenabled()
    gc.disable()
    try:
        while not effort.satisfied(len(samples[0]), time.perf_counter() - start):
            for run, count, times in zip(runs, calls, samples, strict=True):
                times.append(run(count) / count)
    finally:
        if collecting:
            gc.enable()
    return timing(samples[0]), timing(samples[1])


def calls_of(seconds: float) -> int:
    """How many calls of that length make a sample."""
    return min(MOST_CALLS, math.ceil(SAMPLE_SECONDS / max(seconds, 1e-9)))


def timing(samples: Sequence[float]) -> Timing:
    """Median and spread of at least one sample."""
    if len(samples) == 1:
        return Timing(samples[0], 0.0, 1)
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    return Timing(middle, (high - low) / middle, len(samples))


def draw(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    """A leaf of normal values that takes gradient, on the device of the surrounding ``torch.device`` context."""
    return (scale * torch.randn(*shape)).to(dtype).requires_grad_()


def size_of(*parts: Any) -> int:
    """Bytes of tensors, and of sequences of them."""
    return sum(part.nbytes if isinstance(part, Tensor) else size_of(*part) for part in parts)


def _outputs(side: Side) -> Sequence[Tensor]:
    out = side.forward()
    return (out,) if isinstance(out, Tensor) else out


def _now() -> float:
    """The clock, once the device has done all that it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
