"""The time of a run that was killed, went on with fewer ranks, was interrupted and finished."""

import json
from pathlib import Path

import pytest

from mmoe.errors import UserError
from mmoe.evaluate import history, report
from mmoe.evaluate.goodput import account
from mmoe.recipe import dump_recipe, load_recipe


def start(time: float, step: int, ranks: int, lost: int) -> dict:
    return {
        "time": time, "event": "start", "step": step, "ranks": ranks, "hosts": ["a", "b"][: ranks // 2],
        "attempt": 0, "lost_steps": lost, "lost_seconds": 2.0 * lost,
    }  # fmt: skip


EVENTS = [
    start(100.0, 0, 4, 0),
    {"time": 112.0, "event": "checkpoint", "step": 4, "stall": 0.5, "seconds": 1.5, "bytes": 10},
    start(130.0, 4, 2, 3),
    {"time": 140.0, "event": "checkpoint", "step": 6, "stall": 0.25, "seconds": 1.0, "bytes": 10},
    {"time": 141.0, "event": "end", "step": 6, "how": "interrupted", "why": "stopped after step 6 of 8"},
    start(150.0, 6, 2, 0),
    {"time": 160.0, "event": "end", "step": 8, "how": "done", "why": ""},
]
ROWS = [{"step": step, "seconds": 2.0} for step in range(1, 9)]


def test_where_the_time_went() -> None:
    found = account(EVENTS, ROWS, until=158.0)
    assert found is not None
    assert (found.wall, found.steps, found.lost, found.checkpoints) == (60.0, 16.0, 6.0, 0.75)
    assert found.share == pytest.approx(16 / 60)
    assert [one.before for one in found.starts] == ["", "killed", "interrupted: stopped after step 6 of 8"]
    assert [(one.step, one.ranks, one.lost_steps) for one in found.starts] == [(0, 4, 0), (4, 2, 3), (6, 2, 0)]
    assert account(EVENTS[:1], ROWS[:3], until=107.0).wall == 7.0  # type: ignore[union-attr]
    assert account([], ROWS, until=1.0) is None


def test_the_page_lists_the_starts(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(
        dump_recipe(load_recipe("quickstart", ["train.steps=8", "optimizer.warmup_steps=2"]))
    )
    row = {"loss": 1.0, "lr": 1e-3, "grad_norm": 1.0, "tokens": 10, "samples": 1, "zero_expert_share": 0.4}
    rows = [{**row, "active_experts_mean": 1.5, "expert_load_max": 1.0, **each} for each in ROWS]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in EVENTS))
    (tmp_path / "metrics.jsonl").touch()
    report.write(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "<dt>restarts</dt><dd>2</dd>" in page
    assert "6.0 s in steps done again after a restart" in page
    assert "1970-01-01 00:02:10 UTC</td><td>4</td><td>2</td><td>3</td><td>6.0</td><td>a</td><td>killed</td>" in page
    (tmp_path / "events.jsonl").write_text('{"event": "start"}\n')
    with pytest.raises(UserError, match="not what training writes"):
        history.read(tmp_path)
