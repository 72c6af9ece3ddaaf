"""``mmoe bench convert``: both conversions against a plain copy of the same bytes, and the memory that they take."""

import ctypes
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from benchmarks import report
from benchmarks.memory import status
from benchmarks.ops import machine
from benchmarks.report import Row
from mmoe.checkpoint import layout
from mmoe.checkpoint.load import blank, weights
from mmoe.checkpoint.tensors import Spec, Tensors
from mmoe.convert import from_hf, to_hf
from mmoe.recipe.load import load_recipe
from mmoe.recipe.model import Longcat, MoE
from mmoe.recipe.schema import Precision, Recipe

ROOT = Path(__file__).parents[1]
ROUNDS = 5
SHARD, QUICK_SHARD = "400MB", "1MB"
"""A model of eight shards."""
RECIPE = "quickstart"


def run(options: Namespace) -> None:
    """The command; ``options`` as ``mmoe bench`` reads them."""
    torch.set_num_threads(options.threads)
    console = Console(width=200, soft_wrap=True)
    console.print(machine(torch.device("cpu")), highlight=False)
    # Beside the checkout: /tmp may be memory.
    build = ROOT / "build"
    build.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=build) as folder:
        targets = report.load_targets()
        settings, shard = (recipe(1, 2), QUICK_SHARD) if options.quick else (recipe(16, 10), SHARD)
        make(Path(folder), settings, shard)
        rounds = 2 if options.quick else ROUNDS
        rows = [report.judge(row, targets) for row in _rows(Path(folder), shard, rounds)]
    report.show("conversion", rows, console)
    if options.json:
        report.write(options.json, rows)


def recipe(scale: int, layers: int) -> Recipe:
    """A language model of LongCat-Flash's kind in bf16: 3 GB of scale 16 and 10 layers, 6 MB of 1 and 2."""
    base = load_recipe(RECIPE)
    backbone = Longcat(
        vocab_size=512 * scale,
        hidden_size=64 * scale,
        layers=layers,
        heads=8,
        q_lora_rank=32 * scale,
        kv_lora_rank=16 * scale,
        qk_nope_head_dim=64,
        qk_rope_head_dim=32,
        v_head_dim=64,
        ffn_hidden_size=128 * scale,
        max_position=1024,
    )
    moe = MoE(experts=40, zero_experts=8, top_k=4, expert_hidden_size=64 * scale, active_experts=3.2)
    model = replace(base.model, backbone=backbone, moe=moe, encoders=(), connector=None)
    return replace(base, model=model, precision=Precision(dtype="bf16"))


class Random(Tensors):
    """Numbers that no file system packs."""

    def __init__(self, specs: dict[str, Spec]) -> None:
        self.specs = specs

    def read(self, name: str, start: int, out: torch.Tensor) -> None:
        out.copy_(torch.rand(out.shape) + 1)


def make(folder: Path, settings: Recipe, shard: str) -> None:
    """The model as FOLDER/hf, its files of ``shard`` bytes, and as the checkpoint FOLDER/run."""
    source = Random({name: Spec(t.shape, t.dtype) for name, t in weights(blank(settings)).items()})
    (folder / "tokenizer.json").write_text("{}")
    to_hf(folder, folder / "hf", load=lambda _: (settings, source, folder / "tokenizer.json"), max_shard_size=shard)
    from_hf_quietly(folder / "hf", folder / "run")


def _rows(folder: Path, shard: str, rounds: int) -> list[Row]:
    """Of the model that was made in ``folder``."""
    checkpoint = folder / "run/checkpoints/step_00000000"
    sides: dict[str, tuple[Callable[[Path], object], list[Path]]] = {
        "from_hf": (lambda out: from_hf_quietly(folder / "hf", out), sorted((folder / "hf").glob("*.safetensors"))),
        "to_hf": (
            lambda out: to_hf(checkpoint, out, max_shard_size=shard),
            sorted((checkpoint / "state").glob("*.distcp")),
        ),
    }
    rows = []
    for name, (convert, files) in sides.items():
        size = sum(file.stat().st_size for file in files)
        times: tuple[list[float], list[float]] = [], []
        for _ in range(rounds):
            times[0].append(_seconds(convert, folder / "out"))
            times[1].append(_seconds(lambda out, files=files: _copy(files, out), folder / "out"))
        ours, copy = (size / 1e9 / statistics.median(values) for values in times)
        shape = f"{size / 1e9:.2f} GB"
        low, _, high = statistics.quantiles(times[0], n=4, method="inclusive")
        spread = (high - low) / statistics.median(times[0])
        rows.append(Row(name, shape, "bf16", ours, copy, "copy", "GB/s", ratio=ours / copy, spread=spread))
        most, largest = peak(name, folder, shard) / 2**20, max(file.stat().st_size for file in files) / 2**20
        rows.append(Row(f"{name}.memory", shape, "bf16", most, largest, "largest file", "MiB", ratio=largest / most))
    return rows


def from_hf_quietly(directory: Path, out: Path) -> None:
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):  # what is not read, each time
        from_hf(directory, out)


def _copy(files: list[Path], out: Path) -> None:
    out.mkdir()
    for file in files:
        shutil.copyfile(file, out / file.name)
        layout.sync(out / file.name)


def _seconds(call: Callable[[Path], object], out: Path) -> float:
    """What ``call`` takes to write ``out``, which is then deleted."""
    begin = time.perf_counter()
    call(out)
    seconds = time.perf_counter() - begin
    shutil.rmtree(out)
    return seconds


def peak(name: str, folder: Path, shard: str) -> int:
    """Bytes of the largest resident size above that before, of the conversion ``name`` (from_hf, to_hf) of what was
    made in ``folder``, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.convert", name, str(folder), shard]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name} failed: {done.stderr.strip()}")
    return int(done.stdout.split()[-1])


def measure(name: str, folder: Path, shard: str) -> int:
    blank(recipe(1, 2))  # what is loaded once is not the conversion's
    ctypes.CDLL(None).malloc_trim(0)
    # 5 sets the record of the peak back to the present size.
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    if name == "from_hf":
        from_hf_quietly(folder / "hf", folder / "peak")
    else:
        to_hf(folder / "run/checkpoints/step_00000000", folder / "peak", max_shard_size=shard)
    peak = status("VmHWM") - before
    shutil.rmtree(folder / "peak")
    return peak


if __name__ == "__main__":
    print(measure(sys.argv[1], Path(sys.argv[2]), sys.argv[3]))
