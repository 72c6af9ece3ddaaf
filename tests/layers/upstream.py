"""Recording stand-ins for packages that only a GPU machine has; they compute on the CPU what the real ones would.

Signatures as upstream: Transformer Engine 2.8 (pytorch/module/grouped_linear.py, pytorch/module/fp8_padding.py,
fp8_unpadding.py), apex of 2025 (apex/normalization/fused_layer_norm.py). Those of megatron/core/extensions/
transformer_engine.py are read from the installed Megatron-Core: every recorded call has to bind to them.
"""

import ast
import importlib.machinery
import inspect
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import megatron.core
import pytest
import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor
from torch.nn.functional import linear, rms_norm

EXTENSION = Path(megatron.core.__file__).parent / "extensions" / "transformer_engine.py"


def signature(class_name: str, method: str) -> inspect.Signature:
    """Of a method in Megatron-Core's source, which cannot be imported in working order here."""
    tree = ast.parse(EXTENSION.read_text())
    cls = next(node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == class_name)
    function = next(node for node in cls.body if isinstance(node, ast.FunctionDef) and node.name == method)
    given, kinds = function.args, inspect.Parameter
    positional = [*given.posonlyargs, *given.args]
    plain = len(positional) - len(given.defaults)
    parameters = [
        kinds(arg.arg, kinds.POSITIONAL_OR_KEYWORD, default=kinds.empty if index < plain else None)
        for index, arg in enumerate(positional)
    ]
    for arg, default in zip(given.kwonlyargs, given.kw_defaults, strict=True):
        parameters.append(kinds(arg.arg, kinds.KEYWORD_ONLY, default=kinds.empty if default is None else None))
    return inspect.Signature(parameters)


