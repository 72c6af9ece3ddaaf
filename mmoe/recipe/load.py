"""Recipes from TOML and back: strict, typed, and every refusal names the key, the file and a way out."""

import dataclasses
import difflib
import json
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from mmoe import reading
from mmoe.errors import UserError
from mmoe.recipe.checks import hand_over_problems, problems, ranges
from mmoe.recipe.schema import Recipe
from mmoe.recipe.stages import difference, merged

T = TypeVar("T")
LARGEST = 1 << 18
"""Bytes of a recipe's file."""
_KEY = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")


def list_recipes() -> list[str]:
    """Names of the shipped recipes, sorted."""
    folder = resources.files("mmoe.recipe") / "recipes"
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def load_recipe(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read, complete and check a recipe.

    Args:
        name_or_path: a shipped recipe's name (see :func:`list_recipes`) or the path of a ``.toml`` file.
        overrides: ``"a.b=c"`` assignments laid over the file, in order. ``c`` is a TOML value; what is not one is
            taken as a string. ``model.encoders.0.width`` reaches into a list.

    Raises:
        UserError: the recipe cannot be found or read, is not TOML, has an unknown or a missing key, a value of the
            wrong type, or values that cannot go together.
    """
    text, source = _read(str(name_or_path))
    try:
        table = reading.toml(text)
    except ValueError as error:
        raise UserError(f"not valid TOML: {error}", source, "correct the file") from None
    reader = _Reader(source)
    for assignment in overrides:
        reader.override(table, assignment)
    stages = table.pop("stages", [])
    return dataclasses.replace(reader.recipe(table, staged=bool(stages)), stages=tuple(reader.stages(table, stages)))


def typed(cls: type[T], table: Any, source: str) -> T:
    """A table of somebody else's file as the dataclass ``cls`` of the schema, or as that of a union of them which its
    ``type`` names, strictly as in a recipe.

    Raises:
        UserError: an unknown or a missing key, a value of the wrong type or out of its range, at ``source``.
    """
    reader = _Reader(source)
    made = reader.build(cls, table, "")
    for path, what, fix in ranges(made):
        reader.fail(path, f"{path}: {what}", fix)
    return made


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as TOML with every default filled in; loading the text gives an equal recipe."""
    table = dataclasses.asdict(dataclasses.replace(recipe, stages=()))
    del table["stages"]
    stages = []
    for stage in recipe.stages:
        changes = dataclasses.asdict(dataclasses.replace(stage, name=recipe.name))
        name = stage.name.removeprefix(f"{recipe.name}-")
        stages.append({"name": name, **difference({**table, "stages": ()}, changes)})
    return "\n".join(_lines({**table, **({"stages": tuple(stages)} if stages else {})}, "")).strip() + "\n"


def _read(name_or_path: str) -> tuple[str, str]:
    if name_or_path.endswith(".toml") or "/" in name_or_path:
        path = Path(name_or_path)
        if not path.exists():
            raise UserError("no such recipe file", name_or_path, "`mmoe recipes` lists the shipped ones")
    else:
        names = list_recipes()
        if name_or_path not in names:
            near = difflib.get_close_matches(name_or_path, names, 1)
            fix = f"did you mean {near[0]!r}?" if near else f"give a .toml path or one of: {', '.join(names)}"
            raise UserError(f"no shipped recipe is called {name_or_path!r}", "", fix)
        path = resources.files("mmoe.recipe") / "recipes" / f"{name_or_path}.toml"
    try:
        return reading.text(Path(str(path)), LARGEST), str(path)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"the recipe cannot be read: {reason}", name_or_path, "give a readable .toml file") from None


