"""Exit statuses, one-line errors, the ranks' silence and the help pages."""

import io
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from mmoe import cli
from mmoe.checkpoint import layout
from mmoe.errors import Interrupted, RankLost, UserError

COMMANDS = [
    ["train"],
    ["recipes"],
    ["evaluate"],
    ["generate"],
    ["convert", "from-hf"],
    ["convert", "from-parts"],
    ["convert", "to-hf"],
    ["convert", "verify"],
    ["convert", "grow"],
    ["data", "prepare"],
    ["data", "lint"],
    ["data", "stats"],
    ["report"],
    ["doctor"],
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_has_help_with_an_example_that_parses(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([*command, "--help"])
    assert caught.value.code == 0
    example = re.search(r"example: mmoe (.+)\Z", capsys.readouterr().out, re.DOTALL)
    assert example is not None
    arguments = shlex.split(example[1])
    assert arguments[: len(command)] == command
    assert callable(cli._parser(arguments).parse_args(arguments).run)


def test_help_imports_nothing_heavy() -> None:
    code = "import sys, mmoe.cli; mmoe.cli._parser([]); print({'torch', 'numpy', 'rich'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ([], "the following arguments are required: COMMAND: see `mmoe --help`"),
        (["recepies"], "invalid choice: 'recepies'"),
        (["recipes", "none.toml"], "no such recipe file (none.toml)"),
        (["recipes", "quickstart", "--set", "train.stepps=3"], "did you mean 'train.steps'?"),
        (["recipes", "quickstart", "--set", "train.steps=x"], "must be an integer, found the string 'x'"),
        (["train", "quickstart", "--steps", "3"], "unrecognized arguments: --steps 3"),
        (["generate", "x"], "the following arguments are required: --prompt: see `mmoe generate --help`"),
    ],
)
def test_user_errors_are_one_line_and_status_2(
    arguments: list[str], what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1
    assert printed.err.startswith("mmoe: ")
    assert what in printed.err


def ended_with(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> int:
    def run(options: object) -> None:
        print("normal output")
        raise error

    monkeypatch.setattr(cli, "_doctor", run)
    return cli.main(["doctor"])


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (UserError("no data", "there", "prepare it"), 2, "mmoe: no data (there): prepare it\n"),
        (Interrupted("saved at step 3"), 75, "mmoe: saved at step 3\n"),
        (RankLost("rank 3 is lost", 69, tell=True), 69, "mmoe: rank 3 is lost\n"),
        (RankLost("ended after rank 3: no data", 2, tell=False), 2, ""),
        (KeyboardInterrupt(), 130, "mmoe: stopped by the keyboard\n"),
    ],
)
def test_statuses(
    error: BaseException,
    status: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert ended_with(error, monkeypatch) == status
    assert capsys.readouterr() == ("normal output\n", message)


def test_a_defect_shows_its_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert ended_with(ValueError("broken"), monkeypatch) == 1
    printed = capsys.readouterr().err
    assert "Traceback (most recent call last)" in printed
    assert printed.endswith("ValueError: broken\n")


def test_other_ranks_print_only_their_errors_with_their_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert ended_with(UserError("no data"), monkeypatch) == 2
    assert capsys.readouterr() == ("", "mmoe: rank 1: no data\n")


def test_ranks_under_a_launcher_tell_an_error_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("MMOE_STATUS_FILE", str(tmp_path / "statuses"))
    errors = [UserError("no data"), UserError("no data"), UserError("no picture"), ConnectionError("closed by peer")]
    statuses = []
    for rank, error in enumerate(errors):
        monkeypatch.setenv("RANK", str(rank))
        statuses.append(ended_with(error, monkeypatch))
    assert statuses == [2, 2, 2, 1]
    assert capsys.readouterr().err.splitlines() == [
        "mmoe: rank 0: no data",
        "mmoe: rank 2: no picture",
        "mmoe: rank 3: ended after rank 0: ConnectionError: closed by peer",
    ]


def test_a_line_is_one_write(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines of several ranks on one pipe must not mix."""
    writes: list[str] = []
    stream = io.StringIO()
    monkeypatch.setattr(stream, "write", writes.append)
    monkeypatch.setattr(sys, "stderr", stream)
    assert ended_with(UserError("no data"), monkeypatch) == 2
    assert writes == ["mmoe: no data\n"]


def test_verify_checks_one_checkpoints_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = layout.folder(tmp_path, 3)
    folder.mkdir(parents=True)
    (folder / "progress.json").write_text("{}")
    layout.write_manifest(folder, {})
    assert cli.main(["convert", "verify", str(folder)]) == 0
    assert "1 files, all as they were saved" in capsys.readouterr().out
    (folder / "progress.json").write_text("[]")
    assert cli.main(["convert", "verify", str(folder)]) == 2
    assert "progress.json was altered" in capsys.readouterr().err


def test_verify_lists_differences(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("mmoe.convert.verify", lambda a, b: ["embedding: 3 values differ"], raising=False)
    assert cli.main(["convert", "verify", "a", "b"]) == 2
    printed = capsys.readouterr()
    assert printed.out == "embedding: 3 values differ\n"
    assert "1 differences (a and b)" in printed.err
    monkeypatch.setattr("mmoe.convert.verify", lambda a, b: [], raising=False)
    assert cli.main(["convert", "verify", "a", "b"]) == 0
    assert capsys.readouterr().out == "a and b: no differences\n"
