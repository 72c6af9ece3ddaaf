"""The benchmarks run, their peers compute what ours compute, and their statistics are what they say they are."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import allocator, measure, report
from benchmarks.case import Case
from benchmarks.operators import OPERATORS, TOGETHER, module
from benchmarks.report import Row, Target
from mmoe import bench, cli

FIELDS = {"name", "shape", "dtype", "ours", "peer", "peer_name", "unit", "ratio", "ceiling", "target", "met", "spread"}


def quick_cases() -> list[Case]:
    return [case for name in (*OPERATORS, *TOGETHER) for case in module(name).cases(True)]


def test_every_row_of_a_quick_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.json"
    assert cli.main(["bench", "ops", "--quick", "--skip", "compile", "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    rows = json.loads(path.read_text())
    assert all(set(row) == FIELDS for row in rows)
    wanted = {f"{case.operator}.{which}" for case in quick_cases() for which in case.passes}
    assert wanted < {row["name"] for row in rows}
    assert all(row["name"] in printed for row in rows)
    for row in rows:
        assert row["ours"] > 0
        assert row["peer_name"] != "compile"
        assert (row["target"], row["met"]) == (None, None), "tiny shapes have no targets"
        if row["unit"] in ("ms", "MiB") and row["peer"]:
            assert row["ratio"] == pytest.approx(row["peer"] / row["ours"])
        if row["peer_name"] == "triad":
            assert row["ratio"] == pytest.approx(row["ours"] / row["ceiling"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["oops"], "invalid choice: 'oops'"),
        (["ops", "--only", "rooter"], "mmoe: there is no 'rooter' (--only): choose from hidden_z_loss, router"),
        (["ops", "--skip", "numpy"], "mmoe: there is no 'numpy' (--skip): choose from eager"),
    ],
)
def test_a_wrong_name_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1
    assert message in printed.err


def test_an_installed_package_has_no_benchmarks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "mmoe" / "bench.py"))
    assert cli.main(["bench", "ops"]) == 2
    assert "run this from a checkout of mmoe" in capsys.readouterr().err


@pytest.mark.parametrize("case", quick_cases(), ids=lambda case: f"{case.operator}-{case.dtype_name}")
def test_peers_do_the_same_work(case: Case) -> None:
    """Outputs, and where both sides differentiate the same inputs, gradients."""
    torch.manual_seed(0)
    workload = case.build()
    # Sums of a few dozen products of size 1, in another order: a few dozen roundings of the storage type.
    tolerance = 32 * torch.finfo(case.dtype).eps if case.dtype.is_floating_point else 0
    ours = results(workload.ours)
    for name in {"eager", "released", "transformers", "Megatron-Core"} & set(workload.peers):
        # Megatron-Core has no zero experts: its unpermute is without identity. Routers elsewhere give weights alone.
        if (name, case.operator) in {("Megatron-Core", "unpermute"), ("Megatron-Core", "permute_unpermute")}:
            continue
        if case.operator == "router" and name != "eager":
            continue
        theirs = results(workload.peers[name])
        assert len(theirs) == len(ours)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * max(1.0, b.abs().max().item()))


def results(side: measure.Side) -> list[torch.Tensor]:
    out = side.forward()
    out = [out] if isinstance(out, torch.Tensor) else list(out)
    if not side.inputs:
        return out
    torch.manual_seed(1)
    return [*out, *torch.autograd.grad(out, side.inputs, [torch.randn_like(part) for part in out])]


def test_transformers_routing_has_our_weights() -> None:
    (case,) = module("router").cases(True)
    workload = case.build()
    weights, *_ = workload.ours.forward()
    theirs = workload.peers["transformers"].forward()
    torch.testing.assert_close(theirs.sort(descending=True).values, weights.sort(descending=True).values)


def test_sides_run_in_turn_and_the_first_calls_do_not_count() -> None:
    order: list[str] = []

    def run_of(name: str, seconds: list[float]) -> measure.Run:
        def run(calls: int) -> float:
            assert calls == 1
            order.append(name)
            return seconds[min(order.count(name), len(seconds)) - 1]

        return run

    effort = measure.Effort(seconds=0, least=3)
    a, b = measure.alternate(run_of("a", [9, 9, 1, 2, 4]), run_of("b", [9, 9, 2, 2, 2]), effort)
    assert "".join(order) == "aabb" + "ab" * 3
    assert (a.seconds, a.samples, b.seconds) == (2, 3, 2)
    assert a.spread == pytest.approx((3 - 1.5) / 2)
    assert b.spread == 0


def test_long_calls_are_sampled_less() -> None:
    effort = measure.Effort(seconds=0, least=5, enough=3, longest=0)
    assert measure.alternate(lambda _: 1.0, lambda _: 1.0, effort)[0].samples == 3


def test_short_calls_are_timed_in_groups() -> None:
    assert measure.calls_of(1.0) == 1
    assert measure.calls_of(measure.SAMPLE_SECONDS / 3.5) == 4
    assert measure.calls_of(0.0) == measure.MOST_CALLS


def test_backward_times_one_fresh_graph_a_call() -> None:
    x = torch.ones(3, requires_grad=True)
    forwards = []

    def forward() -> torch.Tensor:
        forwards.append(None)
        return x.square()

    assert measure.backward(measure.Side(forward, [x]))(4) > 0
    assert len(forwards) == 4
    assert x.grad is None


def test_the_pool_hands_out_the_same_pages_again(root: Path) -> None:
    script = """