class Upstream:
    """What was built and called."""

    def __init__(self) -> None:
        self.built: list[tuple[str, tuple, dict]] = []
        self.splits: list[list[int]] = []

    def count(self, name: str) -> int:
        return sum(built == name for built, _, _ in self.built)

    def _record(self, name: str, method: str, /, *args: Any, **kwargs: Any) -> None:
        signature(name, method).bind(None, *args, **kwargs)
        self.built.append((name, args, kwargs))

    def megatron_extension(self) -> types.ModuleType:
        record = self._record
        state = {"get_extra_state": lambda self: torch.empty(0, dtype=torch.uint8), "set_extra_state": _ignore}

        def init(name: str, build: Callable[..., None]) -> Callable[..., None]:
            def recorded(self: Any, *args: Any, **kwargs: Any) -> None:
                record(name, "__init__", *args, **kwargs)
                build(self, *args, **kwargs)

            return recorded

        def duplicated(self: Any, inputs: int, outputs: int, *, config: Any, **_: Any) -> None:
            torch.nn.Linear.__init__(self, inputs, outputs, bias=False, dtype=config.params_dtype)

        def two_results(self: Any, x: Tensor) -> tuple[Tensor, None]:
            return linear(x, self.weight), None

        def norm(cls: type, *args: Any, **kwargs: Any) -> torch.nn.Module:
            record("TENorm", "__new__", *args, **kwargs)
            return _RMSNorm(*args, **kwargs)

        module = _module("megatron.core.extensions.transformer_engine")
        for name, base, build in (
            ("TEColumnParallelLinear", ColumnParallelLinear, ColumnParallelLinear.__init__),
            ("TERowParallelLinear", RowParallelLinear, RowParallelLinear.__init__),
        ):
            setattr(module, name, type(name, (base,), {"__init__": init(name, build), **state}))
        own = {"__init__": init("TELinear", duplicated), "forward": two_results, **state}
        setattr(module, "TELinear", type("TELinear", (torch.nn.Linear,), own))
        setattr(module, "TENorm", type("TENorm", (), {"__new__": norm}))
        return module

    def transformer_engine(self) -> types.ModuleType:
        record = self

        class GroupedLinear(torch.nn.Module):
            def __init__(
                self,
                num_gemms: int,
                in_features: int,
                out_features: int,
                sequence_parallel: bool = False,
                fuse_wgrad_accumulation: bool = False,
                tp_group: Any = None,
                tp_size: int = 1,
                get_rng_state_tracker: Callable | None = None,
                rng_tracker_name: str | None = None,
                init_method: Callable | None = None,
                bias: bool = True,
                return_bias: bool = False,
                params_dtype: torch.dtype | None = None,
                parallel_mode: str | None = None,
                device: torch.device | str = "cuda",
                ub_overlap_rs: bool = False,
                ub_overlap_ag: bool = False,
                ub_name: str | None = None,
                delay_wgrad_compute: bool = False,
                save_original_input: bool = False,
            ) -> None:
                super().__init__()
                assert not bias
                record.built.append(("GroupedLinear", (num_gemms, in_features, out_features), {}))
                self.num_gemms = num_gemms
                for index in range(num_gemms):
                    weight = torch.empty(out_features, in_features, device=device, dtype=params_dtype)
                    self.register_parameter(f"weight{index}", torch.nn.Parameter(weight))

            def _get_weight_tensors(self) -> list[Tensor]:
                return [getattr(self, f"weight{index}") for index in range(self.num_gemms)]

            def forward(self, inp: Tensor, m_splits: list[int], is_first_microbatch: bool | None = None) -> Tensor:
                assert next(iter(self.named_parameters()))[1].device == inp.device
                assert len(m_splits) == self.num_gemms
                record.splits.append(m_splits)
                parts = inp.split(m_splits)
                return torch.cat([linear(x, w) for x, w in zip(parts, self._get_weight_tensors(), strict=True)])

            def get_extra_state(self) -> Tensor:
                return torch.zeros(1, dtype=torch.uint8)

            def set_extra_state(self, state: Tensor) -> None: ...

        class Fp8Padding(torch.nn.Module):
            def __init__(self, num_gemms: int, align_size: int | None = None) -> None:
                super().__init__()

            def forward(self, inp: Tensor, m_splits: list[int]) -> tuple[Tensor, list[int]]:
                whole = [-(-size // 16) * 16 for size in m_splits]
                parts = zip(inp.split(m_splits), m_splits, whole, strict=True)
                pad = torch.nn.functional.pad
                return torch.cat([pad(part, (0, 0, 0, full - size)) for part, size, full in parts]), whole

        class Fp8Unpadding(torch.nn.Module):
            def __init__(self, num_gemms: int, align_size: int | None = None) -> None:
                super().__init__()

            def forward(self, inp: Tensor, m_splits: list[int]) -> Tensor:
                whole = [-(-size // 16) * 16 for size in m_splits]
                return torch.cat([part[:size] for part, size in zip(inp.split(whole), m_splits, strict=True)])

        module = _module("transformer_engine.pytorch")
        for cls in (GroupedLinear, Fp8Padding, Fp8Unpadding):
            setattr(module, cls.__name__, cls)
        return module

    def apex(self) -> types.ModuleType:
        def fused_rms_norm_affine(
            input: Tensor,  # noqa: A002
            weight: Tensor,
            normalized_shape: Sequence[int],
            eps: float = 1e-6,
            memory_efficient: bool = False,
        ) -> Tensor:
            self.built.append(("fused_rms_norm_affine", (tuple(normalized_shape),), {"eps": eps}))
            return rms_norm(input, list(normalized_shape), weight, eps)

        module = _module("apex.normalization.fused_layer_norm")
        setattr(module, "fused_rms_norm_affine", fused_rms_norm_affine)
        return module


class _RMSNorm(torch.nn.RMSNorm):
    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)

    def get_extra_state(self) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None: ...


def _ignore(self: Any, state: Any) -> None: ...


def _module(name: str, version: str = "") -> types.ModuleType:
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    module.__path__ = []
    if version:
        setattr(module, "__version__", version)
    return module


def install_transformer_engine(monkeypatch: pytest.MonkeyPatch) -> Upstream:
    upstream = Upstream()
    for module in (
        _module("transformer_engine", "2.8.0"),
        upstream.transformer_engine(),
        upstream.megatron_extension(),
    ):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr("megatron.core.utils._te_version", None)
    return upstream


def install_apex(monkeypatch: pytest.MonkeyPatch) -> Upstream:
    upstream = Upstream()
    names = ("apex", "apex.optimizers", "apex.normalization", "fused_layer_norm_cuda")
    for module in (*map(_module, names), upstream.apex()):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return upstream
