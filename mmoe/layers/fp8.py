"""FP8 GEMMs for the linears, emulated on the CPU with the arithmetic of Transformer Engine's recipes.

    y  = Q(x) · Q(W)ᵀ      forward
    dx = Q(dy) · Q(W)      dgrad
    dW = Q(dy)ᵀ · Q(x)     wgrad

Q(v) = round(v · s) / s. Values are rounded to nearest even and saturate; inputs and weights are E4M3, gradients E5M2
(the hybrid format, arXiv 2209.05433). The recipes differ in what shares a scale s = largest representable ÷ amax:

    delayed     a tensor; amax is the largest of the last steps' (Transformer Engine's DelayedScaling, amax_compute_algo
                "max"), s = 1 until there is one
    tensorwise  a tensor, with its own amax (Float8CurrentScaling)
    blockwise   1 × 128 of inputs and gradients along the contraction, 128 × 128 of weights; s is rounded down to a
                power of two (Float8BlockScaling, DeepSeek-V3, arXiv 2412.19437, section 3.3)
    mxfp8       32 values along the contraction; 1/s is a power of two in E8M0 (MXFP8BlockScaling, OCP MX; like
                Transformer Engine rounded so that nothing saturates)

In the last two a tensor has other blocks for wgrad than for the forward GEMM, as its contraction runs over the tokens:
both are made from the original, none from the other. Each expert of a grouped GEMM has scales of its own, and no block
reaches into the next expert's rows.

Products are summed and returned in fp32, then rounded to the operand's dtype: by torch._scaled_mm where one scale
serves a whole matrix, otherwise on the dequantised operands. Both are exact but for the order of the fp32 sums, as a
product of two FP8 values has 8 significant bits at most.

T tokens, K inputs, N outputs, n experts, R rows of all experts.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm, pad

from mmoe.parallel import engine
from mmoe.recipe.schema import Fp8

Role = Literal["input", "weight", "grad"]
FORMAT: dict[str, torch.dtype] = {
    "input": torch.float8_e4m3fn,
    "weight": torch.float8_e4m3fn,
    "grad": torch.float8_e5m2,
}
ROLES = tuple(FORMAT)

_counts: Counter[tuple[str, str]] | None = None


@contextmanager
def counting() -> Iterator[Counter[tuple[str, str]]]:
    """Counts the quantised GEMMs run inside, by (module kind, GEMM): ("attention", "dgrad"), ("experts", "wgrad"), …"""
    global _counts
    outer, _counts = _counts, Counter()
    try:
        yield _counts
    finally:
        _counts = outer


def scale_for(amax: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32: largest value of ``dtype`` ÷ amax; 1 where amax is 0 or not finite, finite where the quotient is not.

    Transformer Engine 2.8, common/recipe/recipe_common.cuh, compute_scale_from_amax.
    """
    scale = torch.finfo(dtype).max / amax.float()
    return torch.where((amax > 0) & amax.isfinite(), scale, 1.0).clamp(max=torch.finfo(torch.float32).max)


def power_of_two(scale: Tensor) -> Tensor:
    """The largest power of two that is not above ``scale``; its reciprocal is an E8M0 number."""
    return torch.ldexp(torch.ones_like(scale), torch.frexp(scale).exponent - 1)


@dataclass(frozen=True)
class Scaled:
    """``values`` FP8 × ``inverse`` fp32, broadcastable, stand for a matrix or, with a third dimension, n of them; for
    its transpose where ``flipped``."""

    values: Tensor
    inverse: Tensor
    flipped: bool = False

    @classmethod
    def of(cls, x: Tensor, scale: Tensor, role: Role) -> "Scaled":
        dtype = FORMAT[role]
        largest = torch.finfo(dtype).max
        return cls((x.float() * scale).clamp(-largest, largest).to(dtype), scale.reciprocal())

    @property
    def transposed(self) -> "Scaled":
        return replace(self, flipped=not self.flipped)

    def stored(self) -> Tensor:
        return self.values.transpose(-1, -2) if self.flipped else self.values

    def dequantised(self) -> Tensor:
        # Flipped at last: grouped_mm looks at strides, which arithmetic on a flipped view of one row would not keep.
        plain = self.values.float() * self.inverse
        return plain.transpose(-1, -2) if self.flipped else plain


def multiply(a: Scaled, b: Scaled, ends: Tensor | None) -> Tensor:
    """a · b in fp32; with ``ends`` the n products of a grouped GEMM."""
    if ends is not None:
        return grouped_mm(a.dequantised(), b.dequantised(), offs=ends)
    if a.inverse.dim() == b.inverse.dim() == 0:
        product = torch._scaled_mm  # type: ignore[reportPrivateImportUsage]
        return product(a.stored(), b.stored(), a.inverse, b.inverse, out_dtype=torch.float32)
    return a.dequantised() @ b.dequantised()


