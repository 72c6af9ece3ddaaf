"""Rows of numbers, the targets that they are held against, and how both are shown."""

import dataclasses
import json
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

TARGETS = Path(__file__).with_name("targets.toml")


@dataclass
class Row:
    """One number of ours beside a peer's or a ceiling. ``ratio`` is made so that more is better:

    time (ms), memory (MiB) and waiting (%): peer ÷ ours; rates: ours ÷ peer (tokens/s), ours ÷ ceiling (GB/s, GFLOP/s).
    ``met`` says whether it reaches
    ``target``; both are None where nothing was asked. ``spread`` is the interquartile range of our samples ÷ median.
    """

    name: str
    shape: str
    dtype: str
    ours: float
    peer: float | None = None
    peer_name: str | None = None
    unit: str = "ms"
    ratio: float | None = None
    ceiling: float | None = None
    target: float | None = None
    met: bool | None = None
    spread: float | None = None


@dataclass(frozen=True)
class Target:
    """``ratio`` asked of the rows whose name, shape and peer match these patterns."""

    name: str
    peer: str
    ratio: float
    shape: str = "*"
    dtype: str = "*"

    def matches(self, row: Row) -> bool:
        pairs = [
            (row.name, self.name),
            (row.peer_name or "", self.peer),
            (row.shape, self.shape),
            (row.dtype, self.dtype),
        ]
        return all(fnmatchcase(value, pattern) for value, pattern in pairs)


def load_targets(path: Path = TARGETS) -> list[Target]:
    return [Target(**entry) for entry in tomllib.loads(path.read_text())["target"]]


def judge(row: Row, targets: Sequence[Target]) -> Row:
    """The row with the first target that matches it."""
    asked = next((target.ratio for target in targets if target.matches(row)), None)
    if asked is None or row.ratio is None:
        return row
    return dataclasses.replace(row, target=asked, met=row.ratio >= asked)


def show(title: str, rows: Sequence[Row], console: Console) -> None:
    """A table on the console, one line a row."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("name", no_wrap=True)
    table.add_column("shape", no_wrap=True)
    table.add_column("dtype")
    for column in ("ours", "peer", "unit", "ratio", "target"):
        table.add_column(column, justify="left" if column == "unit" else "right", no_wrap=True)
    table.add_column("")
    for row in rows:
        other = row.peer if row.peer is not None else row.ceiling
        peer = "" if row.peer_name is None else f"{row.peer_name} {number(other)}"
        mark = {None: "", True: "met", False: "[bold red]missed[/]"}[row.met]
        values = [number(row.ours), peer, row.unit, number(row.ratio), number(row.target)]
        table.add_row(row.name, row.shape, row.dtype, *values, mark)
    console.print(table)
    console.print()


def number(value: float | None) -> str:
    """Three digits that count, without an exponent."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def write(path: Path, rows: Sequence[Any]) -> None:
    """A JSON list of the rows (dataclasses); the file is whole or the earlier one."""
    text = json.dumps([dataclasses.asdict(row) for row in rows], indent=1, ensure_ascii=False)
    part = path.with_name(f"{path.name}.part")
    part.write_text(text + "\n")
    part.replace(path)
