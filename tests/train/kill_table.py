"""Prints the campaign of test_kill.py: python tests/train/kill_table.py [SEED ...]

The last column is the largest relative difference of a loss from that of the run which nobody killed.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = map(str, (HERE.parents[1], HERE.parent, HERE.parent / "data", HERE))

import training  # noqa: E402 - found through the line above
from kills import CASES, Campaign  # noqa: E402


def main() -> None:
    seeds = set(map(int, sys.argv[1:])) or {case.seed for case in CASES}
    print("| seed | rank | of | killed in | ended after | steps lost | went on with | training again after | loss |")
    print("|---|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        campaign = Campaign(Path(folder))
        for case in (case for case in CASES if case.seed in seeds):
            killed = campaign.kill(case)
            begin = time.time()
            rows, expected = campaign.resume(case), training.curve(campaign.whole(case.ranks))
            events = (campaign.folder(case) / "events.jsonl").read_text().splitlines()
            started = [event for event in map(json.loads, events) if event["event"] == "start"][-1]
            worst = max(abs(a["loss"] - b["loss"]) / b["loss"] for a, b in zip(rows, expected, strict=True))
            named = [line for line in killed.stderr.splitlines() if f"rank {case.victim} " in line]
            ended = f"{killed.seconds:.1f} s{'' if len(named) == 1 else ', not named'}"
            moment = f"{case.kind} {case.step or ''}".strip()
            print(
                f"| {case.seed} | {case.victim} | {case.ranks} | {moment} | {ended} | {killed.lost_steps} "
                f"| {case.then} | {started['time'] - begin:.1f} s | {worst:.0e} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
