"""Shapes, first weights, gradients and errors of the vision encoders."""

import dataclasses

import pytest
import torch

from mmoe.errors import UserError
from mmoe.models.encoders import ConvNet, ConvNeXt, ViT, build_encoder
from mmoe.models.encoders.vit import resize_position
from mmoe.recipe import model
from mmoe.recipe.checks import encoder_grid, model_problems

VIT = model.ViT(name="patches", type="vit", image_size=32, patch_size=8, width=16, layers=2, heads=2)
EVERY_OPTION = dataclasses.replace(
    VIT,
    activation="swiglu",
    position="rope",
    class_token=True,
    registers=2,
    mask_token=True,
    pre_norm=True,
    layer_scale=True,
    pooling="attention",
)
CONVNEXT = model.ConvNeXt(name="stages", type="convnext", image_size=32, widths=(8, 12), depths=(1, 2))
CONVNET = model.ConvNet(name="pixels", type="convnet", image_size=32, widths=(8, 16, 24))
ALL = {"vit": VIT, "every option": EVERY_OPTION, "convnext": CONVNEXT, "convnet": CONVNET}
each = pytest.mark.parametrize("config", ALL.values(), ids=ALL)


@pytest.mark.parametrize(
    ("config", "kind", "channels"),
    [(VIT, ViT, 16), (EVERY_OPTION, ViT, 16), (CONVNEXT, ConvNeXt, 12), (CONVNET, ConvNet, 24)],
    ids=ALL,
)
@pytest.mark.parametrize("images", [0, 1, 3])
def test_shape(config, kind, channels, images):
    encoder = build_encoder(config)
    assert isinstance(encoder, kind)
    assert (encoder.channels, encoder.grid) == (channels, 4)
    (out,) = encoder(torch.randn(images, 3, 32, 32))
    assert out.shape == (images, 4, 4, channels)
    out.sum().backward()


def test_maps_of_several_stages():
    encoder = build_encoder(dataclasses.replace(CONVNEXT, feature_stages=(1, 0), grid=6))
    assert (encoder.channels, encoder.grid) == (20, 6)
    assert [part.shape for part in encoder(torch.randn(2, 3, 32, 32))] == [(2, 4, 4, 12), (2, 8, 8, 8)]


@pytest.mark.parametrize("config", [VIT, CONVNET])
def test_the_recipes_grid_is_what_the_map_is_understood_at(config):
    encoder = build_encoder(dataclasses.replace(config, grid=3))
    assert encoder.grid == 3
    assert encoder(torch.randn(1, 3, 32, 32))[0].shape[1:3] == (4, 4)


@each
def test_every_parameter_gets_gradient(config):
    torch.manual_seed(0)
    encoder = build_encoder(config)
    (out,) = encoder(torch.randn(2, 3, 32, 32))
    (out * torch.randn_like(out)).sum().backward()
    trained = [(name, p.grad) for name, p in encoder.named_parameters() if p.requires_grad]
    assert [name for name, grad in trained if grad is None or not grad.any()] == []
    kept = {name.split(".")[0] for name, p in encoder.named_parameters() if not p.requires_grad}
    assert kept == ({"mask_token", "pool"} if config is EVERY_OPTION else set())


@pytest.mark.parametrize(
    ("config", "kept"),
    [
        (dataclasses.replace(VIT, feature_layer=-2), ("blocks.1",)),
        (dataclasses.replace(VIT, feature_layer=0, final_norm=False, pooling="norm"), ("blocks.1", "norm.")),
        (dataclasses.replace(CONVNEXT, feature_stages=(0,), pooling="norm"), ("stages.1", "norm.")),
    ],
)
def test_what_stands_behind_the_features_takes_no_gradient(config, kept):
    torch.manual_seed(0)
    encoder = build_encoder(config)
    encoder(torch.randn(2, 3, 32, 32))[0].square().sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.requires_grad != name.startswith(kept), name
        assert parameter.requires_grad == (parameter.grad is not None), name


@each
def test_images_do_not_see_each_other(config):
    torch.manual_seed(0)
    encoder = build_encoder(config).double()
    pixels = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    assert (encoder(pixels)[0][1:2] - encoder(pixels[1:2])[0]).abs().max() < 1e-12


