"""`mmoe bench checkpoint` on a tiny model: that it runs and measures, not how fast."""

import json
from pathlib import Path

import pytest

from mmoe import cli


def test_every_row_is_measured(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    assert cli.main(["bench", "checkpoint", "--quick", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())
    names = ["stall", "stall", "step while it is written", "whole, asynchronous = false", "verified and loaded"]
    assert [row["name"] for row in rows] == names
    for row in rows:
        assert row["ratio"] == pytest.approx(row["peer"] / row["ours"])
        assert row["ours"] > 0


def test_options_of_other_benchmarks_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "checkpoint", "--sweep"]) == 2
    assert "unrecognized arguments: --sweep: see `mmoe bench checkpoint --help`" in capsys.readouterr().err
