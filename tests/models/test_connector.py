"""Connectors against the released arithmetic, written out one query at a time (released_sva.py), and plain torch."""

import dataclasses

import pytest
import released_sva
import torch
import torch.nn.functional as F
from torch import Tensor

from mmoe.convert.families import cambrian
from mmoe.models.connectors import MLPConnector, SVAConnector, build_connector
from mmoe.models.connectors import sva as module
from mmoe.models.connectors.maps import MapLinear, resize, unpadded
from mmoe.ops import sva_absorbed as chunked
from mmoe.recipe.model import MLP, SVA, ConvNet, Inside, Linear, Llama, Model
from mmoe.reference import sva as reference

CONFIG = SVA(grid=2, width=8, heads=2, layers=2)
GRIDS, HIDDEN = (2, 4, 6), 12
MAPS = (((2, 5),), ((4, 6),), ((8, 3), (3, 4)))
"""(side, channels) of every encoder's maps: the last one's, of two stages, are both resized to 6."""
SIZES = torch.tensor([[40, 40], [24, 40], [40, 7]])
RELEASED = {
    "joint": CONFIG,
    "sep": dataclasses.replace(CONFIG, mixing="sep"),
    "masked": dataclasses.replace(CONFIG, mask_padding=True),
    "masked sep": dataclasses.replace(CONFIG, mask_padding=True, mixing="sep", layers=1),
    "the paper's scale": dataclasses.replace(CONFIG, scale="width", layers=1),
    "groups and newline": dataclasses.replace(CONFIG, groups=(1, 2), newline=True, layers=1),
    "inside": dataclasses.replace(CONFIG, layers=1, newline=True, inside=Inside(stride=1, layers=2)),
}


def make(config: SVA = CONFIG, seed: int = 0) -> tuple[SVAConnector, list[list[Tensor]]]:
    torch.manual_seed(seed)
    connector = SVAConnector(config, [sum(c for _, c in maps) for maps in MAPS], GRIDS, HIDDEN).double()
    with torch.no_grad():  # LayerNorms start at 1 and 0, which would hide a mixed-up weight
        for parameter in connector.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return connector, [[torch.randn(3, g, g, c, dtype=torch.float64) for g, c in maps] for maps in MAPS]


def released_names(config: SVA, connector: SVAConnector) -> dict[str, Tensor]:
    """The connector's weights under the released names; that it reads all of them the table sees to."""
    encoders = tuple(
        ConvNet(name=str(i), type="convnet", image_size=8, widths=(8,), grid=grid) for i, grid in enumerate(GRIDS)
    )
    backbone = Llama(
        type="llama", vocab_size=8, hidden_size=HIDDEN, layers=2, heads=2, ffn_hidden_size=8, kv_heads=1, head_dim=4
    )
    table = cambrian.connector(Model(backbone=backbone, encoders=encoders, connector=config))
    return table.write({f"connector.{name}": tensor for name, tensor in connector.state_dict().items()})


