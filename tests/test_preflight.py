"""`mmoe doctor --preflight`: who is odd, by majority and median; on two real ranks with one of them altered."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pool
import pytest

from mmoe import preflight
from mmoe.cli import main
from mmoe.errors import UserError
from mmoe.preflight import Facts, Finding, judge, refuse

pytestmark = pytest.mark.latest


def ranks(count: int, **odd: dict[str, Any]) -> list[Facts]:
    """Equal facts but for those of the ranks that ``odd`` names (``r2``)."""
    alike: dict[str, Any] = {"versions": {"torch": "2.13"}, "code": "c" * 64, "operators": "o" * 64, "recipe": "r" * 64}
    alike |= {"clock": 0.0, "clock_error": 0.001, "free": 10**12, "all_reduce": 4e9, "all_to_all": 2e9}
    made = [Facts(rank=rank, host=f"node{rank // 2}", **alike) for rank in range(count)]
    return [dataclasses.replace(facts, **odd.get(f"r{facts.rank}", {})) for facts in made]


def test_equal_ranks_have_no_findings() -> None:
    assert judge(ranks(1)) == judge(ranks(8)) == []


@pytest.mark.parametrize(
    ("changes", "fatal", "what"),
    [
        ({"versions": {"torch": "2.12"}}, True, "torch is 2.12 on rank 5 (node2), 2.13 on 7 of 8 ranks"),
        ({"versions": {}}, True, "torch is missing on rank 5 (node2), 2.13 on 7 of 8 ranks"),
        ({"code": "0" * 64}, True, "the code of mmoe is 00000000 on rank 5 (node2), cccccccc on 7 of 8 ranks"),
        ({"recipe": ""}, True, "the recipe is none on rank 5 (node2), rrrrrrrr on 7 of 8 ranks"),
        ({"operators": ""}, False, "the library of operators is none on rank 5 (node2), oooooooo on 7 of 8 ranks"),
        ({"clock": 3600.0}, False, "the clock of rank 5 (node2) is 3600.0 s ahead (± 0.001 s)"),
        ({"clock": -2.5}, False, "the clock of rank 5 (node2) is 2.5 s behind (± 0.001 s)"),
        ({"free": 5 * 10**8}, False, "0.50 GB free in the run's folder on rank 5 (node2)"),
        ({"all_reduce": 1e9}, False, "all-reduce of rank 5 (node2) is 1.00 GB/s, the median 4.00"),
        ({"all_to_all": 9e8}, False, "all-to-all of rank 5 (node2) is 0.90 GB/s, the median 2.00"),
    ],
)
def test_the_odd_rank_is_named(changes: dict[str, Any], fatal: bool, what: str) -> None:
    assert judge(ranks(8, r5=changes)) == [Finding(what, fatal)]


def test_what_is_within_its_bounds_is_not_odd() -> None:
    near = {"clock": 0.9, "all_reduce": 2.1e9, "all_to_all": 1e9}
    unsure = {"clock": 5.0, "clock_error": 4.5}
    assert judge(ranks(8, r5=near, r3=unsure)) == []


def test_the_first_rank_can_be_the_odd_one() -> None:
    """Clocks are measured against its own: all the others are an hour behind it then."""
    others: dict[str, Any] = {f"r{rank}": {"clock": -3600.0} for rank in range(1, 8)}
    (clock,) = judge(ranks(8, **others))
    assert clock.what == "the clock of rank 0 (node0) is 3600.0 s ahead (± 0.001 s)"
    (code,) = judge(ranks(4, r0={"code": "0" * 64}))
    assert "00000000 on rank 0 (node0), cccccccc on 3 of 4" in code.what


def test_of_two_ranks_the_second_is_odd() -> None:
    found = judge(ranks(2, r1={"code": "0" * 64, "clock": -60.0}))
    assert [finding.what for finding in found] == [
        "the code of mmoe is 00000000 on rank 1 (node0), cccccccc on 1 of 2 ranks",
        "the clock of rank 1 (node0) is 60.0 s behind (± 0.001 s)",
    ]


def test_many_odd_ranks_are_one_line() -> None:
    odd: dict[str, Any] = {f"r{rank}": {"versions": {"torch": "1"}} for rank in range(9)}
    (finding,) = judge(ranks(32, **odd))
    assert finding.what == (
        "torch is 1 on ranks 0 (node0), 1 (node0), 2 (node1), 3 (node1) and 5 more, 2.13 on 23 of 32 ranks"
    )


def test_many_values_are_told_in_the_order_of_the_ranks() -> None:
    """Each rank judges for itself, and their hash seeds differ."""
    odd: dict[str, Any] = {f"r{rank}": {"code": f"{9 - rank}" * 64} for rank in range(1, 7)}
    found = [finding.what for finding in judge(ranks(16, **odd))]
    assert [line.split(" is ")[1][:2] for line in found] == ["88", "77", "66", "55", "44", "33"]


def test_errors_come_first_and_are_counted() -> None:
    found = judge(ranks(4, r1={"code": "0" * 64, "recipe": "0" * 64}, r2={"clock": 9.0}))
    assert [finding.fatal for finding in found] == [True, True, False]
    with pytest.raises(UserError, match=r"the code of mmoe is 00000000 on rank 1 .* \(and 1 more\)"):
        refuse(found)
    refuse(found[2:])


def test_the_code_is_what_the_sources_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight.mmoe, "__file__", str(tmp_path / "__init__.py"))
    (tmp_path / "a.py").write_text("a = 1")
    before = preflight.code()
    (tmp_path / "a.txt").write_text("no code")
    assert preflight.code() == before
    (tmp_path / "a.py").write_text("a = 2")
    changed = preflight.code()
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    assert len({before, changed, preflight.code()}) == 3


def test_free_space_of_a_folder_that_is_still_to_be_made(tmp_path: Path) -> None:
    assert preflight.free(tmp_path / "runs" / "new") > 0


@pytest.mark.parametrize("arguments", [["quickstart"], ["--out", "x"], ["--set", "train.steps=1"]])
def test_a_recipe_without_preflight_is_a_user_error(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", *arguments]) == 2
    assert "add --preflight" in capsys.readouterr().err


@pytest.fixture(scope="module")
def two() -> Iterator[pool.Pool]:
    with pool.pools() as everyone:
        yield everyone(2)


def compare(two: pool.Pool, what: str, out: Path, **options: Any) -> list[dict[str, Any]]:
    return two.run("preflight_jobs", "compare", odd=1, what=what, out=str(out), **options)


def test_two_equal_ranks_agree(two: pool.Pool, tmp_path: Path) -> None:
    assert compare(two, "nothing", tmp_path) == [{"warnings": []}] * 2


@pytest.mark.parametrize(
    ("what", "named"), [("code", "the code of mmoe"), ("recipe", "the recipe"), ("version", "megatron-core")]
)
def test_another_code_recipe_or_version_ends_both_ranks(two: pool.Pool, tmp_path: Path, what: str, named: str) -> None:
    first, second = compare(two, what, tmp_path)
    assert first == second
    assert first["error"].startswith(f"the ranks differ: {named} is ")
    assert " on rank 1 (" in first["error"]


def test_an_hour_between_clocks_is_a_warning(two: pool.Pool, tmp_path: Path) -> None:
    first, second = compare(two, "clock", tmp_path)
    assert first == second
    (line,) = first["warnings"]
    assert line.startswith("the clock of rank 1 (")
    assert "is 3600.0 s ahead" in line


def test_the_table_names_the_odd_rank_once(two: pool.Pool, tmp_path: Path) -> None:
    first, second = compare(two, "clock", tmp_path, whole=True)
    assert second == {"said": ""}
    assert first["said"].count("warning: the clock of rank 1 (") == 1
    assert "+3600.0" in first["said"]
    assert "torch 2." in first["said"]
    refused, alike = compare(two, "code", tmp_path, whole=True)
    assert refused["error"] == alike["error"]
    assert "error: the code of mmoe is 00000000 on rank 1 (" in refused["said"]
