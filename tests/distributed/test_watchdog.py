"""The watchdog names rank and collective, once a stall, and says nothing where none is."""

import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import training

from mmoe.parallel.stalls import Entry, Record, judge


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What two ranks wrote to stderr in each scenario of stalling.py."""
    log = tmp_path_factory.mktemp("stalling") / "log"
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    shared = training.environment() | {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    command = [sys.executable, str(Path(__file__).with_name("stalling.py")), str(log)]
    with log.open("a") as file:
        ranks = [subprocess.Popen(command, env=shared | {"RANK": str(r)}, stderr=file) for r in (0, 1)]
        try:
            codes = [process.wait(timeout=300) for process in ranks]
        finally:
            for process in ranks:
                process.kill()
                process.wait()
    assert codes == [0, 0], log.read_text()
    parts = re.split(r"^== (\w+)\n", log.read_text(), flags=re.MULTILINE)
    return {
        name: [line for line in text.splitlines() if "watchdog" in line]
        for name, text in zip(parts[1::2], parts[2::2], strict=True)
    }


STALLS = {
    "never_enters": (
        r"mmoe: watchdog: rank 0 has waited \d+ s in all_to_all_single #2 float32 \[4, 3\] of experts \(ranks 0, 1\) "
        r"at .*stalling\.py:\d+ never_enters; rank 1 has not entered it: at .*stalling\.py:\d+ told"
    ),
    "never_enters_before_wait": (
        r"mmoe: watchdog: rank 1 has waited \d+ s in all_reduce #\d+ float32 \[2\] of default_pg \(ranks 0, 1\) "
        r"at .*stalling\.py:\d+ never_enters_before_wait; rank 0 has not entered it: at .*stalling\.py:\d+ told"
    ),
    "nothing_sent": (
        r"mmoe: watchdog: rank 1 has waited \d+ s in send/receive #1 float32 \[3\] of default_pg 0 → 1 \(ranks 0, 1\) "
        r"at .*stalling\.py:\d+ nothing_sent; rank 0 has not entered it: at .*stalling\.py:\d+ told"
    ),
    "batch_not_sent": (
        r"mmoe: watchdog: rank 0 has waited \d+ s in send/receive #\d float32 \[3\] of default_pg (0 → 1|1 → 0) .*"
        r"batch_not_sent; rank 1 has not entered it: at .*stalling\.py:\d+ told"
    ),
    "stopped": (
        r"mmoe: watchdog: rank 0 has waited \d+ s in barrier #\d+ of default_pg \(ranks 0, 1\) at .*stalling\.py:\d+ "
        r"stopped; rank 1 is stopped or dead: not heard of for \d+ s, was at .*"
    ),
    "stopped_with_the_store": (
        r"mmoe: watchdog: rank 1 has waited \d+ s in barrier #\d+ of default_pg \(ranks 0, 1\) at .*stalling\.py:\d+ "
        r"stopped_with_the_store; of the others nothing is known: the job's store does not answer, .*"
    ),
    "standing_still": (
        r"mmoe: watchdog: rank 0 has waited \d+ s in all_reduce #1 float32 \[2\] of default_pg \(ranks 0, 1\) "
        r"at .*stalling\.py:\d+ standing_still; rank 1 has not entered it: at .*stalling\.py:\d+ told"
    ),
    "different_collectives": (
        r"mmoe: watchdog: rank (0|1) has waited \d+ s in (all_reduce|all_to_all_single) #1 float32 \[4\] of confused "
        r"\(ranks 0, 1\) at .*different_collectives; rank (?!\1)\d entered (?!\2)\w+ #1 float32 \[4\] instead, at .*"
    ),
}


@pytest.mark.parametrize("scenario", STALLS)
def test_a_stall_is_one_line(lines: dict[str, list[str]], scenario: str) -> None:
    assert len(lines[scenario]) == 1, lines[scenario]
    assert re.fullmatch(STALLS[scenario], lines[scenario][0])


@pytest.mark.parametrize("scenario", ["healthy", "saving"])
def test_nothing_is_said_of_a_run_that_goes_on(lines: dict[str, list[str]], scenario: str) -> None:
    assert lines[scenario] == []


def entry(group: str, sequence: int, ranks: list[int], name: str = "all_reduce") -> Entry:
    return Entry(group, group, ranks, sequence, name, f"{name} #{sequence}", "a.py:1 f")


def record(*entries: Entry, wait: float | None = None, phase: tuple[str, float] | None = None) -> Record:
    """A rank that has entered these, and waits in the last one."""
    waits = [] if wait is None else [(entries[-1], wait)]
    return Record({e.group: e for e in entries}, waits, "b.py:2 g", phase)


PAIR, OTHER = entry("pair", 5, [0, 1]), entry("other", 9, [1, 2])


def test_the_rank_at_the_end_of_a_chain_is_named() -> None:
    """Rank 0 waits for rank 1, which waits for rank 2."""
    records = {
        0: record(PAIR, wait=40),
        1: record(entry("pair", 4, [0, 1]), OTHER, wait=35),
        2: record(entry("other", 8, [1, 2])),
    }
    verdict = judge(records, {}, 30)
    assert verdict is not None
    line, groups = verdict
    assert line == (
        "rank 1 has waited 35 s in all_reduce #9 of other (ranks 1, 2) at a.py:1 f; "
        "rank 2 has not entered it: at b.py:2 g"
    )
    assert groups == {"pair", "other"}


@pytest.mark.parametrize(("seconds", "said"), [(200.0, False), (301.0, True)])
def test_a_phase_excuses_those_who_wait_for_it_up_to_ten_limits(seconds: float, said: bool) -> None:
    records = {
        0: record(PAIR, wait=200),
        1: record(entry("pair", 4, [0, 1]), OTHER, wait=200),
        2: record(entry("other", 8, [1, 2]), phase=("saving a checkpoint", seconds)),
    }
    verdict = judge(records, {}, 30)
    assert (verdict is not None) == said
    if verdict:
        assert verdict[0].endswith("rank 2 has not entered it: saving a checkpoint for 301 s, at b.py:2 g")


def test_a_phase_does_not_excuse_a_rank_that_is_silent() -> None:
    records = {0: record(PAIR, wait=31), 1: record(entry("pair", 4, [0, 1]), phase=("saving a checkpoint", 20))}
    verdict = judge(records, {1: 25.0}, 30)
    assert verdict is not None
    assert "rank 1 is stopped or dead: not heard of for 25 s, was at b.py:2 g" in verdict[0]


def test_a_wait_below_the_limit_is_none_of_its_business() -> None:
    assert judge({0: record(PAIR, wait=29), 1: record(entry("pair", 4, [0, 1]))}, {}, 30) is None


def test_all_have_entered_it() -> None:
    verdict = judge({0: record(PAIR, wait=31), 1: record(PAIR, wait=32)}, {}, 30)
    assert verdict is not None
    assert verdict[0].startswith("ranks 0, 1 have waited 31 s in all_reduce #5 of pair")
    assert verdict[0].endswith("all of them have entered it")


@pytest.mark.parametrize("last", [record(PAIR, wait=1), record(PAIR)])
def test_one_that_has_just_entered_or_has_its_result_holds_nobody_up(last: Record) -> None:
    assert judge({0: record(PAIR, wait=300), 1: last}, {}, 30) is None


def test_a_record_survives_the_store() -> None:
    before = record(PAIR, OTHER, wait=1.5, phase=("loading a checkpoint", 2.0))
    assert Record.load(before.dump().encode()) == before


def test_many_ranks_are_counted() -> None:
    everyone = entry("all", 2, list(range(40)))
    records = {r: record(everyone, wait=31) if r < 20 else record(entry("all", 1, [])) for r in range(40)}
    verdict = judge(records, {}, 30)
    assert verdict is not None
    assert verdict[0].startswith("ranks 0, 1, 2, 3, 4, 5, 6, 7, … 20 in all have waited 31 s")
    assert verdict[0].endswith("12 more ranks have not either")
    assert len(verdict[0]) < 1000