class _Reader:
    """Builds the dataclasses out of one file's tables and remembers which keys came from ``--set``."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.overridden: dict[str, str] = {}

    def fail(self, path: str, what: str, fix: str) -> NoReturn:
        """Refuse the value at ``path``, naming the ``--set`` that gave it or else the file."""
        near = (
            text
            for key, text in self.overridden.items()
            if f"{key}.".startswith(f"{path}.") or path.startswith(f"{key}.")
        )
        given = next(near, None) if path else None
        raise UserError(what, f"--set {given}" if given else self.source, fix)

    def recipe(self, table: dict[str, Any], where: str = "", *, staged: bool = False) -> Recipe:
        """A whole recipe without stages, checked; ``where`` goes in front of what is wrong with it."""
        try:
            recipe: Recipe = self.build(Recipe, table, "")
            for path, what, fix in problems(recipe, staged=staged):
                self.fail(path, f"{path}: {what}", fix)
        except UserError as error:
            raise UserError(f"{where}{error.what}", error.where, error.fix) from None
        return recipe

    def stages(self, base: dict[str, Any], tables: Any) -> Iterator[Recipe]:
        """The recipes of the stages, each called by the recipe's name and its own."""
        if not isinstance(tables, list) or not all(isinstance(stage, dict) for stage in tables):
            self.fail(
                "stages", f"stages must be a list, each entry a table, found {_found(tables)}", "correct the value"
            )
        names: set[str] = set()
        before: Recipe | None = None
        for index, stage in enumerate(tables):
            changes = dict(stage)
            name = changes.pop("name", None)
            if not isinstance(name, str) or not name or name in names:
                what = f"stages.{index}.name must be a name of its own, found {_found(name)}"
                self.fail(f"stages.{index}.name", what, "give each stage one: its folder is called so")
            if "stages" in changes:
                self.fail(f"stages.{index}.stages", "a stage has no stages", "list them one after another")
            names.add(name)
            where = f"stage {name!r}: "
            made = self.recipe(merged(base, {**changes, "name": f"{base.get('name', '')}-{name}"}), where)
            for path, what, fix in hand_over_problems(before.model, made.model) if before else ():
                self.fail(f"stages.{index}.{path}", f"{where}{path}: {what}", fix)
            yield made
            before = made

    def override(self, table: dict[str, Any], assignment: str) -> None:
        path, equals, text = assignment.partition("=")
        path, text = path.strip(), text.strip()
        if not equals or not _KEY.fullmatch(path):
            raise UserError("not of the form key=value", f"--set {assignment}", "write for example train.steps=100")
        self.overridden[path] = " ".join(assignment.split())
        *parents, last = path.split(".")
        place: Any = table
        for depth, key in enumerate(parents):
            if isinstance(place, dict):
                place = place.setdefault(key, {})
            else:
                place = place[self._index(place, key, ".".join(parents[: depth + 1]))]
            if not isinstance(place, dict | list):
                self.fail(
                    path,
                    f"{'.'.join(parents[: depth + 1])} is a value, not a table",
                    "`mmoe recipes NAME` shows the keys",
                )
        if isinstance(place, list):
            place[self._index(place, last, path)] = self._value(path, text)
        else:
            place[last] = self._value(path, text)

    def _value(self, path: str, text: str) -> Any:
        try:
            parsed = reading.toml(f"value = {text}")
        except reading.LargeNumber:
            self.fail(path, f"{path} does not fit in 64 bits", "correct the value")
        except ValueError:
            return text
        return parsed["value"] if len(parsed) == 1 else text

    def _index(self, items: list[Any], key: str, path: str) -> int:
        if key.isdecimal() and len(key) < 10 and int(key) < len(items):
            return int(key)
        raise UserError(f"{path}: no such entry", self.source, f"the list has {len(items)} entries, counted from 0")

    def build(self, hint: Any, value: Any, path: str) -> Any:
        """``value`` as an instance of the type ``hint``; ``path`` is its dotted key."""
        origin, args = typing.get_origin(hint), typing.get_args(hint)
        if origin in (typing.Union, types.UnionType):
            if value is None and types.NoneType in args:
                return None  # of a JSON file: TOML has nothing like it
            return self.build(self._member(args, value, path), value, path)
        if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
            return self._table(typing.cast(type, hint), value, path)
        if origin is tuple and isinstance(value, list):
            many = len(args) == 2 and args[1] is Ellipsis
            if many or len(value) == len(args):
                hints = [args[0]] * len(value) if many else args
                return tuple(self.build(h, v, f"{path}.{i}") for i, (h, v) in enumerate(zip(hints, value, strict=True)))
        if origin is typing.Literal and isinstance(value, str) and value in args:
            return value
        if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
            try:
                return float(value)
            except OverflowError:
                self.fail(path, f"{path} is larger than any number of 64 bits", "correct the value")
        if hint is int and type(value) is int and not -(2**63) <= value < 2**63:
            self.fail(path, f"{path} does not fit in 64 bits", "correct the value")
        if hint in (bool, int, str) and type(value) is hint:
            return value
        return self.fail(path, f"{path or 'it'} must be {_expected(hint)}, found {_found(value)}", "correct the value")

    def _member(self, members: tuple[Any, ...], value: Any, path: str) -> Any:
        """The type among those of a union that the table's ``type`` names; without one the first."""
        kinds = {kind: cls for cls in members if cls is not types.NoneType for kind in _kinds(cls)}
        if len(kinds) < 2 or not isinstance(value, Mapping):
            return members[0]
        kind = value.get("type", next(iter(kinds)) if _has_default(members[0]) else None)
        if kind is None:
            self.fail(path, f"missing key {f'{path}.type'!r}", f"it must be {_one_of(kinds)}")
        if not isinstance(kind, str) or kind not in kinds:
            self.fail(
                f"{path}.type", f"{path}.type must be {_one_of(kinds)}, found {_found(kind)}", "correct the value"
            )
        return kinds[kind]

    def _table(self, cls: type, table: Mapping[str, Any], path: str) -> Any:
        prefix = f"{path}." if path else ""
        hints, fields = typing.get_type_hints(cls), {field.name: field for field in dataclasses.fields(cls)}
        for key in table:
            if key not in fields:
                self.fail(prefix + key, f"unknown key {prefix + key!r}", _nearest(key, prefix, list(fields)))
        for name, field in fields.items():
            required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
            if required and name not in table:
                self.fail(path, f"missing key {prefix + name!r}", f"it must be {_expected(hints[name])}")
        return cls(**{key: self.build(hints[key], value, prefix + key) for key, value in table.items()})