@pytest.mark.parametrize("config", RELEASED.values(), ids=RELEASED)
@torch.no_grad()
def test_against_the_released_arithmetic(config):
    connector, features = make(config)
    weights = released_names(config, connector)
    seen = connector.see(features, SIZES)
    rows = connector.rows(seen)
    assert rows.shape == (3, config.tokens, HIDDEN)
    settings = {
        "grid": config.grid,
        "sides": config.sides,
        "layers": config.layers,
        "heads": config.heads,
        "scale": (config.width // config.heads if config.scale == "head" else config.width) ** -0.5,
        "joint": config.mixing == "joint",
        "masked": config.mask_padding,
    }
    states = torch.randn(3, config.grid, config.grid, HIDDEN, dtype=torch.float64)
    for i in range(3):
        expected = released_sva.image(
            weights, [[part[i] for part in maps] for maps in features], GRIDS, SIZES[i].tolist(), **settings
        )
        assert (rows[i] - expected["rows"]).abs().max() < 1e-12
        for number, layer in enumerate(connector.inside or ()):
            asked = expected["ask"](f"model.vision_sampler_layers.{number}.layers.0", states[i])
            assert (layer(states, seen)[i] - asked).abs().max() < 1e-12


def test_masks_change_what_is_seen():
    connector, features = make(RELEASED["masked"])
    square = connector(features, torch.full((3, 2), 40))
    differs = (connector(features, SIZES) - square).abs().amax((1, 2)) > 1e-6
    assert differs.tolist() == [False, True, True]
    with pytest.raises(ValueError, match="original sizes"):
        connector(features)


def test_positions_only_where_a_query_has_several_keys():
    connector, _ = make()
    shapes = {name: tuple(p.shape) for name, p in connector.named_parameters() if name.endswith("position")}
    assert shapes == {
        f"groups.0.{n}.gather.sources.{i}.position": (m * m, 8) for n in range(2) for i, m in ((1, 2), (2, 3))
    }


@pytest.mark.parametrize("name", ["joint", "sep", "groups and newline"])
def test_every_parameter_gets_gradient(name):
    connector, features = make(RELEASED[name])
    out = connector(features)
    (out * torch.randn_like(out)).sum().backward()
    assert [name for name, p in connector.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("name", RELEASED)
def test_no_images(name):
    connector, features = make(RELEASED[name])
    out = connector([[part[:0] for part in maps] for maps in features], SIZES[:0])
    assert out.shape == (0, RELEASED[name].tokens, HIDDEN)
    out.sum().backward()


def test_a_window_is_seen_by_its_own_query_alone():
    connector, features = make()
    changed = [features[0], [features[1][0].clone()], features[2]]
    changed[1][0][:, 2:, :2] += 1  # lower left window: query 2
    differs = (connector(changed) - connector(features)).abs().amax((0, 2)) > 0
    assert differs.tolist() == [False, False, True, False]


@pytest.mark.parametrize(
    ("change", "grids", "message"),
    [
        ({"heads": 3}, GRIDS, "heads 3"),
        ({}, (2, 3, 6), "and 2"),
        ({"groups": (4,)}, GRIDS, r"\(4,\)"),
        ({}, (), "and 2"),
    ],
)
def test_impossible_sizes(change, grids, message):
    with pytest.raises(ValueError, match=message):
        SVAConnector(dataclasses.replace(CONFIG, **change), [5] * len(grids), grids, HIDDEN)


@pytest.mark.parametrize("side", [2, 5, 8])
def test_projection_and_resizing_commute(side):
    maps = [torch.randn(2, g, g, c, dtype=torch.float64) for g, c in ((8, 3), (3, 4), (5, 2))]
    linear = MapLinear(9, 6, dtype=torch.float64)
    whole = torch.cat([F.interpolate(x.permute(0, 3, 1, 2), (side, side), mode="bilinear") for x in maps], dim=1)
    assert (linear(maps, side) - F.linear(whole.permute(0, 2, 3, 1), linear.weight, linear.bias)).abs().max() < 1e-12


@pytest.mark.parametrize("height", [1, 3, 7, 24, 333])
@pytest.mark.parametrize("width", [1, 7, 24, 500])
@pytest.mark.parametrize("side", [2, 3, 24])
def test_padding_is_the_released_codes(side, height, width):
    ours = unpadded(torch.tensor([[height, width]]), side)[0]
    assert torch.equal(ours, released_sva.padding(side, height, width))


MLPS = {
    "linear": (Linear(type="linear", grid=4), lambda f, h: torch.nn.Linear(f, h)),
    "mlp": (
        MLP(type="mlp", grid=4),
        lambda f, h: torch.nn.Sequential(torch.nn.Linear(f, h), torch.nn.GELU(), torch.nn.Linear(h, h)),
    ),
    "norms": (
        MLP(type="mlp", grid=4, norm=True, newline=True),
        lambda f, h: torch.nn.Sequential(
            torch.nn.Linear(f, h), torch.nn.LayerNorm(h), torch.nn.GELU(), torch.nn.Linear(h, h), torch.nn.LayerNorm(h)
        ),
    ),
}


@pytest.mark.parametrize("name", MLPS)
@torch.no_grad()
def test_mlp_connectors(name):
    """Against the stack written with torch's modules, on resized features put together along the channels."""
    torch.manual_seed(0)
    config, stack = MLPS[name]
    connector = build_connector(config, [5, 7], [6, 3], HIDDEN).double()
    assert isinstance(connector, MLPConnector)
    plain = stack(12, HIDDEN).double()
    ordered = sorted((named for named in connector.named_parameters() if named[0] != "newline"), key=_depth)
    for (_, mine), theirs in zip(ordered, plain.parameters(), strict=True):
        theirs.copy_(mine.normal_())
    features = [[torch.randn(2, 6, 6, 5, dtype=torch.float64)], [torch.randn(2, 3, 3, 7, dtype=torch.float64)]]
    expected = plain(torch.cat([resize(maps[0], 4) for maps in features], dim=-1))
    out = connector(features)
    assert out.shape == (2, config.tokens, HIDDEN)
    assert (out.view(2, 4, -1, HIDDEN)[:, :, :4] - expected).abs().max() < 1e-12
    if connector.newline is not None:
        assert torch.equal(out.view(2, 4, 5, HIDDEN)[:, :, 4], connector.newline.expand(2, 4, -1))


def _depth(named: tuple[str, Tensor]) -> tuple[int, int]:
    """Order of the stack: each linear map before its norm."""
    parts = named[0].split(".")
    return (0 if parts[0] == "first" else int(parts[1]) + (parts[0] == "further"), parts[0] == "norms")


def peak_bytes(run) -> int:
    """The most that torch's allocator holds during ``run`` beyond what it held before."""
    with torch.profiler.profile(profile_memory=True) as profile:
        run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def test_a_layer_takes_a_fifth_of_the_plain_memory(monkeypatch):
    """Forward and backward, beyond inputs, parameters and their gradients."""
    side, width = 12, 64
    monkeypatch.setitem(chunked.CHUNK_NUMBERS, "cpu", 16 << 10)
    windows = [1, 1, 1, 4]
    layer = module.Layer(SVA(grid=side, width=width, heads=8), windows, width)
    queries = torch.randn(2, side, side, width)
    features = [torch.randn(2, m * side, m * side, width, requires_grad=True) for m in windows]
    hats = [None if m > 1 else x.detach().clone().requires_grad_() for m, x in zip(windows, features, strict=True)]
    seen = module.Seen(features, hats, [None] * 4, torch.randn(2, width))
    leaves = [x if hat is None else hat for x, hat in zip(features, hats, strict=True)] + list(layer.parameters())
    kept = sum(leaf.numel() * leaf.element_size() for leaf in leaves)

    def run():
        return torch.autograd.grad(layer(queries, seen).sum(), leaves)

    run()
    ours = peak_bytes(run) - kept
    monkeypatch.setattr(module, "sva", reference.sva)
    plain = peak_bytes(run) - kept
    assert 5 * ours <= plain
