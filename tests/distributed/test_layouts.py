"""Every layout trains the same model: curve, gradient norm, routing, each parameter's gradient; and goes on from a
checkpoint of any other layout. Two runs at one layout are equal bit by bit."""

import math
from pathlib import Path
from typing import Any

import pool
import pytest
import torch

CURVE = 2e-6
"""Relative, of losses and gradient norms over five steps in fp32. Adam's ε is 1e-4: where a gradient is no larger than
that, a weight moves by its rounding over ε, and one token's hidden z-loss shows it (2e-6 at 1e-5, 1e-7 at 1e-4)."""
GRADIENT = 5e-6
"""Of a parameter's largest gradient, or of a thousandth of the largest of all, below which sums that cancel (a key's
bias moves all scores alike) leave nothing but rounding."""

COUNTS = 6 + 3
"""Selections by expert, tokens, active experts and their squares: whole numbers in front of the tallies' sums."""

Layout = tuple[int, dict[str, Any]]
ONE_OF_A_KIND: dict[str, Layout] = {
    "tp2": (2, {"tensor": 2}),
    "tp2 sp": (2, {"tensor": 2, "sequence": True}),
    "pp2": (2, {"pipeline": 2}),
    "pp2 vpp2": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    "cp2": (2, {"context": 2}),
    "dp2": (2, {}),
    "dp2 distributed optimizer": (2, {"distributed_optimizer": True}),
    "ep2": (2, {"expert": 2}),
    "ep2 without overlap": (2, {"expert": 2, "overlap_moe": False}),
    "tp2 sp etp2": (2, {"tensor": 2, "sequence": True, "expert_tensor": 2}),
    "full recompute": (1, {"recompute": "full"}),
    "selective recompute": (1, {"recompute": "selective"}),
}
TOGETHER: dict[str, Layout] = {
    "tp2 sp pp2": (4, {"tensor": 2, "sequence": True, "pipeline": 2}),
    "tp2 ep2": (4, {"tensor": 2, "expert": 2}),
    "tp2 sp ep2 etp2": (4, {"tensor": 2, "sequence": True, "expert": 2, "expert_tensor": 2}),
    "tp2 sp ep4": (4, {"tensor": 2, "sequence": True, "expert": 4}),
    "pp2 ep2": (4, {"pipeline": 2, "expert": 2}),
    "pp2 vpp2 ep2 full recompute": (4, {"pipeline": 2, "virtual_pipeline": 2, "expert": 2, "recompute": "full"}),
    "cp2 ep2": (4, {"context": 2, "expert": 2}),
    "cp4": (4, {"context": 4}),
    "tp2 sp cp2": (4, {"tensor": 2, "sequence": True, "context": 2}),
    "tp2 cp2 selective recompute": (4, {"tensor": 2, "context": 2, "recompute": "selective"}),
    "pp4": (4, {"pipeline": 4}),
    "dp4": (4, {}),
    "dp4 ep2 distributed optimizer": (4, {"expert": 2, "distributed_optimizer": True}),
    "tp2 sp pp2 cp2 ep2": (8, {"tensor": 2, "sequence": True, "pipeline": 2, "context": 2, "expert": 2}),
    "tp2 sp pp2 vpp2 ep2 etp2 distributed optimizer": (
        8,
        {
            "tensor": 2,
            "sequence": True,
            "pipeline": 2,
            "virtual_pipeline": 2,
            "expert": 2,
            "expert_tensor": 2,
            "distributed_optimizer": True,
        },
    ),
}
MATRIX = [pytest.param(layout, id=name) for name, layout in ONE_OF_A_KIND.items()] + [
    pytest.param(layout, id=name, marks=pytest.mark.slow) for name, layout in TOGETHER.items()
]
DENSE = ("tp2", "tp2 sp cp2", "selective recompute", "dp4")
Results = list[dict[str, Any]]


def whole(results: Results, kind: str) -> dict[str, torch.Tensor]:
    """Parameters put together from all ranks' parts; what several ranks hold has to agree bit by bit."""
    found: dict[str, torch.Tensor] = {}
    for result in results:
        for name, shape, first, part in result[kind]:
            full = found.setdefault(name, torch.full(shape, torch.nan, dtype=part.dtype))
            window = full[tuple(slice(a, a + b) for a, b in zip(first, part.shape, strict=True))]
            assert window.isnan().all() or torch.equal(window, part), f"{name} differs between ranks"
            window.copy_(part)
    assert found
    assert not any(tensor.isnan().any() for tensor in found.values())
    return found


