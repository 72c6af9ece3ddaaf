"""`mmoe bench ops --emulated` counts every operator, and its sums and verdicts are those of the counters."""

import json
from pathlib import Path

import pytest

from benchmarks import emulated as benchmark
from benchmarks.case import MoeShape, SvaShape
from benchmarks.operators import OPERATORS
from mmoe import cli


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = [MoeShape("tiny", 5, 8, 3, 2, 128)]
    for name, shapes in {"MOE": tiny, "ROUTING": tiny, "SVA": SvaShape("tiny", 1, 2, 2, 8, (1, 2))}.items():
        monkeypatch.setattr(benchmark, name, shapes)


def test_every_operator_is_counted(need_emulator: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.json"
    assert cli.main(["bench", "ops", "--emulated", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())
    printed = capsys.readouterr().out
    assert set(benchmark.OPERATORS) <= {row["name"] for row in rows}
    assert set(OPERATORS) - set(benchmark.OPERATORS) == {"grouped_linear"}, "on CUDA it is torch's, the others are ours"
    calls = [row for row in rows if not row["kernel"]]
    for call in calls:
        assert call["name"] in printed
        assert call["bytes_ratio"] == pytest.approx(call["bytes"] / call["floor"])
        wanted = call["bytes_ratio"] <= 1.10 and call["sector_ratio"] <= 1.05 and call["bank_conflicts"] == 0
        assert call["met"] is wanted
    assert sum(row["bytes"] for row in rows if row["kernel"]) == sum(call["bytes"] for call in calls)


def test_the_floor_of_a_call_is_its_tensors_and_results(need_emulator: None) -> None:
    call = next(benchmark.hidden_z_loss())
    z = call.arguments[0]
    row = benchmark.measure(call)[0]
    # z; and the results: loss, a log-sum a token, and the count.
    assert row.floor == z.nbytes + 4 + 4 * len(z) + 4
    # Beyond that, the mean reads the log-sums.
    assert row.bytes == row.floor + 4 * len(z)


def test_what_is_not_an_operator_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "ops", "--emulated", "--only", "grouped_linear"]) == 2
    assert "there is no 'grouped_linear' (--only): choose from hidden_z_loss" in capsys.readouterr().err
