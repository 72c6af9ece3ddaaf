"""kill -9 of a rank at a moment drawn at random: every rank ends within a minute, one line names the lost one, and a
restart, at another number of ranks too, goes on from the last whole checkpoint and equals the run that nobody killed.

`make test` runs three of the thirty, `make test-full` all; `python tests/train/kill_table.py` prints them.
"""

import json
import re
import socket
from pathlib import Path

import pytest
import training
from kills import CASES, EVERY, OFTEN, Campaign, Case

CURVE = 2e-6
"""Relative, of losses and gradient norms where the run went on at another number of ranks."""


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Campaign:
    return Campaign(tmp_path_factory.mktemp("kills"))


def events(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=case.name, marks=[] if case.seed in OFTEN else pytest.mark.slow) for case in CASES],
)
def test_a_killed_rank_costs_the_steps_since_the_last_checkpoint(campaign: Campaign, case: Case) -> None:
    killed = campaign.kill(case)
    assert killed.left == []
    lines = [line for line in killed.stderr.splitlines() if line.startswith("mmoe: ")]
    assert len(lines) == 1, killed.stderr
    if case.kind == "start":
        # Before the ranks know each other the agent alone sees it, and ends the others.
        assert killed.seconds < 60
        assert re.match(rf"mmoe: rank {case.victim} (on \S+ is lost|was killed by SIGKILL)", lines[0])
    else:
        # Sooner than the agent would end them by force.
        assert killed.seconds < 40
        assert killed.status == 69
        assert lines[0].startswith(f"mmoe: rank {case.victim} on {socket.gethostname()} is lost: ")
    assert "Traceback" not in killed.stderr
    # The checkpoint under way when a rank is killed is lost, so that of the interval before it is gone back to.
    assert killed.lost_steps < 2 * EVERY
    rows, expected = campaign.resume(case), training.curve(campaign.whole(case.ranks))
    start = [event for event in events(campaign.folder(case)) if event["event"] == "start"][-1]
    assert (start["step"], start["lost_steps"], start["ranks"]) == (killed.saved, killed.lost_steps, case.then)
    if case.then == case.ranks:
        assert rows == expected
    for row, other in zip(rows, expected, strict=True):
        for name in ("loss", "grad_norm"):
            assert row[name] == pytest.approx(other[name], rel=CURVE)
        assert (row["tokens"], row["samples"]) == (other["tokens"], other["samples"])