def _nearest(key: str, prefix: str, names: list[str]) -> str:
    near = difflib.get_close_matches(key, names, 1)
    if near:
        return f"did you mean {prefix + near[0]!r}?"
    elsewhere = [path for path in _paths(Recipe) if path.rpartition(".")[2] == key]
    return f"did you mean {elsewhere[0]!r}?" if elsewhere else f"the keys here are {', '.join(names)}"


def _paths(cls: type, prefix: str = "") -> Iterator[str]:
    """Every dotted key of the schema; a list's entry counts as 0."""
    for name, hint in typing.get_type_hints(cls).items():
        yield prefix + name
        if name == "stages":
            continue  # they have the same keys again
        many = typing.get_origin(hint) is tuple
        for inner in (hint, *(part for arg in typing.get_args(hint) for part in (arg, *typing.get_args(arg)))):
            if dataclasses.is_dataclass(inner):
                yield from _paths(typing.cast(type, inner), f"{prefix}{name}.{'0.' if many else ''}")


def _kinds(cls: Any) -> tuple[str, ...]:
    """What ``type`` may be in a table of this class; nothing where it has none."""
    return typing.get_args(typing.get_type_hints(cls).get("type")) if dataclasses.is_dataclass(cls) else ()


def _has_default(cls: Any) -> bool:
    return any(field.name == "type" and field.default is not dataclasses.MISSING for field in dataclasses.fields(cls))


def _one_of(values: Iterable[str]) -> str:
    return f"one of {', '.join(repr(value) for value in values)}"


def _expected(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _expected(args[0])
    if dataclasses.is_dataclass(hint):
        return "a table"
    if origin is typing.Literal:
        return _one_of(args)
    if origin is tuple and len(args) == 2 and args[1] is Ellipsis:
        return f"a list, each entry {_expected(args[0])}"
    if origin is tuple:
        return f"a list of {len(args)} entries, each {_expected(args[0])}"
    return {bool: "true or false", int: "an integer", float: "a number", str: "a string"}[hint]


def _found(value: Any) -> str:
    match value:
        case bool():
            return str(value).lower()
        case int() | float():
            return f"the {'integer' if isinstance(value, int) else 'number'} {value}"
        case str():
            return f"the string {value!r}"
        case dict():
            return "a table"
        case list():
            return f"a list of {len(value)} entries"
    return f"a {type(value).__name__}"


def _lines(table: Mapping[str, Any], path: str) -> Iterator[str]:
    """Plain values first: in TOML they would otherwise belong to the table above them."""
    deep = {key: value for key, value in table.items() if isinstance(value, dict) or _is_tables(value)}
    for key, value in table.items():
        if key not in deep and value is not None:
            yield f"{key} = {_literal(value)}"
    for key, value in deep.items():
        inner = f"{path}.{key}" if path else key
        for entry in value if _is_tables(value) else [value]:
            yield from ("", f"[[{inner}]]" if _is_tables(value) else f"[{inner}]")
            yield from _lines(entry, inner)


def _is_tables(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) > 0 and isinstance(value[0], dict)


def _literal(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(_literal(item) for item in value)}]"
    # A TOML basic string is a JSON string, but for DEL, which TOML wants escaped.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
