"""One module an operator, of its name, with ``cases(quick)``; and what operators make together."""

import importlib
from types import ModuleType

OPERATORS = ("hidden_z_loss", "router", "permute_index", "permute", "unpermute", "grouped_linear", "sva")
TOGETHER = ("permute_unpermute", "identity_path", "moe_layer", "sva_layer")


def module(name: str) -> ModuleType:
    return importlib.import_module(f"benchmarks.operators.{name}")
