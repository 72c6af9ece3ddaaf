"""The shipped sources: our very files, importing each other and nothing of mmoe."""

import ast

import pytest

from mmoe.convert.ship import MODULES, relative, ship


def test_imports_become_relative():
    source = "import torch\nfrom mmoe.ops.sva import Absorbed, sva\n\ndef f():\n    from mmoe.errors import UserError\n"
    wanted = "import torch\nfrom .sva import Absorbed, sva\n\ndef f():\n    from .errors import UserError\n"
    assert relative(source) == wanted


@pytest.mark.parametrize("source", ["from mmoe.train.loop import run\n", "import mmoe.errors\n", "import mmoe\n"])
def test_what_is_not_shipped_is_refused(source):
    with pytest.raises(KeyError):
        relative(source)


def test_shipped_files_are_closed(tmp_path):
    ship(tmp_path)
    files = {path.stem for path in tmp_path.glob("*.py")}
    assert files == set(MODULES.values())
    plain = {"collections", "contextlib", "dataclasses", "io", "math", "pathlib", "re", "typing"}
    allowed = {"torch", "transformers", "numpy", "PIL", *plain}
    for path in tmp_path.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.module in files, f"{path.name}: from .{node.module}"
            elif isinstance(node, ast.ImportFrom):
                assert node.module.split(".")[0] in allowed, f"{path.name}: from {node.module}"
            elif isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= allowed, path.name
