"""A recipe's stages as differences from its own tables."""

import copy
from collections.abc import Mapping
from typing import Any

Table = dict[str, Any]


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> Table:
    """``base`` with ``changes`` laid over it, table by table; entries of a list of tables are matched by their name,
    and those of a new name are added."""
    result = copy.deepcopy(dict(base))
    for key, value in changes.items():
        before = result.get(key)
        if isinstance(before, dict) and isinstance(value, dict):
            result[key] = merged(before, value)
        elif _named(before) and _named(value):
            entries = _by_name(before)
            for entry in value:
                entries[entry["name"]] = merged(entries.get(entry["name"], {}), entry)
            result[key] = list(entries.values())
        else:
            result[key] = copy.deepcopy(value)
    return result


def difference(base: Mapping[str, Any], other: Mapping[str, Any]) -> Table:
    """What :func:`merged` makes ``other`` of ``base`` with; both have every key."""
    changes: Table = {}
    for key, value in other.items():
        before = base.get(key)
        if before == value:
            continue
        if isinstance(before, dict) and isinstance(value, dict):
            changes[key] = difference(before, value)
        elif _named(before) and _named(value):
            entries = _by_name(before)
            parts = ((entry["name"], difference(entries.get(entry["name"], {}), entry)) for entry in value)
            changes[key] = tuple({"name": name, **part} for name, part in parts if part)
        else:
            changes[key] = value
    return changes


def _by_name(tables: Any) -> dict[str, Table]:
    return {table["name"]: table for table in tables}


def _named(value: Any) -> bool:
    """Whether ``value`` is a list of tables that go by a name."""
    entries = value if isinstance(value, list | tuple) else ()
    return len(entries) > 0 and all(isinstance(entry, dict) and isinstance(entry.get("name"), str) for entry in entries)
