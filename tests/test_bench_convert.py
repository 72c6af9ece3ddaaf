"""`mmoe bench convert` runs, and its rows are what they say they are."""

import json
from pathlib import Path

import pytest

from mmoe import cli


def test_rows(tmp_path: Path) -> None:
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
        assert (memory["peer_name"], memory["unit"], memory["target"]) == ("largest file", "MiB", 0.5)
        assert memory["ratio"] == pytest.approx(memory["peer"] / memory["ours"])
        # MiB, of a model of 6: its bytes are held once in the pieces, and the libraries are not counted.
        assert 1 < memory["ours"] < 100


def test_options_of_others(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "convert", "--sweep"]) == 2
    assert "unrecognized arguments: --sweep: see `mmoe bench convert --help`" in capsys.readouterr().err