@each
def test_pixels_become_the_encoders_own(config):
    """Weights that read (x/255 − mean) / std: what the mean does to them is what it does to the pixels."""
    mean, std = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
    plain, own = (build_encoder(c).double() for c in (config, dataclasses.replace(config, mean=mean, std=std)))
    own.load_state_dict(plain.state_dict())
    x = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    by_hand = (x - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    assert (own((x - 0.5) * 4)[0] - plain(by_hand)[0]).abs().max() < 1e-5


@pytest.mark.parametrize("class_token", [False, True])
def test_positions_of_another_grid(class_token):
    """A plane stays one inside, the class token's row stays as it is."""
    config = dataclasses.replace(VIT, class_token=class_token, width=2)
    here = build_encoder(dataclasses.replace(config, image_size=64))
    y, x = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    front = torch.full((int(class_token), 2), 9.0)
    rows = torch.cat([front, torch.stack([y, x], -1).flatten(0, 1)])
    assert isinstance(here, ViT)
    assert here.position.shape == rows.shape
    smaller = resize_position(rows, config)
    assert torch.equal(smaller[: len(front)], front)
    places = smaller[len(front) :].view(4, 4, 2)
    assert places[1, 1].tolist() == pytest.approx([2.5, 2.5])
    assert places[1, 2].tolist() == pytest.approx([2.5, 4.5])
    assert resize_position(rows, dataclasses.replace(config, image_size=64)) is rows
    coarse = resize_position(rows.bfloat16(), config)
    assert (coarse.dtype, coarse.shape) == (torch.bfloat16, smaller.shape)
    with pytest.raises(ValueError, match="no square"):
        resize_position(rows[1:], config)


@each
def test_rows_and_columns_keep_their_places(config):
    """A change in the upper right quarter changes the output there most: neither flipped nor transposed."""
    torch.manual_seed(0)
    encoder = build_encoder(config)
    pixels = torch.randn(32, 3, 32, 32)
    changed = pixels.clone()
    changed[:, :, :16, 16:] = torch.randn(32, 3, 16, 16)
    change = (encoder(changed)[0] - encoder(pixels)[0]).abs().sum((0, 3))
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
    every = build_encoder(dataclasses.replace(EVERY_OPTION, width=1024, heads=4))
    for token in (every.class_token, every.registers, every.pool.probe):
        assert token.std().item() == pytest.approx(0.02, rel=0.1)
    assert not every.mask_token.any()
    convolutions = [m for m in convnet.modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(convolutions) == 7
    for conv in convolutions:
        wanted = (2 / (conv.in_channels * 9)) ** 0.5
        assert conv.weight.std().item() == pytest.approx(wanted, rel=0.15)
        assert not conv.bias.any()


@each
def test_bf16(config):
    torch.manual_seed(0)
    encoder = build_encoder(config)
    pixels = torch.randn(2, 3, 32, 32)
    (wide,), (narrow,) = encoder(pixels), encoder.bfloat16()(pixels.bfloat16())
    assert narrow.dtype == torch.bfloat16
    assert (narrow - wide).abs().max() < 0.05 * wide.abs().max()


IMPOSSIBLE = [
    (VIT, {"patch_size": 7}, "patch_size 7"),
    (VIT, {"patch_size": 33, "drop_border": True}, "patch_size 33"),
    (VIT, {"heads": 3}, "heads 3"),
    (VIT, {"heads": 8, "position": "rope"}, "heads of 2"),
    (VIT, {"feature_layer": 2}, "feature_layer 2"),
    (VIT, {"feature_layer": -3}, "feature_layer -3"),
    (CONVNEXT, {"depths": (1,)}, "depths"),
    (CONVNEXT, {"image_size": 36}, "image_size 36"),
    (CONVNEXT, {"feature_stages": (2,)}, "feature_stages"),
    (CONVNEXT, {"feature_stages": ()}, "feature_stages"),
    (CONVNET, {"widths": (8, 12, 16)}, "widths"),
    (CONVNET, {"widths": ()}, "widths"),
    (CONVNET, {"image_size": 36}, "image_size 36"),
]


def problems(config):
    """What the recipe's checks say of the encoder, without building it."""
    backbone = model.Llama(
        type="llama", vocab_size=64, hidden_size=8, layers=1, heads=2, ffn_hidden_size=8, kv_heads=1, head_dim=4
    )
    connector = model.Linear(type="linear", grid=2)
    return list(model_problems(model.Model(backbone=backbone, encoders=(config,), connector=connector)))


@pytest.mark.parametrize(("config", "change", "message"), IMPOSSIBLE)
def test_impossible_sizes_are_the_users_error(config, change, message):
    changed = dataclasses.replace(config, **change)
    with pytest.raises(UserError, match=message) as caught:
        build_encoder(changed)
    assert config.name in caught.value.where
    assert problems(changed)


@pytest.mark.parametrize(
    ("config", "change"),
    [
        *((config, {}) for config in ALL.values()),
        (VIT, {"image_size": 39, "drop_border": True}),
        (VIT, {"feature_layer": -2}),
        (CONVNEXT, {"feature_stages": (-2, 1), "grid": 3}),
    ],
)
def test_what_the_recipe_may_say_can_be_built(config, change):
    changed = dataclasses.replace(config, **change)
    assert problems(changed) == []
    assert build_encoder(changed).grid == encoder_grid(changed)
