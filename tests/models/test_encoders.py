"""Shapes, first weights, gradients and errors of the vision encoders."""

import dataclasses

import pytest
import torch

from mmoe.errors import UserError
from mmoe.models.encoders import ConvNet, ViT, build_encoder
from mmoe.recipe import model

VIT = model.ViT(name="patches", type="vit", image_size=32, patch_size=8, width=16, layers=2, heads=2)
CONVNET = model.ConvNet(name="pixels", type="convnet", image_size=32, widths=(8, 16, 24))


@pytest.mark.parametrize(("config", "kind", "channels"), [(VIT, ViT, 16), (CONVNET, ConvNet, 24)])
@pytest.mark.parametrize("images", [0, 1, 3])
def test_shape(config, kind, channels, images):
    encoder = build_encoder(config)
    assert isinstance(encoder, kind)
    assert (encoder.channels, encoder.grid) == (channels, 4)
    out = encoder(torch.randn(images, 3, 32, 32))
    assert out.shape == (images, 4, 4, channels)
    out.sum().backward()


@pytest.mark.parametrize("config", [VIT, CONVNET])
def test_every_parameter_gets_gradient(config):
    torch.manual_seed(0)
    encoder = build_encoder(config)
    out = encoder(torch.randn(2, 3, 32, 32))
    (out * torch.randn_like(out)).sum().backward()
    assert [name for name, p in encoder.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("config", [VIT, CONVNET])
def test_images_do_not_see_each_other(config):
    torch.manual_seed(0)
    encoder = build_encoder(config).double()
    pixels = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    together = encoder(pixels)
    assert (together[1:2] - encoder(pixels[1:2])).abs().max() < 1e-12


@pytest.mark.parametrize("config", [VIT, CONVNET])
def test_rows_and_columns_keep_their_places(config):
    """A change in the upper right quarter changes the output there most: neither flipped nor transposed."""
    torch.manual_seed(0)
    encoder = build_encoder(config)
    pixels = torch.randn(32, 3, 32, 32)
    changed = pixels.clone()
    changed[:, :, :16, 16:] = torch.randn(32, 3, 16, 16)
    change = (encoder(changed) - encoder(pixels)).abs().sum((0, 3))
    quarters = change.view(2, 2, 2, 2).sum((1, 3))
    assert quarters.argmax() == 1


def test_first_weights():
    torch.manual_seed(0)
    vit, convnet = build_encoder(dataclasses.replace(VIT, width=64, heads=4)), build_encoder(CONVNET)
    assert isinstance(vit, ViT)
    for block in vit.blocks:
        for layer in (block.attention_out, block.mlp_out):
            assert layer.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert vit.position.std().item() == pytest.approx(0.02, rel=0.1)
    convolutions = [m for m in convnet.modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(convolutions) == 7
    for conv in convolutions:
        wanted = (2 / (conv.in_channels * 9)) ** 0.5
        assert conv.weight.std().item() == pytest.approx(wanted, rel=0.15)
        assert not conv.bias.any()


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (VIT, {"patch_size": 7}, "patch_size 7"),
        (VIT, {"heads": 3}, "heads 3"),
        (CONVNET, {"widths": (8, 12, 16)}, "widths"),
        (CONVNET, {"widths": ()}, "widths"),
        (CONVNET, {"image_size": 36}, "image_size 36"),
    ],
)
def test_impossible_sizes_are_the_users_error(config, change, message):
    with pytest.raises(UserError, match=message) as caught:
        build_encoder(dataclasses.replace(config, **change))
    assert config.name in caught.value.where
