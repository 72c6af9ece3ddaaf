"""`mmoe bench data` on tiny files: that it runs and measures, not how fast."""

import json
import sys
from pathlib import Path

import pytest

from mmoe import cli

MISSING = "megatron-energon: not installed"
PEERS = ["raw DALI", "simplejpeg + OpenCV", "PIL"]


def test_every_row_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.json"
    # Its processes take ten seconds to start.
    monkeypatch.setitem(sys.modules, "megatron.energon", None)
    assert cli.main(["bench", "data", "--quick", "--skip", "webdataset", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())
    rows, rest = rows[:-3], rows[-3:]
    assert [(row["peer_name"], row["peer"], row["ratio"]) for row in rest] == [(MISSING, None, None)] * 3
    names = [f"data.{name}{which}" for name in ("dali", "simplejpeg", "pillow") for which in ("", ".processor")]
    assert [(row["name"], row["peer_name"]) for row in rows] == [(name, peer) for name in names for peer in PEERS]
    for row in rows:
        assert row["unit"] == ("images/CPU s" if row["name"].endswith("processor") else "images/s")
        assert row["ours"] > 0
        assert row["peer"] > 0
        assert row["ratio"] > 0
        assert row["met"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--only", "nvjpeg"], "there is no 'nvjpeg'"),
        (["--skip", "ffcv"], "there is no 'ffcv'"),
        (["--sweep"], "whole loaders"),
    ],
)
def test_what_it_does_not_have_is_refused(capsys: pytest.CaptureFixture[str], options: list[str], message: str) -> None:
    assert cli.main(["bench", "data", *options]) == 2
    assert message in capsys.readouterr().err