class Scaling(Protocol):
    """Chooses the scales of one linear's operands."""

    def operand(self, x: Tensor, role: Role, contraction: int, ends: Tensor | None, record: bool) -> Scaled:
        """Quantises x [T, K], or a weight [N, K] or [n, N, K], for a GEMM that sums over dimension ``contraction``."""
        ...


def _experts_of(ends: Tensor, rows: int) -> Tensor:
    """int64 [rows]: which expert each row belongs to."""
    return torch.searchsorted(ends, torch.arange(rows, device=ends.device), right=True)


def _amax_by(groups: Tensor, x: Tensor, count: int) -> Tensor:
    """[count, …]: the largest |x| over the rows of each group, 0 where it has none."""
    index = groups.view(-1, *[1] * (x.dim() - 1)).expand_as(x)
    return x.new_zeros(count, *x.shape[1:]).scatter_reduce(0, index, x.abs(), "amax")


def tensor_amax(x: Tensor, role: Role, ends: Tensor | None) -> Tensor:
    """fp32: one amax, or [n] of them, an expert each."""
    if ends is None:
        return x.abs().amax().float() if x.numel() else x.new_zeros((), dtype=torch.float32)
    if role == "weight":
        return x.abs().amax((1, 2)).float()
    return _amax_by(_experts_of(ends, len(x)), x.abs().amax(1), len(ends)).float()


def _spread(values: Tensor, x: Tensor, role: Role, ends: Tensor | None) -> Tensor:
    """One value an expert as a tensor that broadcasts over x; a single one stays as it is."""
    if ends is None:
        return values
    return values[:, None, None] if role == "weight" else values[_experts_of(ends, len(x))][:, None]


class TensorwiseScaling:
    """Every tensor by its own amax."""

    def operand(self, x: Tensor, role: Role, contraction: int, ends: Tensor | None, record: bool) -> Scaled:
        scale = scale_for(tensor_amax(x, role, ends), FORMAT[role])
        return Scaled.of(x, _spread(scale, x, role, ends), role)


class DelayedScaling(torch.nn.Module):
    """Every tensor by the largest amax that it had in the last ``length`` steps.

    history: fp32 [length, 3] or [n, length, 3], by role; 0 where nothing was recorded. scale: fp32 [3] or [n, 3].
    Both are checkpointed. amax: what the step under way has seen so far, see :func:`end_step`.
    """

    def __init__(self, length: int, experts: int | None = None) -> None:
        super().__init__()
        self.expert = experts is not None
        lead = () if experts is None else (experts,)
        self.register_buffer("history", torch.zeros(*lead, length, len(ROLES)))
        self.register_buffer("scale", torch.ones(*lead, len(ROLES)))
        self.register_buffer("amax", torch.zeros(*lead, len(ROLES)), persistent=False)
        self.history: Tensor
        self.scale: Tensor
        self.amax: Tensor

    def operand(self, x: Tensor, role: Role, contraction: int, ends: Tensor | None, record: bool) -> Scaled:
        column = ROLES.index(role)
        if record:
            self.amax[..., column] = torch.maximum(self.amax[..., column], tensor_amax(x, role, ends))
        return Scaled.of(x, _spread(self.scale[..., column].clone(), x, role, ends), role)

    def update(self) -> None:
        """Puts ``amax`` into the history and makes the next step's scales of it; a role never seen keeps its scale."""
        self.history.copy_(torch.cat((self.history[..., 1:, :], self.amax.unsqueeze(-2)), dim=-2))
        largest = self.history.amax(-2)
        for column, role in enumerate(ROLES):
            fresh = scale_for(largest[..., column], FORMAT[role])
            self.scale[..., column] = torch.where(largest[..., column] > 0, fresh, self.scale[..., column])
        self.amax.zero_()


