"""Mixtures: which data sets a run reads, and how much of each."""

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from mmoe import reading
from mmoe.data.shipped import shipped
from mmoe.errors import UserError

LARGEST = 1 << 18
"""Bytes of a mixture's file."""
HEAVIEST = 1e9
"""Weights up to here have a finite sum."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One data set of a mixture."""

    path: str
    """Folder of the data set, relative to the data root; also the source's name."""
    weight: float
    """Share of the samples, in proportion to the other weights."""


def load_mixture(name: str) -> tuple[Part, ...]:
    """Reads a shipped mixture by its name, or the .toml at a path.

    The file holds one ``[[source]]`` table per data set, with ``path`` and ``weight`` (1 where not given), and may have
    a ``description``.

    Raises:
        UserError: there is no such mixture, or it is not of this form.
    """
    path = Path(name) if name.endswith(".toml") else shipped("mixtures", name)
    try:
        table = reading.toml(reading.text(path, LARGEST))
    except OSError as error:
        raise UserError(f"cannot read the mixture: {error.strerror}", name, "give a shipped name or a .toml") from None
    except ValueError as error:
        raise UserError(f"the mixture is no TOML: {error}", name, "mend the file") from None
    sources = table.pop("source", None)
    table.pop("description", None)
    if table:
        raise UserError(f"unknown key {next(iter(table))!r}", name, "a mixture has [[source]] tables and a description")
    if not isinstance(sources, list) or not sources:
        raise UserError("the mixture names no data set", name, "add a [[source]] table with a path and a weight")
    parts = tuple(_part(source, name) for source in sources)
    if len({part.path for part in parts}) < len(parts):
        raise UserError("a data set is named twice", name, "give it one [[source]] table with the sum of the weights")
    return parts


def _part(source: object, name: str) -> Part:
    if not isinstance(source, dict):
        raise UserError(f"a source is {source!r}", name, "write a [[source]] table with a path and a weight")
    unknown = source.keys() - {"path", "weight"}
    if unknown:
        raise UserError(f"unknown key {min(unknown)!r} in [[source]]", name, "it has the keys path and weight")
    path, weight = source.get("path"), source.get("weight", 1.0)
    if not isinstance(path, str) or not path:
        raise UserError("a [[source]] has no path", name, "give the data set's folder, relative to data.root")
    if not path.isprintable() or PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
        raise UserError(f"the path {path!r} leads out of data.root", name, "give a folder below data.root")
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight <= HEAVIEST:
        raise UserError(f"weight of {path!r} is {weight!r}", name, "give a number above 0, at most 1e9")
    return Part(path=path, weight=float(weight))
