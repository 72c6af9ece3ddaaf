"""Files that somebody else wrote: regular ones of a bounded size are read, nesting is bounded, and whatever is wrong
with one is an OSError or a ValueError with the reason, never a hang or a traceback of the parser's own."""

import json
import os
import re
import stat
import tomllib
from pathlib import Path
from typing import Any

DEEPEST_KEY = 16
"""Parts of a dotted TOML key: tomllib takes quadratic time in them, 50,000 took it a minute."""
_PART = r"(?:[A-Za-z0-9_-]++|\"[^\"\n]*+\"|'[^'\n]*+')[ \t]*+"
_DEEP = re.compile(rf"(?<![A-Za-z0-9_-]){_PART}(?:\.[ \t]*+{_PART}){{{DEEPEST_KEY}}}")


class LargeNumber(ValueError):
    """A whole number beyond 64 bits: nothing of ours holds one, and Python refuses to print the longest."""


def open_regular(path: Path, *, follow: bool = True) -> int:
    """A descriptor to read ``path`` by; a FIFO or a device is never waited for.

    Args:
        path: the file.
        follow: links too; not so where a file must not lead out of its folder.

    Raises:
        OSError: it cannot be opened, or is a link that is not followed.
        ValueError: it is no regular file.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW))
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise ValueError("it is no regular file")
    return handle


def content(path: Path, largest: int, *, follow: bool = True) -> bytes:
    """All of a file of at most ``largest`` bytes.

    Raises:
        OSError, ValueError: see :func:`open_regular`; or it is larger.
    """
    with open(open_regular(path, follow=follow), "rb") as file:
        data = file.read(largest + 1)
    if len(data) > largest:
        raise ValueError(f"it has more than {largest} bytes")
    return data


def text(path: Path, largest: int, *, follow: bool = True) -> str:
    """:func:`content` as UTF-8.

    Raises:
        OSError, ValueError: see :func:`content`; or it is no UTF-8.
    """
    try:
        return content(path, largest, follow=follow).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 text: {error.reason} at byte {error.start}") from None


def toml(source: str) -> dict[str, Any]:
    """The tables of a TOML text.

    Raises:
        ValueError: it is no TOML, nested too deeply, or has a whole number beyond 64 bits (:class:`LargeNumber`).
    """
    if _DEEP.search(source):
        raise ValueError(f"a key of more than {DEEPEST_KEY} parts")
    try:
        table = tomllib.loads(source)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    left: list[Any] = [table]
    while left:
        match left.pop():
            case dict() as inner:
                left += inner.values()
            case list() as inner:
                left += inner
            case int() as number if not -(2**63) <= number < 2**63:
                raise LargeNumber("a whole number that does not fit in 64 bits")
    return table


def json_object(source: str | bytes) -> dict[str, Any]:
    """The object that a JSON text is.

    Raises:
        ValueError: it is no JSON, nested too deeply, or something else than an object.
    """
    try:
        value = json.loads(source)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("it is no JSON object")
    return value
