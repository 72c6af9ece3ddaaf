"""What the tests of the router share: every option, drawn inputs, and the comparison with the reference in float64."""

import itertools
from typing import Any

import torch
from torch import Tensor

from mmoe.ops.router import router
from mmoe.reference import router as reference
from mmoe.reference.router import RouterOutput

DTYPES = [torch.float32, torch.float64]
SCORES = ["softmax", "sigmoid"]
IDENTITIES = ["scaled", "unscaled", "copy", "drop"]
# Score, renormalisation, identity; with the group limit off and on.
COMBINATIONS = [
    {"score": score, "renormalize": renormalize, "identity": identity, **groups}
    for score, renormalize, identity, groups in itertools.product(
        SCORES, [False, True], IDENTITIES, [{}, {"selection_groups": 3, "selected_groups": 2}]
    )
]


def draw(
    tokens: int, slots: int, seed: int = 0, dtype: torch.dtype = torch.float64, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        (scale * torch.randn(tokens, slots, generator=generator, dtype=torch.float64)).to(dtype),
        (0.1 * torch.randn(slots, generator=generator, dtype=torch.float64)).to(dtype),
    )


def gradients_of(out: RouterOutput, seed: int = 7) -> list[Tensor]:
    """Gradients for weights, identity and group_probs, of sizes near 1."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(part.shape, generator=generator, dtype=torch.float64).to(part.dtype)
        for part in (out.weights, out.identity, out.group_probs)
    ]


def run(logits: Tensor, bias: Tensor, **options: Any) -> tuple[RouterOutput, Tensor]:
    """The operator's outputs, and the gradient of the logits for :func:`gradients_of`."""
    logits = logits.detach().requires_grad_()
    out = router(logits, bias, **options)
    return RouterOutput(*(part.detach() for part in out)), _grad(out, logits)


def _grad(out: RouterOutput, logits: Tensor) -> Tensor:
    parts = zip((out.weights, out.identity, out.group_probs), gradients_of(out), strict=True)
    outputs, grads = zip(*((part, grad) for part, grad in parts if part.requires_grad), strict=True)
    return torch.autograd.grad(outputs, logits, grads)[0]


def compare(out: RouterOutput, grad: Tensor | None, logits: Tensor, bias: Tensor, options: dict[str, Any]) -> None:
    """``out``, and the gradient for :func:`gradients_of`, against the reference in float64 on the same values.

    The tolerances count roundings. A score carries two for exp, its sum, a quotient and, renormalised, one more sum and
    quotient, each at most a few units in the last place; a gradient adds the products and the mean that is subtracted,
    so that its error is that of its largest terms. Scores closer than that may change places: the ids have to be as
    good, and rows where they differ are left out of what depends on them.
    """
    eps = torch.finfo(logits.dtype).eps
    exact = logits.detach().double().requires_grad_()
    wanted = reference.router(exact, bias.double(), **options)
    softmax = options.get("score", "softmax") == "softmax"
    choice = (exact.softmax(-1) if softmax else exact.sigmoid()).detach() + bias.double()
    torch.testing.assert_close(choice.gather(1, out.ids), choice.gather(1, wanted.ids), rtol=8 * eps, atol=8 * eps)
    same = (out.ids == wanted.ids).all(1)
    assert same.double().mean() > 0.9 or not len(same), "ids differ in more than near ties"

    close = {"rtol": 16 * eps, "atol": 1e-30}
    torch.testing.assert_close(out.weights[same].double(), wanted.weights[same].detach(), **close)
    torch.testing.assert_close(out.identity[same].double(), wanted.identity[same].detach(), **close)
    torch.testing.assert_close(out.group_probs.double(), wanted.group_probs.detach(), **close)
    valid = options.get("valid")
    counted = out.ids if valid is None else out.ids[valid]
    assert out.counts.tolist() == torch.bincount(counted.flatten(), minlength=logits.shape[1]).tolist()
    if grad is None:
        return
    wanted_grad = _grad(wanted, exact)
    scores = choice - bias.double()
    total = 1 if softmax else scores.sum(1, keepdim=True)
    chosen = scores.gather(1, wanted.ids).sum(1, keepdim=True) if options.get("renormalize") else 1
    largest = max(gradient.abs().max().item() for gradient in gradients_of(wanted) if gradient.numel())
    terms = scores * largest * (1 / total + 2 * options.get("scaling", 1.0) / chosen)
    excess = ((grad.double() - wanted_grad).abs() - 32 * eps * terms)[same]
    assert not len(excess) or excess.max() <= 0, f"gradient off by more than rounding, by {excess.max():.3g}"
