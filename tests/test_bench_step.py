"""`mmoe bench step`: its sides do the same work, and its numbers are what they say they are."""

import json
from fnmatch import fnmatchcase
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import report
from benchmarks.training import breakdown, compare, flops, overlap, peers, sweep
from benchmarks.training.ours import Ours, batch, recipe, routings
from mmoe import cli


@pytest.fixture(scope="module")
def balanced() -> Ours:
    return Ours(recipe(quick=True), balanced=True)


def test_every_row_of_a_quick_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.json"
    assert cli.main(["bench", "step", "--quick", "--skip", "overlap", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())
    printed = capsys.readouterr().out
    found = {(row["name"], row["dtype"], row["peer_name"]) for row in rows}
    sides = ("transformers", "Megatron-Core", "gemm")
    assert found == {(name, dtype, side) for name in compare.all_names() for dtype in compare.DTYPES for side in sides}
    for row in rows:
        assert row["ours"] > 0
        assert row["target"] is None, "tiny shapes have no targets"
        assert row["ratio"] == pytest.approx(row["ours"] / (row["peer"] or row["ceiling"]))
        assert row["name"] in printed


def test_two_ranks_tell_what_they_wait_for() -> None:
    rows = {(row.name, row.shape): row for row in overlap.rows("float32", quick=True, threads=2)}
    assert len(rows) == 6
    for (name, _), row in rows.items():
        assert row.ours > 0
        assert row.peer is not None
        if name.startswith("overlap.exposed"):
            assert max(row.ours, row.peer) < 100


def test_a_slow_link_takes_bytes_over_rate_one_transfer_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=100.0)

    def sleep(seconds: float) -> None:
        clock.now += seconds

    monkeypatch.setattr(overlap, "time", SimpleNamespace(perf_counter=lambda: clock.now, sleep=sleep))
    waited: list[None] = []
    handle = SimpleNamespace(wait=lambda: waited.append(None))
    monkeypatch.setattr(overlap.dist, "all_to_all_single", lambda *_, **__: handle)
    link = overlap.SlowLink()
    link(None, torch.zeros(10))
    assert (link.bytes, clock.now) == (40, 100.0), "without a rate it is as fast as it goes"
    link.rate = 20.0
    first, second = (link(None, torch.zeros(10), async_op=True) for _ in range(2))
    clock.now += 1.5
    first.wait()
    assert (clock.now, link.slept) == (102.0, 0.5)
    second.wait()
    assert (clock.now, link.slept) == (104.0, 2.5)
    second.wait()
    assert clock.now == 104.0
    link(None, torch.zeros(10))
    assert (clock.now, link.bytes) == (106.0, 160), "whoever does not ask for async waits at once"
    assert len(waited) == 5, "for the transfer itself too"


@pytest.mark.slow
def test_a_quick_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "step", "--quick", "--sweep", "--out", str(tmp_path)]) == 0
    assert "written" in capsys.readouterr().out
    record = json.loads((tmp_path / "step_sweep.json").read_text())
    assert [point["tokens"] for point in record["tokens"]] == [32 * packs for packs in sweep.QUICK_PACKS]
    assert [point["zero_experts"] for point in record["zero_experts"]] == list(sweep.QUICK_ZERO_EXPERTS)
    for point in record["tokens"] + record["zero_experts"]:
        assert point["seconds"] > 0
        assert point["memory"] > 0
        assert point["active_experts"] == pytest.approx(4, rel=0.05)
    assert (tmp_path / "step_sweep.png").stat().st_size > 10_000


def test_a_quick_profile(tmp_path: Path) -> None:
    assert cli.main(["bench", "step", "--quick", "--profile", "--out", str(tmp_path)]) == 0
    page = (tmp_path / "profile.md").read_text()
    for part in {*breakdown.MODULES.values(), "matrix products", "optimizer", "gradient buffers"}:
        assert page.count(f"\n| {part} |") == 2, part


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["step", "--only", "router"], "mmoe: unrecognized arguments: --only router: see `mmoe bench step --help`"),
        (["step", "--sweep", "--profile"], "mmoe: two things at once (--sweep --profile): ask for one of them"),
        (
            ["step", "--sweep", "--json", "rows.json"],
            "mmoe: rows of peers are of neither --sweep nor --profile (--json, --skip): leave them out",
        ),
        *(
            (
                ["step", "--threads", wrong],
                f"mmoe: argument --threads: {wrong!r} is no whole number from 1 on: see `mmoe bench step --help`",
            )
            for wrong in ("0", "two")
        ),
        (
            ["step", "--skip", "eager"],
            "mmoe: there is no 'eager' (--skip): choose from transformers, megatron, overlap",
        ),
        (["ops", "--sweep"], "mmoe: unrecognized arguments: --sweep: see `mmoe bench ops --help`"),
    ],
)
def test_a_wrong_option_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", *arguments]) == 2
    assert capsys.readouterr().err.splitlines() == [message]


