"""Mixtures: which data sets a run reads, and how much of each."""

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from mmoe import reading
from mmoe.data.shipped import shipped
from mmoe.errors import UserError
from mmoe.recipe.tokens import IMAGE

LARGEST = 1 << 18
"""Bytes of a mixture's file."""
HEAVIEST = 1e9
"""Weights up to here have a finite sum."""
_KEYS = ("path", "weight", "cap", "system_prompt")


@dataclass(frozen=True, kw_only=True)
class Part:
    """One data set of a mixture."""

    path: str
    """Folder of the data set, relative to the data root; also the source's name."""
    weight: float
    """Share of the samples, in proportion to the other weights."""
    in_epochs: bool = False
    """The weight counts epochs: the share of the samples is ``weight`` times the samples of an epoch."""
    cap: int | None = None
    """The most samples of an epoch, which is drawn anew from the whole data set each time (Cambrian-1's threshold t,
    arXiv 2406.16860). None: an epoch has every sample."""
    system_prompt: str = ""
    """A text in front of every sample, without loss."""

    def epoch(self, size: int) -> int:
        """Samples of an epoch of a data set of ``size``."""
        return size if self.cap is None else min(size, self.cap)

    def share(self, size: int) -> float:
        """Of the stream's samples, of any sum over the parts, where the data set has ``size``."""
        return self.weight * self.epoch(size) if self.in_epochs else self.weight


def load_mixture(name: str) -> tuple[Part, ...]:
    """Reads a shipped mixture by its name, or the .toml at a path.

    The file holds one ``[[source]]`` table per data set, with ``path``, ``weight`` (1 where not given) and, if wanted,
    ``cap`` and ``system_prompt``. Before them it may have a ``description``, and ``weights``, what the weights count:
    "samples", as without it, or "epochs".

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
    counted = table.pop("weights", "samples")
    if table:
        fix = "a mixture has [[source]] tables, weights and a description"
        raise UserError(f"unknown key {next(iter(table))!r}", name, fix)
    if counted not in ("samples", "epochs"):
        raise UserError(f"weights is {counted!r}", name, 'they count "samples" or "epochs"')
    if not isinstance(sources, list) or not sources:
        raise UserError("the mixture names no data set", name, "add a [[source]] table with a path and a weight")
    parts = tuple(_part(source, name, counted == "epochs") for source in sources)
    if len({part.path for part in parts}) < len(parts):
        raise UserError("a data set is named twice", name, "give it one [[source]] table with the sum of the weights")
    return parts


def _part(source: object, name: str, in_epochs: bool) -> Part:
    if not isinstance(source, dict):
        raise UserError(f"a source is {source!r}", name, "write a [[source]] table with a path and a weight")
    unknown = source.keys() - set(_KEYS)
    if unknown:
        fix = f"it has the keys {', '.join(_KEYS)}"
        raise UserError(f"unknown key {min(unknown)!r} in [[source]]", name, fix)
    path, weight = source.get("path"), source.get("weight", 1.0)
    cap, prompt = source.get("cap"), source.get("system_prompt")
    if not isinstance(path, str) or not path:
        raise UserError("a [[source]] has no path", name, "give the data set's folder, relative to data.root")
    if not path.isprintable() or PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
        raise UserError(f"the path {path!r} leads out of data.root", name, "give a folder below data.root")
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight <= HEAVIEST:
        raise UserError(f"weight of {path!r} is {weight!r}", name, "give a number above 0, at most 1e9")
    if cap is not None and (type(cap) is not int or cap < 1):
        raise UserError(f"cap of {path!r} is {cap!r}", name, "give the most samples of an epoch, 1 or more")
    if prompt is not None and (not isinstance(prompt, str) or not prompt):
        raise UserError(f"system_prompt of {path!r} is {prompt!r}", name, "give a text, or leave the key out")
    if prompt and IMAGE in prompt:
        what = f"system_prompt of {path!r} holds {IMAGE}, which an exported processor takes for a picture"
        raise UserError(what, name, "leave it out")
    return Part(path=path, weight=float(weight), in_epochs=in_epochs, cap=cap, system_prompt=prompt or "")
