"""Router, permute and unpermute put together: a zero-expert layer against transformers', and its gradients."""

import pytest
import torch
from torch.nn.functional import silu
from transformers import LongcatFlashConfig
from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashMoE

from mmoe.ops.permute import permute
from mmoe.ops.router import router
from mmoe.ops.unpermute import unpermute

D, F, N, Z, K, SCALING = 6, 5, 4, 3, 3, 2.5


def layer(x, gate, bias, w1, w2, valid=None):
    """The layer as three operators and a loop over the experts: (output, rows that were sent to experts)."""
    routed = router(x @ gate.T, bias, zero_experts=Z, top_k=K, scaling=SCALING, valid=valid)
    sent = permute(x, routed.ids, N)
    rows = []
    for expert, part in enumerate(sent.rows.split(sent.offsets.diff().tolist())):
        up, down = (part @ w1[expert].T).chunk(2, -1)
        rows.append((silu(up) * down) @ w2[expert].T)
    return unpermute(torch.cat(rows), sent.row_of_slot, routed.weights, x, routed.identity), len(sent.rows)


def weights(dtype):
    torch.manual_seed(0)
    shapes = (9, D), (N + Z, D), (N + Z,), (N, 2 * F, D), (N, D, F)
    x, gate, bias, w1, w2 = (torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes)
    return x, gate, 0.05 * bias, w1, w2


def test_against_transformers():
    x, gate, bias, w1, w2 = weights(torch.float32)
    config = LongcatFlashConfig(
        hidden_size=D,
        expert_ffn_hidden_size=F,
        n_routed_experts=N,
        zero_expert_num=Z,
        moe_topk=K,
        routed_scaling_factor=SCALING,
    )
    theirs = LongcatFlashMoE(config)
    with torch.no_grad():
        theirs.router.classifier.weight.copy_(gate)
        theirs.router.e_score_correction_bias.copy_(bias)
        theirs.experts.gate_up_proj.copy_(torch.cat([w1, torch.full((Z, 2 * F, D), torch.nan)]))
        theirs.experts.down_proj.copy_(w2)
    leaves = [part.requires_grad_() for part in (x, gate)]
    ours, sent = layer(x, gate, bias, w1, w2)
    wanted = theirs(x)
    upstream = torch.randn_like(wanted)
    grads = torch.autograd.grad(ours, leaves, upstream)
    wanted_grads = torch.autograd.grad(wanted, [x, theirs.router.classifier.weight], upstream)
    # Sums of at most 9 · 6 terms of size about 10 in fp32.
    for a, b in zip([ours, *grads], [wanted, *wanted_grads], strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)
    _, _, chosen = theirs.router(x)
    assert sent == int((chosen < N).sum()) < chosen.numel()


def test_gradient_of_the_whole_layer():
    x, gate, bias, w1, w2 = weights(torch.float64)
    valid = torch.tensor([True] * 8 + [False])
    inputs = [part[:9].requires_grad_() for part in (x, gate, w1, w2)]
    assert torch.autograd.gradcheck(lambda y, g, a, b: layer(y, g, bias, a, b, valid)[0], inputs)


@pytest.mark.parametrize("chosen", [0, 1, K])
def test_zero_experts_send_nothing_and_carry_gradient(chosen):
    """``chosen`` of the k slots are FFN experts: that many rows a token, and x and the router learn from the others."""
    x, gate, _, w1, w2 = weights(torch.float64)
    favoured = [*range(chosen), *range(N, N + K - chosen)]
    bias = torch.zeros(N + Z, dtype=torch.float64)
    bias[favoured] = 10.0
    x.requires_grad_(), gate.requires_grad_()
    out, sent = layer(x, gate, bias, torch.zeros_like(w1), w2)
    assert sent == chosen * len(x)
    out.sum().backward()
    assert x.grad.any().item() == (chosen < K)
    assert gate.grad.any().item() == (chosen < K)