class BlockScaling:
    """Blocks of ``size`` values along the contraction; of weights, if ``square``, size × size, the same either way."""

    def __init__(self, size: int, square: bool) -> None:
        self.size, self.square = size, square

    def operand(self, x: Tensor, role: Role, contraction: int, ends: Tensor | None, record: bool) -> Scaled:
        if role == "weight" and contraction == -2:
            scale = self._scale(x.transpose(-1, -2), role).transpose(-1, -2)
        elif contraction == -1:
            scale = self._scale(x, role)
        else:
            blocks, count = self._row_blocks(len(x), ends, x.device)
            scale = power_of_two(scale_for(_amax_by(blocks, x, count), FORMAT[role]))[blocks]
        return Scaled.of(x, scale, role)

    def _scale(self, x: Tensor, role: Role) -> Tensor:
        """Like x [..., M, K]: for each value the scale of its block along K; blocks at the edge are cut."""
        rows = self.size if self.square and role == "weight" else 1
        high, wide = x.shape[-2:]
        whole = pad(x.abs(), (0, -wide % self.size, 0, -high % rows))
        amax = whole.unflatten(-1, (-1, self.size)).unflatten(-3, (-1, rows)).amax((-3, -1), keepdim=True)
        scale = power_of_two(scale_for(amax, FORMAT[role])).expand(*amax.shape[:-3], rows, -1, self.size)
        return scale.flatten(-4, -3).flatten(-2, -1)[..., :high, :wide]

    def _row_blocks(self, rows: int, ends: Tensor | None, device: torch.device) -> tuple[Tensor, int]:
        """The block of each row, int64 [rows], and a bound of their number; every expert begins a new one."""
        row = torch.arange(rows, device=device)
        if ends is None:
            return row // self.size, -(-rows // self.size)
        sizes = ends.diff(prepend=ends.new_zeros(1))
        before = (-(-sizes // self.size)).cumsum(0) - -(-sizes // self.size)
        expert = _experts_of(ends, rows)
        return before[expert] + (row - (ends - sizes)[expert]) // self.size, rows // self.size + len(ends)


def make_scaling(recipe: Fp8, history: int, experts: int | None = None) -> Any:
    """The scaling of one linear, or of a grouped GEMM of ``experts``. Any: a Scaling that may be a module."""
    if recipe == "delayed":
        return DelayedScaling(history, experts)
    return {
        "tensorwise": TensorwiseScaling,
        "blockwise": lambda: BlockScaling(128, square=True),
        "mxfp8": lambda: BlockScaling(32, square=False),
    }[recipe]()


class _Gemms(torch.autograd.Function):
    """The three GEMMs of a linear. Inputs are saved as they are: wgrad may need blocks that the forward has not."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, ends: Tensor | None, scaling: Scaling, kind: str, record: bool
    ) -> Tensor:
        ctx.save_for_backward(x, weight, ends)
        ctx.scaling, ctx.kind = scaling, kind
        a = scaling.operand(x, "input", -1, ends, record)
        b = scaling.operand(weight, "weight", -1, ends, record)
        return _counted(kind, "forward", a, b.transposed, ends).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, ends = ctx.saved_tensors
        (dy,), scaling, kind = gradients, ctx.scaling, ctx.kind
        dx = dw = None
        if ctx.needs_input_grad[0]:
            a = scaling.operand(dy, "grad", -1, ends, True)
            dx = _counted(kind, "dgrad", a, scaling.operand(weight, "weight", -2, ends, True), ends).to(x.dtype)
        if ctx.needs_input_grad[1]:
            a = scaling.operand(dy, "grad", 0, ends, True).transposed
            dw = _counted(kind, "wgrad", a, scaling.operand(x, "input", 0, ends, True), ends).to(weight.dtype)
        return dx, dw, None, None, None, None


def _counted(kind: str, gemm: str, a: Scaled, b: Scaled, ends: Tensor | None) -> Tensor:
    if _counts is not None:
        _counts[kind, gemm] += 1
    return multiply(a, b, ends)


def linear(x: Tensor, weight_NK: Tensor, scaling: Scaling, kind: str) -> Tensor:
    """[…, K] → […, N] in x's dtype, without bias; fp32 or bf16. ``kind`` is the name that it is counted under."""
    rows = x.reshape(-1, x.size(-1))
    out: Any = _Gemms.apply(rows, weight_NK, None, scaling, kind, torch.is_grad_enabled())
    return out.view(*x.shape[:-1], len(weight_NK))


def grouped_linear(rows_RK: Tensor, weight_nNK: Tensor, ends_n: Tensor, scaling: Scaling, kind: str) -> Tensor:
    """[R, K] → [R, N]: the rows up to ``ends[e]`` (int32) by expert e's weight. K and N are multiples of 4."""
    out: Any = _Gemms.apply(rows_RK, weight_nNK, ends_n, scaling, kind, torch.is_grad_enabled())
    return out


def end_step(models: Iterable[torch.nn.Module], taken: bool) -> None:
    """Moves the models' delayed scales on by the step that ends, on all ranks together; a step that was not taken
    leaves no trace.

    The amax is that of all micro-batches, tensor-, context- and data-parallel ranks, so that layouts agree; but
    context-parallel ranks, which expand keys and values each for themselves, round parts of those gradients instead of
    their sum. Transformer Engine reduces over the same ranks (Megatron-Core, fp8_utils.py, get_fp8_context), moves on
    with every micro-batch, and takes one maximum over whatever experts lie at the same place of different ranks.
    """
    scalings = [part for model in models for part in model.modules() if isinstance(part, DelayedScaling)]
    for expert in (False, True):
        amaxes = [scaling.amax for scaling in scalings if scaling.expert == expert]
        if not taken:
            for amax in amaxes:
                amax.zero_()
        elif amaxes:
            flat = engine.max_over_replicas(torch.cat([amax.flatten() for amax in amaxes]), expert=expert)
            for amax, part in zip(amaxes, flat.split([amax.numel() for amax in amaxes]), strict=True):
                amax.copy_(part.view_as(amax))
    if taken:
        for scaling in scalings:
            scaling.update()
