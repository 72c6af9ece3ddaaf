"""`mmoe bench convert` runs, and its rows are what they say they are."""

import json
from pathlib import Path

import pytest

from benchmarks import convert
from mmoe import cli


def test_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "_peak", lambda name, folder, shard: 1 << 20)  # a process of its own each
    path = tmp_path / "rows.json"
    assert cli.main(["bench", "convert", "--quick", "--json", str(path)]) == 0
    rows = {row["name"]: row for row in json.loads(path.read_text())}
    assert rows.keys() == {"from_hf", "from_hf.memory", "to_hf", "to_hf.memory"}
    for name in ("from_hf", "to_hf"):
        row = rows[name]
        assert (row["peer_name"], row["unit"], row["target"]) == ("copy", "GB/s", 0.8)
        assert row["ratio"] == pytest.approx(row["ours"] / row["peer"])
        assert row["met"] is (row["ratio"] >= 0.8)
        memory = rows[f"{name}.memory"]
        assert (memory["ours"], memory["ratio"], memory["target"]) == (1.0, memory["peer"], 0.5)


def test_options_of_others(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "convert", "--sweep"]) == 2
    assert "`mmoe bench convert` has no parts" in capsys.readouterr().err
