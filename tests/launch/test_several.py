"""launch/several.py: each process takes its share of the commands, and what one prints stays together."""

import importlib.util
from pathlib import Path

import pytest

from mmoe import cli


@pytest.mark.parametrize(
    ("number", "done", "status"), [("0", ["evaluate a -", "evaluate c"], 0), ("1", ["evaluate b --as x"], 2)]
)
def test_a_process_runs_its_commands_until_one_fails(
    root: Path, number: str, done: list[str], status: int,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    spec = importlib.util.spec_from_file_location("several", root / "launch" / "several.py")
    assert spec is not None
    assert spec.loader is not None
    several = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(several)
    ran: list[str] = []

    def main(arguments: list[str]) -> int:
        ran.append(" ".join(arguments))
        print(f"result of {arguments[1]}")
        return 2 if arguments[1] == "b" else 0

    monkeypatch.setattr(cli, "main", main)
    commands = [["first", "mmoe", "evaluate", "a", "-"], ["second", "mmoe", "evaluate", "b", "--as", "x"]]
    commands += [["third", "mmoe", "evaluate", "c"], ["fourth", "mmoe", "evaluate", "d"]]
    assert several.main([number, "2", *(word for command in commands for word in ("--", *command))]) == status
    assert ran == done
    told = capsys.readouterr().out
    assert told.startswith("── first\nresult of a\n" if number == "0" else "── second\nresult of b\n")
