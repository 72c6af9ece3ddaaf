"""The import direction of docs/architecture.md, read from the sources; and that every module can be imported."""

import ast
import importlib
import pkgutil
from pathlib import Path

import pytest

import mmoe

# Each part with the parts that it may import. Both extension modules, errors, ending, progress and
# reading stand below all.
BELOW: dict[str, set[str]] = {
    "errors": set(),
    "ending": set(),
    "progress": {"ending"},
    "reading": set(),
    "_host": set(),
}
BASE = set(BELOW)
CHAIN = [
    {"recipe", "reference"},
    {"ops"},
    {"parallel"},
    {"layers"},
    {"models"},
    {"preflight"},
    {"checkpoint"},
    {"train"},
    {"convert"},
    {"arguments"},
    {"evaluate", "doctor", "bench"},
    {"cli"},
]
for level, parts in enumerate(CHAIN):
    lower = BASE.union(*CHAIN[:level])
    # The batches are made beside the model; what saves, trains, converts or evaluates reads them.
    readers = {"data"} if level >= CHAIN.index({"checkpoint"}) else set()
    BELOW |= dict.fromkeys(parts, lower | readers)
BELOW["data"] = BASE | {"recipe"}
BELOW["__init__"] = BELOW["__main__"] = set(BELOW)


def part_of(module: str) -> str:
    """`mmoe.data.pack` is in `data`; `mmoe` itself is `__init__`."""
    return [*module.split("."), "__init__"][1]


def imported(source: Path, package: list[str]) -> set[str]:
    """The mmoe modules that a source imports, those inside of functions among them."""
    modules: set[str] = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join(base + ([node.module] if node.module else []))
            # `from mmoe import data` names a module where `from mmoe.errors import UserError` names an object.
            modules |= {f"mmoe.{alias.name}" for alias in node.names} if module == "mmoe" else {module}
    return {module for module in modules if module.split(".")[0] == "mmoe"}


def wrong_edges(root: Path) -> list[str]:
    wrong = []
    for source in sorted((root / "mmoe").rglob("*.py")):
        path = source.relative_to(root).with_suffix("")
        part = part_of(".".join(path.parts))
        assert part in BELOW, f"{source}: {part} has no place in the import order"
        for module in sorted(imported(source, list(path.parts[:-1]))):
            target = part_of(module)
            if target not in BELOW[part] | {part} and module != "mmoe":
                wrong.append(f"{path}.py imports {module}")
    return wrong


def test_imports_go_one_way(root):
    assert wrong_edges(root) == []


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("mmoe/data/pack.py", "import mmoe.models.multimodal"),
        ("mmoe/ops/router.py", "from mmoe import layers"),
        ("mmoe/layers/deep/moe.py", "def f():\n    from ...train.loop import run"),
        ("mmoe/convert/table.py", "from mmoe.evaluate import score"),
    ],
)
def test_a_wrong_import_is_found(tmp_path, file, line):
    source = tmp_path / file
    source.parent.mkdir(parents=True)
    source.write_text(f"from mmoe.errors import UserError\n{line}\n")
    assert len(wrong_edges(tmp_path)) == 1


@pytest.mark.latest
def test_every_module_can_be_imported():
    names = [module.name for module in pkgutil.walk_packages(mmoe.__path__, "mmoe.")]
    # Importing __main__ runs the command line; _C is a library of operators and no Python module.
    names = [name for name in names if name not in ("mmoe.__main__", "mmoe._C")]
    assert "mmoe._host" in names
    for name in names:
        assert importlib.import_module(name).__name__ == name
