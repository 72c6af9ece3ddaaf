"""`mmoe doctor`: what is installed, which kernels and fallbacks are in use, what this machine answers to."""

import importlib.util
import os
import pkgutil
import platform
import shutil
import subprocess
import warnings
from collections.abc import Iterator

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

import mmoe
from mmoe.preflight import PACKAGES, version

OPTIONAL = {"transformer-engine": "transformer_engine", "mpi4py": "mpi4py"}
COMMANDS = {"nvcc": ["--version"], "nvidia-smi": ["-L"], "mpirun": ["--version"], "srun": ["--version"]}


def run() -> None:
    """Print the table on standard output."""
    table = Table(box=SIMPLE_HEAD)
    for name in ("part", "state"):
        table.add_column(name, overflow="fold")
    for name, state in rows():
        table.add_row(name, state)
    Console().print(table)


def rows() -> Iterator[tuple[str, str]]:
    """Each part with what there is of it."""
    yield "mmoe", mmoe.__version__
    yield "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    for package in PACKAGES:
        yield package, version(package)
    for package, module in OPTIONAL.items():
        yield package, version(package) if importlib.util.find_spec(module) else "absent (optional)"
    # The package that PyPI calls apex is another one; NVIDIA's has fused optimizers.
    apex = importlib.util.find_spec("apex") and importlib.util.find_spec("apex.optimizers")
    yield "apex", "present" if apex else "absent (optional)"
    yield from _kernels()
    yield from _devices()
    yield from _precision()
    for command, arguments in COMMANDS.items():
        yield command, _answer(command, arguments)
    yield "cores", str(len(os.sched_getaffinity(0)))
    yield "OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "unset")


def _kernels() -> Iterator[tuple[str, str]]:
    import torch

    from mmoe import ops, reference

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        loaded = ops.load_library()
    yield "compiled operators", str(ops.LIBRARY) if loaded else f"not loaded: {said[0].message}"
    for module in sorted(module.name for module in pkgutil.iter_modules(reference.__path__)):
        name = f"mmoe::{module}"
        known = loaded and name in torch._C._dispatch_get_all_op_names()
        keys = [key for key in ("CPU", "CUDA") if known and torch._C._dispatch_has_kernel_for_dispatch_key(name, key)]
        yield f"operator {module}", f"kernel for {' and '.join(keys)}" if keys else "PyTorch reference"


def _devices() -> Iterator[tuple[str, str]]:
    import torch

    if not torch.cuda.is_available():
        yield "CUDA", f"no device (torch is built for {torch.version.cuda or 'the CPU'})"
        return
    for index in range(torch.cuda.device_count()):
        memory = torch.cuda.get_device_properties(index).total_memory / 2**30
        yield f"CUDA {index}", f"{torch.cuda.get_device_name(index)}, {memory:.0f} GiB"


def _precision() -> Iterator[tuple[str, str]]:
    """What `precision.provider = "auto"` comes to, the FP8 recipes, and the optimizer."""
    from mmoe.errors import UserError
    from mmoe.layers import choice
    from mmoe.parallel.optimizer import adam
    from mmoe.recipe.schema import Precision

    auto = choice.choose(Precision(provider="auto"))
    upstream = auto.transformer_engine
    linears = "Transformer Engine's" if upstream else "Megatron-Core's"
    yield "linears", f"{linears} ({auto.why})"
    yield "grouped GEMM", "Transformer Engine's" if upstream else "ours (torch's grouped_mm on CUDA)"
    apex = "apex's" if auto.apex_norms else f"torch's rms_norm (apex: {choice.apex_missing() or 'needs CUDA'})"
    yield "norms", "Transformer Engine's, those with a constant factor torch's" if upstream else apex
    for recipe in choice.FP8_CAPABILITY:
        try:
            chosen = choice.choose(Precision(provider="auto", fp8=recipe))
            yield f"FP8 {recipe}", "emulated on the CPU" if chosen.emulates else "Transformer Engine's"
        except UserError as error:
            yield f"FP8 {recipe}", f"refused: {error.what}"
    yield "optimizer", f"{adam().__module__}.{adam().__qualname__}"


def _answer(command: str, arguments: list[str]) -> str:
    """The last line that a command prints when it is asked for its version."""
    path = shutil.which(command)
    if path is None:
        return "absent"
    try:
        done = subprocess.run([path, *arguments], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{path} does not answer: {error}"
    lines = (done.stdout or done.stderr).strip().splitlines()
    return lines[-1] if lines else f"{path}, status {done.returncode}"