@pytest.fixture(scope="module")
def single(ranks: pool.Pools) -> Results:
    return ranks(1).run("jobs", "train")


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param("tp2 sp", marks=pytest.mark.latest),
        "cp2",
        "dp2",
        *(pytest.param(n, marks=pytest.mark.slow) for n in DENSE),
    ],
)
def test_dense_model_with_sva_inside(ranks: pool.Pools, layout: str) -> None:
    """Its layers within the language model ask with what each rank holds of the sequence."""
    (world, parallel), single = {**ONE_OF_A_KIND, **TOGETHER}[layout], ranks(1).run("jobs", "train", kind="dense")
    results = ranks(world).run("jobs", "train", kind="dense", **parallel)
    for result in results:
        for name in ("loss", "grad_norm"):
            assert result[name] == pytest.approx(single[0][name], rel=CURVE), name
    theirs = whole(single, "gradients")
    limit = max(float(gradient.abs().max()) for gradient in theirs.values()) / 1000
    for name, gradient in whole(results, "gradients").items():
        difference = float((gradient - theirs[name]).abs().max())
        # Behind the images stand a chain as long again and norms that go into linear maps of 16 columns: the rounding
        # of so many terms is √16 that of one.
        allowed = GRADIENT * (1 if name.startswith("language.") else 4)
        assert difference <= allowed * max(float(theirs[name].abs().max()), limit), f"{name}: {difference}"


@pytest.fixture(scope="module")
def saved(ranks: pool.Pools, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, tuple[str, Results]]:
    """One process' state after three steps, and its steps 4 to 6 from there, with the plain and with the distributed
    optimizer: their checkpoints are of two forms."""
    folder, found = tmp_path_factory.mktemp("layouts"), {}
    for distributed in (False, True):
        path = str(folder / str(distributed))
        ranks(1).run("jobs", "train", steps=3, save=(3, path), distributed_optimizer=distributed)
        results = ranks(1).run("jobs", "train", steps=3, first=3, load=path, distributed_optimizer=distributed)
        found[distributed] = path, results
    return found


def compare(results: Results, expected: dict[str, Any], first: int = 0) -> None:
    for result in results:
        for name in ("loss", "grad_norm", "balance_loss", "hidden_z_loss", "mtp_loss"):
            assert result[name] == pytest.approx(expected[name][first:], rel=CURVE), name
        assert result["gradient_ratio"] == pytest.approx(expected["gradient_ratio"][first:], rel=10 * CURVE)
        assert result["row_similarity"] == pytest.approx(expected["row_similarity"][first:], abs=CURVE)
        assert result["counts"] == expected["counts"][first:]


@pytest.mark.parametrize("layout", MATRIX)
def test_layout_equals_one_process(ranks: pool.Pools, single: Results, layout: Layout) -> None:
    world, parallel = layout
    results = ranks(world).run("jobs", "train", **parallel)
    compare(results, single[0])
    assert torch.equal(results[0]["tallies"][0][:, :COUNTS], single[0]["tallies"][0][:, :COUNTS])
    assert whole(results, "weights").keys() == whole(single, "weights").keys()
    if parallel.get("distributed_optimizer"):
        return  # no rank has a whole gradient
    ours, theirs = whole(results, "gradients"), whole(single, "gradients")
    assert ours.keys() == theirs.keys()
    floor = max(float(gradient.abs().max()) for gradient in theirs.values()) / 1000
    for name, gradient in theirs.items():
        bound = GRADIENT * max(float(gradient.abs().max()), floor)
        torch.testing.assert_close(ours[name], gradient, rtol=0, atol=bound, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("layout", MATRIX)
def test_goes_on_from_one_process_and_is_gone_on_from(
    ranks: pool.Pools, single: Results, saved: dict[bool, tuple[str, Results]], tmp_path: Path, layout: Layout
) -> None:
    world, parallel = layout
    distributed = parallel.get("distributed_optimizer", False)
    begin, alone = saved[distributed]
    there, path = ranks(world), str(tmp_path / "there")
    results = there.run("jobs", "train", steps=2, first=3, load=begin, save=(5, path), **parallel)
    compare(results, single[0], first=3)
    (read,), written = ranks(1).run("jobs", "read", folder=path), whole(results, "weights")
    assert read.keys() == written.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in written.items())
    back = ranks(1).run("jobs", "train", steps=1, first=5, load=path, distributed_optimizer=distributed)
    compare(back, alone[0], first=2)


