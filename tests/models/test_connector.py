"""The SVA connector against the released order of work, written out here with plain windows and one softmax."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from mmoe.models.connectors import sva as module
from mmoe.models.connectors.sva import Connector
from mmoe.ops import sva_absorbed as chunked
from mmoe.recipe.model import SVA as Config
from mmoe.reference import sva as reference

CONFIG = Config(grid=2, width=8, heads=2, layers=2)
CHANNELS, GRIDS, HIDDEN = [5, 6, 7], [2, 4, 6], 12


def make(seed: int = 0) -> tuple[Connector, list[torch.Tensor]]:
    torch.manual_seed(seed)
    connector = Connector(CONFIG, CHANNELS, GRIDS, HIDDEN).double()
    with torch.no_grad():  # LayerNorms start at 1 and 0, which would hide a mixed-up weight
        for parameter in connector.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    features = [torch.randn(3, g, g, c, dtype=torch.float64) for c, g in zip(CHANNELS, GRIDS, strict=True)]
    return connector, features


def released(w: dict[str, torch.Tensor], features: list[torch.Tensor]) -> torch.Tensor:
    """The maths from the state dict alone, one image and one query at a time."""

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"])

    def linear(x, name):
        return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))

    grid, heads = CONFIG.grid, CONFIG.heads
    images = []
    for image in range(len(features[0])):
        projected = []
        for i, part in enumerate(features):
            hidden = F.gelu(linear(part[image], f"projectors.{i}.0"))
            projected.append(norm(linear(hidden, f"projectors.{i}.2"), f"projectors.{i}.3"))
        context = projected[0].flatten(0, 1).mean(0)
        tokens = []
        for row in range(grid):
            for column in range(grid):
                query = w["query"]
                for layer in range(CONFIG.layers):
                    name = f"layers.{layer}"
                    start = linear(torch.cat([query, linear(context, f"{name}.context")]), f"{name}.query_in")
                    q = linear(norm(start, f"{name}.query_norm"), f"{name}.query").view(heads, -1)
                    keys, values = [], []
                    for i, part in enumerate(projected):
                        m = part.shape[0] // grid
                        window = part[row * m : (row + 1) * m, column * m : (column + 1) * m].flatten(0, 1)
                        if m > 1:
                            window = window + w[f"{name}.sources.{i}.position"]
                        keys.append(linear(norm(window, f"{name}.sources.{i}.key_norm"), f"{name}.sources.{i}.key"))
                        values.append(
                            linear(norm(window, f"{name}.sources.{i}.value_norm"), f"{name}.sources.{i}.value")
                        )
                    k, v = (torch.cat(parts).view(-1, heads, q.shape[1]) for parts in (keys, values))
                    attention = (torch.einsum("hd,khd->hk", q, k) / q.shape[1] ** 0.5).softmax(-1)
                    mixed = torch.einsum("hk,khd->hd", attention, v).flatten()
                    gathered = norm(start + linear(mixed, f"{name}.attention_out"), f"{name}.norm")
                    query = query + linear(F.gelu(linear(gathered, f"{name}.mlp_in")), f"{name}.mlp_out")
                tokens.append(linear(F.gelu(linear(query, "out.0")), "out.2"))
        images.append(torch.stack(tokens))
    return torch.stack(images)


def test_against_the_released_arithmetic():
    connector, features = make()
    out = connector(features)
    assert out.shape == (3, 4, HIDDEN)
    assert (out - released(connector.state_dict(), features)).abs().max() < 1e-12


def test_positions_only_where_a_query_has_several_keys():
    connector, _ = make()
    shapes = {name: tuple(p.shape) for name, p in connector.named_parameters() if name.endswith("position")}
    assert shapes == {f"layers.{n}.sources.{i}.position": (m * m, 8) for n in range(2) for i, m in ((1, 2), (2, 3))}


def test_every_parameter_gets_gradient():
    connector, features = make()
    out = connector(features)
    (out * torch.randn_like(out)).sum().backward()
    assert [name for name, p in connector.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_no_images():
    connector, features = make()
    out = connector([part[:0] for part in features])
    assert out.shape == (0, 4, HIDDEN)
    out.sum().backward()


def test_a_window_is_seen_by_its_own_query_alone():
    connector, features = make()
    changed = [features[0], features[1], features[2].clone()]
    changed[2][:, 3:, :3] += 1  # lower left window: query 2
    differs = (connector(changed) - connector(features)).abs().amax((0, 2)) > 0
    assert differs.tolist() == [False, False, True, False]


@pytest.mark.parametrize(
    ("change", "grids", "message"), [({"heads": 3}, GRIDS, "heads 3"), ({}, [2, 3, 6], "grid 2"), ({}, [], "grid 2")]
)
def test_impossible_sizes(change, grids, message):
    with pytest.raises(ValueError, match=message):
        Connector(dataclasses.replace(CONFIG, **change), CHANNELS[: len(grids)], grids, HIDDEN)


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
    layer = module.Layer(width, 8, [1, 1, 1, 4])
    queries = torch.randn(2, side, side, width)
    features = [torch.randn(2, m * side, m * side, width, requires_grad=True) for m in (1, 1, 1, 4)]
    context = torch.randn(2, width)
    leaves = [*features, *layer.parameters()]
    kept = sum(leaf.numel() * leaf.element_size() for leaf in leaves)

    def run():
        return torch.autograd.grad(layer(queries, features, context).sum(), leaves)

    run()
    ours = peak_bytes(run) - kept
    monkeypatch.setattr(module, "sva", reference.sva)
    plain = peak_bytes(run) - kept
    assert 5 * ours <= plain