import ctypes, torch
empty = lambda mebibytes: torch.empty(mebibytes * 2**18)
def pages():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1]) // 1024

a, b = empty(64).fill_(1), empty(64).fill_(2)
assert a.data_ptr() != b.data_ptr()
first = a.data_ptr()
del a
full = pages()
c = empty(60).fill_(3)  # fits with little waste
assert c.data_ptr() == first and b[-1] == 2 and pages() - full < 8
d = empty(8).fill_(4)
assert d.data_ptr() != first
del b, c
ctypes.CDLL(None).mmoe_release_pages()
assert full - pages() > 100 and d[-1] == 4
"""
    allocator.build()
    environment = os.environ | {"LD_PRELOAD": str(allocator.LIBRARY)}
    done = subprocess.run([sys.executable, "-c", script], cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_one_sample_has_no_spread() -> None:
    assert measure.timing([3.0]) == (3.0, 0.0, 1)


def test_the_first_target_that_matches_counts() -> None:
    targets = [Target("a.*", "eager", 4.0, shape="* T 8192"), Target("*.forward", "eager", 1.0)]
    row = Row("a.forward", "small T 8192", "float32", 1.0, 2.0, "eager", ratio=2.0)
    assert (report.judge(row, targets).target, report.judge(row, targets).met) == (4.0, False)
    row.shape = "small T 1024"
    assert (report.judge(row, targets).target, report.judge(row, targets).met) == (1.0, True)
    row.peer_name = "transformers"
    assert (report.judge(row, targets).target, report.judge(row, targets).met) == (None, None)


def test_every_target_is_of_a_row() -> None:
    rows = []
    for name in (*OPERATORS, *TOGETHER):
        for case in module(name).cases(False):
            passes = [*case.passes, *(["memory"] if case.memory else [])]
            rows += [Row(f"{name}.{which}", case.shape, case.dtype_name, 1.0, ratio=1.0) for which in passes]
    of_operators = [
        t
        for t in report.load_targets()
        if not t.name.startswith(("step.", "overlap.", "data.", "from_hf", "to_hf", "*_hf"))
    ]
    for target in of_operators:
        named = [row for row in rows if Target(target.name, "*", 0, target.shape, target.dtype).matches(row)]
        assert named, target
        assert math.isfinite(target.ratio)


def test_numbers_have_three_digits() -> None:
    shown = {0.01234: "0.0123", 1.0: "1", 12.34: "12.3", 1234.5: "1,234", None: ""}
    assert {value: report.number(value) for value in shown} == shown