@pytest.mark.parametrize("parallel", [{"pipeline": 2}, {"pipeline": 2, "distributed_optimizer": True}], ids=str)
def test_a_stage_with_nothing_to_train_saves_and_goes_on(
    ranks: pool.Pools, parallel: dict[str, Any], tmp_path: Path
) -> None:
    """The language model frozen, the last pipeline stage has no parameter of its own in training."""
    settings, path = {"frozen": ("language",), **parallel}, str(tmp_path / "saved")
    single = ranks(1).run("jobs", "train", frozen=("language",))
    whole = ranks(2).run("jobs", "train", save=(3, path), **settings)
    again = ranks(2).run("jobs", "train", steps=2, first=3, load=path, **settings)
    for name in ("loss", "grad_norm"):
        assert whole[0][name] == pytest.approx(single[0][name], rel=CURVE), name
        assert again[0][name] == whole[0][name][3:], name


@pytest.mark.parametrize("parallel", [{"tensor": 2, "sequence": True}, {"pipeline": 2}], ids=str)
def test_auxiliary_losses_of_frozen_layers(ranks: pool.Pools, parallel: dict[str, Any]) -> None:
    """Measured as by one process, and nobody's gradient."""
    frozen = ("language.decoder.layers", "language.mtp")
    single, split = (
        ranks(world).run("jobs", "train", steps=2, frozen=frozen, **layout)[0]
        for world, layout in ((1, {}), (2, parallel))
    )
    assert split["hidden_z_loss"][0] > 0
    assert all(math.isnan(loss) for loss in (*single["mtp_loss"], *split["mtp_loss"]))
    for name in ("loss", "grad_norm", "balance_loss", "hidden_z_loss"):
        assert split[name] == pytest.approx(single[name], rel=CURVE), name


@pytest.mark.parametrize("parallel", [{"tensor": 2}, {"pipeline": 2}], ids=str)
def test_larger_images_are_taken_over_on_the_grid_that_is_there(
    ranks: pool.Pools, parallel: dict[str, Any], tmp_path: Path
) -> None:
    results = ranks(2).run("jobs", "grow", folder=str(tmp_path), **parallel)
    for result in results:
        assert (result["ranks"].tensor_size, result["ranks"].pipeline_size) == (
            parallel.get("tensor", 1),
            parallel.get("pipeline", 1),
        )
        assert result["taken"]
    small, large = results[0]["positions"]
    square = small.view(1, 4, 4, -1).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(square, (8, 8), mode="bicubic").permute(0, 2, 3, 1).reshape(64, -1)
    torch.testing.assert_close(large, expected)


@pytest.mark.parametrize("kind", ["longcat", "dense"])
def test_recomputing_loses_no_gradient_behind_a_frozen_embedding(ranks: pool.Pools, kind: str) -> None:
    frozen = ("language.embedding", "encoders", "connector")
    plain, *others = (
        ranks(1).run("jobs", "train", steps=2, kind=kind, frozen=frozen, recompute=how)[0]["grad_norm"]
        for how in ("none", "selective", *(("full",) if kind == "longcat" else ()))
    )
    for norms in others:
        assert norms == pytest.approx(plain, rel=CURVE)


REPEATED = ("pp2 vpp2", "cp2", "dp2 distributed optimizer", "tp2 sp etp2")
"""The layouts that `make test` runs twice, `make test-full` all."""


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(layout, id=name, marks=[] if name in REPEATED else pytest.mark.slow)
        for name, layout in {**ONE_OF_A_KIND, **TOGETHER}.items()
    ],
)
def test_two_runs_are_equal_bit_by_bit(ranks: pool.Pools, layout: Layout) -> None:
    world, parallel = layout
    once, again = (ranks(world).run("jobs", "train", steps=3, **parallel) for _ in range(2))
    for one, other in zip(once, again, strict=True):
        for name in ("loss", "grad_norm", "balance_loss"):
            assert one[name] == other[name]
        for (name, _, _, a), (_, _, _, b) in zip(one["weights"], other["weights"], strict=True):
            assert torch.equal(a, b), name
