"""One operator has one name everywhere: where a part of one is missing, this says which."""

import importlib
import re
from pathlib import Path

import pytest

from benchmarks.operators import OPERATORS as MEASURED

# Lives in the sources, the tests on the emulator and the page of the operator that it is a form of.
FORMS = {"permute_fp8": "permute"}
# On CUDA torch's own kernel runs (grouped_mm): there is nothing to emulate.
LIBRARY_ON_CUDA = {"grouped_linear"}
OPERATORS = sorted(
    path.stem
    for path in Path(__file__).parents[1].glob("mmoe/ops/*.py")
    if path.stem in getattr(importlib.import_module(f"mmoe.ops.{path.stem}"), "__all__", []) and path.stem not in FORMS
)
# {name} is the operator's; its sources may lie in the folder of another (permute_index in csrc/permute).
PARTS = [
    "csrc/*/{name}.h",
    "csrc/*/{name}_cpu.cpp",
    "mmoe/reference/{name}.py",
    "tests/ops/test_{name}.py",
    "benchmarks/operators/{name}.py",
    "docs/operators/{name}.md",
]
PARTS_ON_CUDA = ["csrc/*/{name}_cuda.cu", "csrc/*/{name}_kernel*.cuh", "tests/emulated/test_{name}.py"]


def schemas(root: Path) -> list[str]:
    return re.findall(r'm\.def\(\s*"(\w+)\(', (root / "csrc/bindings.cpp").read_text())


def test_the_operators() -> None:
    assert OPERATORS == ["grouped_linear", "hidden_z_loss", "permute", "permute_index", "router", "sva", "unpermute"]


@pytest.mark.parametrize("part", PARTS + PARTS_ON_CUDA)
@pytest.mark.parametrize("name", OPERATORS)
def test_every_part_is_there(root: Path, name: str, part: str) -> None:
    there = bool(list(root.glob(part.format(name=name))))
    assert there == (name not in LIBRARY_ON_CUDA or part in PARTS), part.format(name=name)


@pytest.mark.parametrize("name", OPERATORS)
def test_the_name_is_on_every_page(root: Path, name: str) -> None:
    assert name in schemas(root)
    assert f"`{name}(" in (root / "docs/operators.md").read_text()
    assert name in MEASURED
    for side in ("ops", "reference"):
        assert callable(getattr(importlib.import_module(f"mmoe.{side}.{name}"), name))
    assert re.search(rf"\b{name}\b", (root / "tests/gpu/test_operators.py").read_text())


@pytest.mark.parametrize(("name", "operator"), FORMS.items())
def test_a_form_is_where_its_operator_is(root: Path, name: str, operator: str) -> None:
    assert name in schemas(root)
    for file in ("mmoe/reference/{}.py", "tests/ops/test_{}.py"):
        assert (root / file.format(name)).exists()
    pages = [f"csrc/{operator}/{operator}.h", f"tests/emulated/test_{operator}.py", f"docs/operators/{operator}.md"]
    for page in (*pages, "docs/operators.md", "benchmarks/emulated.py", "tests/gpu/test_operators.py"):
        assert name in (root / page).read_text(), page


def test_every_schema_is_an_operators(root: Path) -> None:
    for schema in schemas(root):
        assert any(schema == name or schema.startswith(f"{name}_") for name in OPERATORS), schema
