"""Every operator on a device: against float64, gradients, layouts, repeatability, opcheck, CUDA graphs.

The bodies run on the CPU too, so that what a GPU sees for the first time is the kernels and not these tests.
`make test-gpu` runs them, once more under compute-sanitizer, and then `mmoe bench ops --device cuda` for bandwidths.
"""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from gpu.samples import (
    DEVICES,
    DTYPES,
    MIXED,
    ON_CUDA,
    OPERATORS,
    REFERENCES,
    SAMPLES,
    Placed,
    normal,
    place,
    results,
    slots,
)
from ops import routing
from torch import Tensor

from mmoe.ops.permute import permute
from mmoe.ops.permute_fp8 import permute_fp8
from mmoe.ops.permute_index import permute_index
from mmoe.ops.router import router
from mmoe.ops.unpermute import unpermute
from mmoe.reference import permute_fp8 as reference_permute_fp8
from mmoe.reference import permute_index as reference_permute_index
from mmoe.reference.router import RouterOutput


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize(("device", "dtype"), DTYPES)
def test_against_float64(name: str, device: str, dtype: torch.dtype) -> None:
    """At most twice the error of plain PyTorch in the same dtype, one rounding of the result, and 16 of float32.

    The last are for what is computed in float32 whatever the dtype: exponentials and quotients a few units in the last
    place off, sums in another order. Both count relative to the largest element.
    """
    sample = SAMPLES[name]
    placed = place(sample, device, dtype)
    exact = Placed(
        [part.detach().cpu().double().requires_grad_() for part in placed.data],
        [part.detach().cpu().double().requires_grad_() for part in placed.scalars],
        list(sample.constants),
    )
    got, plain = results(OPERATORS, sample, placed), results(REFERENCES, sample, placed)
    for ours, theirs, wanted in zip(got, plain, results(REFERENCES, sample, exact), strict=True):
        assert ours.shape == wanted.shape
        assert ours.dtype == theirs.dtype
        if not wanted.numel():
            continue
        rounding = (torch.finfo(ours.dtype).eps + 16 * torch.finfo(torch.float32).eps) * wanted.abs().max()
        allowed = 2 * (theirs.cpu().double() - wanted).abs().max() + rounding
        error = (ours.cpu().double() - wanted).abs()
        assert error.max() <= allowed, f"off by {error.max():.3g} > {allowed:.3g} at {error.argmax()} of {ours.shape}"


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("device", DEVICES)
def test_bits_repeat(name: str, device: str) -> None:
    first, second = (results(OPERATORS, SAMPLES[name], place(SAMPLES[name], device, torch.bfloat16)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("layout", ["strided", "shifted"])
@pytest.mark.parametrize(
    "name",
    [
        "hidden_z_loss 9 × 517 masked",
        "permute, 24 wide",
        "unpermute, 24 wide",
        "sva (4, 1), 64 wide masked",
        "sva absorbed",
    ],
)
@pytest.mark.parametrize("device", DEVICES)
def test_layouts(name: str, device: str, layout: str) -> None:
    """Transposed storage, and a view that starts one element off the vectors' grid.

    The scalar path may sum in another order: a few roundings of float32.
    """
    sample = SAMPLES[name]
    placed = place(sample, device, torch.float32)
    odd = placed._replace(data=[strided(part) if layout == "strided" else shifted(part) for part in placed.data])
    for a, b in zip(results(OPERATORS, sample, odd), results(OPERATORS, sample, placed), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6 * b.abs().max().item())


def strided(tensor: Tensor) -> Tensor:
    return tensor.detach().transpose(0, -1).contiguous().transpose(0, -1).requires_grad_()


def shifted(tensor: Tensor) -> Tensor:
    buffer = tensor.new_zeros(tensor.numel() + 1)
    return buffer[1:].view(tensor.shape).copy_(tensor.detach()).detach().requires_grad_()


@pytest.mark.parametrize("options", routing.COMBINATIONS, ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_router(device: str, options: dict[str, Any]) -> None:
    settings = {"zero_experts": 6, "top_k": 5, "scaling": 2.5, "balance_groups": 3, **options}
    logits, bias = routing.draw(33, 18, dtype=torch.float32)
    settings["valid"] = torch.arange(33) % 4 != 2
    out, grad = routed(logits, bias, device, settings)
    routing.compare(out, grad, logits, bias, settings)


@pytest.mark.parametrize(
    ("tokens", "experts", "zeros", "top_k"), [(0, 6, 3, 4), (1, 1, 0, 1), (5, 512, 256, 12), (3, 1536, 768, 32)]
)
@pytest.mark.parametrize("device", DEVICES)
def test_router_sizes(device: str, tokens: int, experts: int, zeros: int, top_k: int) -> None:
    settings = {"zero_experts": zeros, "top_k": top_k, "scaling": 6.0}
    logits, bias = routing.draw(tokens, experts + zeros, dtype=torch.float32)
    out, grad = routed(logits, bias, device, settings)
    again, grad_again = routed(logits, bias, device, settings)
    assert all(torch.equal(a, b) for a, b in zip((*out, grad), (*again, grad_again), strict=True))
    routing.compare(out, grad, logits, bias, settings)


@pytest.mark.parametrize(("score", "of_inf"), [("softmax", [0, 1, 2]), ("sigmoid", [7, 0, 1])])
@pytest.mark.parametrize("device", DEVICES)
def test_router_orders_ties_and_nan(device: str, score: str, of_inf: list[int]) -> None:
    """NaN is above every number, ties go to the lowest index; beside an infinite logit every softmax is NaN."""
    logits = torch.zeros(4, 40)
    logits[1] = float("nan")
    logits[2, 7] = float("inf")
    logits[3, :2] = float("-inf")
    ids = router(logits.to(device), torch.zeros(40, device=device), zero_experts=8, top_k=3, score=score).ids
    assert ids.tolist() == [[0, 1, 2], [0, 1, 2], of_inf, [2, 3, 4]]


def routed(logits: Tensor, bias: Tensor, device: str, settings: dict[str, Any]) -> tuple[RouterOutput, Tensor]:
    """Outputs and the gradient of the logits for `routing.gradients_of`, computed on the device, on the CPU."""
    leaf = logits.to(device, copy=True).requires_grad_()
    on_device = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in settings.items()}
    out = router(leaf, bias.to(device), **on_device)
    given = zip((out.weights, out.identity, out.group_probs), routing.gradients_of(out), strict=True)
    # Weights of "copy" and "drop" are constants.
    outputs, grads = zip(*((part, grad.to(device)) for part, grad in given if part.requires_grad), strict=True)
    (grad,) = torch.autograd.grad(outputs, leaf, grads)
    return RouterOutput(*(part.detach().cpu() for part in out)), grad.cpu()


@pytest.mark.parametrize("options", [{}, {"align": 16}, {"align": 8, "max_rows": 100}, {"max_rows": 20}], ids=str)
@pytest.mark.parametrize("ids", [MIXED, slots(3000, 768, 12), 6 + slots(5, 3, 2), torch.zeros(0, 4, dtype=torch.int64)])
@pytest.mark.parametrize("device", DEVICES)
def test_permute_index(device: str, ids: Tensor, options: dict[str, int]) -> None:
    experts = 512 if len(ids) == 3000 else 6
    got = permute_index(ids.to(device), experts, **options)
    wanted = reference_permute_index.permute_index(ids, experts, **{"align": 1, "max_rows": None, **options})
    assert all(torch.equal(a.cpu(), b) for a, b in zip(got, wanted, strict=True))


# No machine without a GPU needs FP8 rows, so the CPU has no kernel for them.
@pytest.mark.filterwarnings("ignore:mmoe. permute_fp8 runs as PyTorch reference on cpu")
@pytest.mark.parametrize(("device", "dtype"), DTYPES)
def test_permute_fp8(device: str, dtype: torch.dtype) -> None:
    """The same bits as the reference on the CPU: scaling and rounding are one multiplication each."""
    x = (normal(13, 384) * 10 ** torch.arange(13.0).sub(6)[:, None]).to(dtype)
    got = permute_fp8(x.to(device), MIXED.to(device), 6, align=8)
    index = reference_permute_index.permute_index(MIXED, 6, align=8, max_rows=None)
    rows, scales = reference_permute_fp8.permute_fp8(x, index.row_of_slot, index.slot_of_row)
    assert torch.equal(got.rows.cpu().view(torch.uint8), rows.view(torch.uint8))
    assert torch.equal(got.scales.cpu(), scales)


def arguments_of(operator: str, device: str) -> tuple[Any, ...]:
    """A call of ``torch.ops.mmoe.<operator>``."""
    ids = MIXED.to(device)
    index = permute_index(ids, 6)
    x = normal(len(ids), 24).to(device, torch.float32).requires_grad_()
    if operator == "hidden_z_loss":
        return x, torch.arange(len(ids), device=device) % 2 == 0, 0.5
    if operator == "permute_index":
        return ids, 6, 1, 100
    if operator == "permute":
        return x, index.row_of_slot, index.slot_of_row
    if operator == "unpermute":
        rows = normal(len(index.slot_of_row), 24).to(x).requires_grad_()
        weights, identity = torch.rand(ids.shape, device=device), torch.rand(len(ids), device=device)
        return rows, index.row_of_slot, weights.requires_grad_(), x, identity.requires_grad_(), index.slot_of_row
    if operator == "router":
        logits, bias = (part.to(device) for part in routing.draw(9, 18, dtype=torch.float32))
        return logits.requires_grad_(), bias, None, 6, 4, 2.5, "softmax", False, 3, 1, 1, "scaled"
    if operator == "grouped_linear":
        return *place(SAMPLES[operator], device, torch.float32).data, SAMPLES[operator].constants[0]
    if operator == "permute_fp8":
        return normal(len(ids), 128).to(x), index.row_of_slot, index.slot_of_row
    placed = place(SAMPLES["sva absorbed"], device, torch.float32)
    (q, keys, values, *absorbed), masks = placed.data, [torch.empty(0, dtype=torch.bool, device=device)] * 2
    if operator == "sva_absorbed":
        return q, [keys], [values], absorbed, masks, 1e-5
    if operator == "sva":
        features, position = absorbed[:2]
        rows = normal(2, *q.shape[:3], features.shape[-1]).to(q).requires_grad_()
        constants = normal(2, *q.shape[:3], seed=1).to(q).requires_grad_()
        return q, [keys], [values], [features], [position.detach()], [rows], [constants], masks, 1e-5
    raise AssertionError(operator)


OPCHECKED = ["hidden_z_loss", "permute_index", "permute", "unpermute", "router", "sva", "sva_absorbed"]


@pytest.mark.parametrize(
    ("device", "operator"),
    [
        # grouped_linear has no kernel of ours on CUDA, permute_fp8 none on the CPU.
        *(("cpu", operator) for operator in [*OPCHECKED, "grouped_linear"]),
        *(pytest.param("cuda", operator, marks=ON_CUDA) for operator in [*OPCHECKED, "permute_fp8"]),
    ],
)
def test_opcheck(device: str, operator: str) -> None:
    result = torch.library.opcheck(getattr(torch.ops.mmoe, operator).default, arguments_of(operator, device))
    assert set(result.values()) == {"SUCCESS"}


def replayed(device: str, call: Callable[[], Sequence[Tensor]], change: Callable[[], None]) -> list[Tensor]:
    """What ``call`` gives after ``change``: on CUDA by replaying a graph that was captured before it."""
    if device == "cpu":
        change()
        return [part.clone() for part in call()]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    change()
    graph.replay()
    torch.cuda.synchronize()
    return [part.clone() for part in out]


# permute without max_rows waits for the number of rows, as documented; with it nothing waits.
CAPTURED = [name for name in SAMPLES if not name.startswith("permute") or name == "permute, rows left over"]


@pytest.mark.parametrize("name", CAPTURED)
@pytest.mark.parametrize("device", DEVICES)
def test_forward_and_backward_can_be_captured(name: str, device: str) -> None:
    sample = SAMPLES[name]
    placed = place(sample, device, torch.bfloat16)
    given = [normal(*part.shape, seed=99).to(part) for part in sample.call(OPERATORS, *placed)]

    def call() -> list[Tensor]:
        out = sample.call(OPERATORS, *placed)
        return [*out, *torch.autograd.grad(out, placed.leaves, given)]

    def change() -> None:
        with torch.no_grad():
            for part in placed.leaves:
                part.mul_(0.75)

    got = replayed(device, call, change)
    assert all(torch.equal(a, b) for a, b in zip(got, call(), strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_a_moe_layer_can_be_captured(device: str) -> None:
    """Router, permute and unpermute with their gradients, the number of rows never leaving the device."""
    leaf, bias = (part.to(device) for part in routing.draw(13, 9, dtype=torch.float32))
    logits, x = leaf.requires_grad_(), normal(13, 24).to(device, torch.float32).requires_grad_()
    given = normal(13, 24, seed=5).to(x)

    def call() -> list[Tensor]:
        out = router(logits, bias, zero_experts=3, top_k=4)
        sent = permute(x, out.ids, 6, align=8, max_rows=13 * 4 + 6 * 7)
        y = unpermute(2 * sent.rows, sent.row_of_slot, out.weights, x, out.identity, slot_of_row=sent.slot_of_row)
        return [y, *torch.autograd.grad(y, [logits, x], given)]

    def change() -> None:
        with torch.no_grad():
            logits.copy_(logits.flip(0))
            x.mul_(0.5)

    got = replayed(device, call, change)
    assert all(torch.equal(a, b) for a, b in zip(got, call(), strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "name", ["hidden_z_loss 9 × 7 masked", "permute, 24 wide", "unpermute, 24 wide", "sva absorbed"]
)
def test_another_device_and_another_stream(name: str) -> None:
    """Kernels run where their tensors are, on the stream that is current there."""
    device = f"cuda:{torch.cuda.device_count() - 1}"
    sample = SAMPLES[name]
    wanted = results(OPERATORS, sample, place(sample, "cuda:0", torch.float32))
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
    with torch.cuda.device(0), torch.cuda.stream(stream):
        got = results(OPERATORS, sample, place(sample, device, torch.float32))
        stream.synchronize()
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(got, wanted, strict=True))
