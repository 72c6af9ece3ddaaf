"""The source files that an exported directory carries, with our imports turned into relative ones.

The export runs the very files that trained the model: nothing is written twice.
"""

import ast
from pathlib import Path

import mmoe

MODULES = {
    "mmoe.convert.hf.configuration_mmoe": "configuration_mmoe",
    "mmoe.convert.hf.modeling_mmoe": "modeling_mmoe",
    "mmoe.convert.hf.processing_mmoe": "processing_mmoe",
    "mmoe.data.pixels": "pixels",
    "mmoe.errors": "errors",
    "mmoe.models.connectors": "connectors",
    "mmoe.models.connectors.maps": "maps",
    "mmoe.models.connectors.mlp": "mlp",
    "mmoe.models.connectors.sampler": "sampler",
    "mmoe.models.connectors.sva": "sva_connector",
    "mmoe.models.encoders": "encoders",
    "mmoe.models.encoders.convnet": "convnet",
    "mmoe.models.encoders.convnext": "convnext",
    "mmoe.models.encoders.normalise": "normalise",
    "mmoe.models.encoders.vit": "vit",
    "mmoe.recipe.model": "tables",
    "mmoe.reference.sva": "sva",
}
"""Every module that is shipped, and the name of its file in the flat directory."""
STAND_INS = {"mmoe.ops.sva": "mmoe.reference.sva"}
"""Modules that another one replaces: the export has no compiled operators."""


def ship(out: Path) -> None:
    """Write every module of :data:`MODULES` to ``out``."""
    root = Path(mmoe.__file__).parent
    for module, name in MODULES.items():
        path = root.joinpath(*module.split(".")[1:])
        source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        text = relative(source.read_text(encoding="utf-8"))
        (out / f"{name}.py").write_text(f"# SPDX-License-Identifier: Apache-2.0\n{text}", encoding="utf-8")


def relative(source: str) -> str:
    """``source`` with every ``from mmoe… import …`` made relative.

    Raises:
        KeyError: it imports a module that is not shipped.
    """
    lines = source.splitlines(keepends=True)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import) and any(name.name.split(".")[0] == "mmoe" for name in node.names):
            raise KeyError(f"line {node.lineno}: write `from mmoe… import …`, which can be made relative")
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "mmoe":
            target = MODULES[STAND_INS.get(node.module, node.module)]
            lines[node.lineno - 1] = lines[node.lineno - 1].replace(f"from {node.module} ", f"from .{target} ", 1)
    return "".join(lines)