def test_balanced_means_even_loads_and_the_wanted_mean(balanced: Ours) -> None:
    moe = balanced.recipe.model.moe
    assert balanced.active_experts() == pytest.approx(moe.active_experts, rel=0.02)
    for scores, bias in routings(balanced.model, balanced.batch):
        loads = scores.add(bias).topk(moe.top_k).indices.flatten().bincount(minlength=moe.experts)[: moe.experts]
        assert loads.max() / loads.double().mean() < 1.1


def test_measured_steps_do_not_change_the_routing(balanced: Ours) -> None:
    before = balanced.active_experts()
    for _ in range(3):
        assert balanced.step().taken
    assert balanced.active_experts() == pytest.approx(before, rel=0.01)


def test_transformers_computes_the_same_loss() -> None:
    ours = Ours(recipe(quick=True), balanced=True)
    theirs = peers.Transformers(ours)
    for _ in range(3):
        assert theirs.step() == pytest.approx(ours.step().loss, rel=1e-5)


def test_the_model_of_megatron_has_as_many_active_weights() -> None:
    settings = recipe(quick=True)
    wanted = flops.active_weights(settings.model, settings.model.moe.active_experts)
    assert peers.Megatron(settings, batch(settings), balanced=True).weights == pytest.approx(wanted, rel=0.02)
    shape = recipe(quick=False).model.backbone
    plain = 4 * shape.hidden_size * shape.heads * peers.head_width(shape)
    assert plain == pytest.approx(flops.attention_weights(shape), rel=0.04)


def test_the_weights_that_count_are_those_of_the_model(balanced: Ours) -> None:
    model = balanced.recipe.model
    moe = model.moe
    active = 0.0
    for name, parameter in balanced.model.named_parameters():
        if "embedding" in name or parameter.dim() < 2:
            continue
        active += parameter.numel() * (moe.active_experts / moe.experts if ".experts." in name else 1)
    assert flops.active_weights(model, moe.active_experts) == active


def test_attention_counts_what_a_causal_mask_allows() -> None:
    model = recipe(quick=True).model
    shape = model.backbone
    one = flops.per_token(model, 4.0, 1)
    products = shape.heads * (shape.qk_nope_head_dim + shape.qk_rope_head_dim + shape.v_head_dim)
    # 101 keys rather than 1 for the mean token, in two attentions a layer; 2 operations a product, 3 passes.
    assert flops.per_token(model, 4.0, 201) - one == 100 * 6 * 2 * shape.layers * products


def test_a_line_and_a_level() -> None:
    points = [sweep.Point(1, 4, 10 * i, 4.0, 1 + 2.0 * i, 0.0, 5.0) for i in (1, 2, 4)]
    found = sweep._linear([p.tokens for p in points], points)
    assert found["seconds_per_token"] == pytest.approx(0.2)
    assert found["seconds_fixed"] == pytest.approx(1)
    assert found["seconds_worst_deviation"] == pytest.approx(0, abs=1e-12)
    assert sweep._flat(points) == {"seconds": pytest.approx(9 / 3 - 1), "memory": 0}


def test_an_operator_of_the_backward_belongs_to_the_part_of_its_forward() -> None:
    def event(name: str, number: int, scope: int, parent: object = None) -> SimpleNamespace:
        return SimpleNamespace(name=name, sequence_nr=number, scope=scope, cpu_parent=parent, self_cpu_time_total=1.0)

    step = event("part: rest", -1, 7)
    norm = event("part: norms", -1, 7, step)
    view, made = event("aten::view", 5, 0, step), event("aten::mul", 5, 0, norm)
    node = event("MulBackward0", 5, 1, event("autograd::engine::evaluate_function: MulBackward0", 5, 0, step))
    inner = event("aten::mul", 9, 0, node)
    product = event("aten::mm", 6, 0, norm)
    grad = event("aten::add_", -1, 0, event("torch::autograd::AccumulateGrad", 7, 1, step))
    found = breakdown.parts([step, norm, view, made, product, node, inner, grad])
    assert {part: count for part, (_, count) in found.items()} == {
        "Python between operators": 2,
        "rest": 1,
        "norms": 3,
        "matrix products": 1,
        "gradient buffers": 1,
    }


def test_targets_are_of_rows_that_exist() -> None:
    names = {*compare.all_names(), "overlap.exposed all-to-all"}
    of_steps = [target for target in report.load_targets() if target.name.startswith(("step.", "overlap."))]
    assert len(of_steps) == 3
    for target in of_steps:
        assert any(fnmatchcase(name, target.name) for name in names)
