"""MLA against transformers' LongcatFlashMLA on the same random weights."""

import pytest
import small
import torch
from transformers.models.longcat_flash.configuration_longcat_flash import LongcatFlashConfig
from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashMLA, LongcatFlashRotaryEmbedding

from mmoe.layers.mla import MLA, attend
from mmoe.layers.packed import Packed, additive, rotary, visibility

B, S, D = 2, 12, small.BACKBONE.hidden_size


@pytest.fixture(scope="module")
def pair() -> tuple[MLA, LongcatFlashMLA, LongcatFlashConfig]:
    ours = small.initialised(MLA(small.config()))
    shape = small.BACKBONE
    config = LongcatFlashConfig(
        hidden_size=D,
        num_attention_heads=shape.heads,
        q_lora_rank=shape.q_lora_rank,
        kv_lora_rank=shape.kv_lora_rank,
        qk_nope_head_dim=shape.qk_nope_head_dim,
        qk_rope_head_dim=shape.qk_rope_head_dim,
        v_head_dim=shape.v_head_dim,
        head_dim=shape.qk_rope_head_dim,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        attn_implementation="eager",
    )
    theirs = LongcatFlashMLA(config, layer_idx=0)
    weights = {name: value for name, value in ours.state_dict().items() if torch.is_tensor(value)}
    for name, value in weights.items():
        if "layernorm" in name:
            value.uniform_(0.5, 1.5)
    theirs.load_state_dict(weights)
    return ours, theirs, config


def test_output_and_gradients_equal_the_released_arithmetic(
    pair: tuple[MLA, LongcatFlashMLA, LongcatFlashConfig],
) -> None:
    ours, theirs, config = pair
    x = torch.randn(B, S, D, generator=torch.Generator().manual_seed(1))
    position = torch.arange(S).expand(B, S) + torch.tensor([[0], [5]])
    document = torch.ones(B, S, dtype=torch.int32)
    may_attend = visibility(document, torch.zeros_like(document))
    cos, sin = rotary(position, config.qk_rope_head_dim, small.BACKBONE.rope_theta, x.dtype)
    packed = Packed(additive(may_attend, x.dtype), (cos, sin), (cos, sin), (document > 0).t(), torch.tensor(1.0))

    mine = x.transpose(0, 1).contiguous().requires_grad_()
    y = ours(mine, packed)
    other = x.clone().requires_grad_()
    z = theirs(other, LongcatFlashRotaryEmbedding(config)(x, position), packed.mask)[0]
    torch.testing.assert_close(y.transpose(0, 1), z, rtol=1e-5, atol=1e-5)

    weight = torch.randn(z.shape, generator=torch.Generator().manual_seed(2))
    (y.transpose(0, 1) * weight).sum().backward()
    (z * weight).sum().backward()
    assert mine.grad is not None
    assert other.grad is not None
    torch.testing.assert_close(mine.grad.transpose(0, 1), other.grad, rtol=1e-4, atol=1e-4)
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(
            parameter.grad, expected[name].grad, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("size", [257, 600, 1400])
def test_queries_in_parts_give_what_they_give_together(size: int) -> None:
    """A pack of three documents, the second with two branches, and padding."""
    b, h = 2, 3
    generator = torch.Generator().manual_seed(size)
    q, k = (torch.randn(b, h, size, 12, generator=generator, dtype=torch.float64) for _ in range(2))
    v = torch.randn(b, h, size, 8, generator=generator, dtype=torch.float64)
    document = torch.arange(size).mul(4).div(size, rounding_mode="floor").add(1).remainder(4).expand(b, size)
    branch = (torch.arange(size) % 7 // 3 * (document == 2)).expand(b, size)
    mask = additive(visibility(document, branch), torch.float64)
    results = []
    for in_order in (True, False):
        leaves = [part.clone().requires_grad_() for part in (q, k, v)]
        out = attend(*leaves, mask, in_order=in_order)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for parts, together in zip(*results, strict=True):
        torch.testing.assert_close(parts, together, rtol=1e-12, atol=1e-12)
