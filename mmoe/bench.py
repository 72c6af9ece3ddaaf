"""`mmoe bench`: what each suite takes, and the way to the checkout's benchmarks, which are not part of the package."""

import argparse
import importlib
import sys
from functools import partial
from pathlib import Path
from typing import Any

from mmoe.arguments import Commands, command
from mmoe.errors import UserError

ROWS = ("json", "quick", "threads")
"""The options of suites that print rows."""
SUITES = {
    "ops": (
        "the operators beside their peers and the machine's bandwidth",
        "ops --only router --json router.json",
        (*ROWS, "only", "skip", "shape", "emulated", "allocator", "device"),
    ),
    "step": (
        "a training step beside transformers' and Megatron-Core's",
        "step --skip megatron",
        (*ROWS, "skip", "sweep", "profile", "allocator", "out"),
    ),
    "checkpoint": ("checkpoints of one process beside a plain file copy", "checkpoint --json rows.json", ROWS),
    "convert": ("conversion from and to Hugging Face beside a plain file copy", "convert --json rows.json", ROWS),
    "data": (
        "images/s into packed batches beside raw DALI and other loaders, and what cached features save",
        "data --only dali features",
        (*ROWS, "only", "skip"),
    ),
    "ablations": (
        "choices of the model, three seeds each, as a page",
        "ablations --only connector --steps 100 --out build/ablations",
        ("quick", "only", "steps", "parallel", "data", "out"),
    ),
}
"""Of each: what it measures, an example, and its options."""


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 on")
    return int(text)


OPTIONS: dict[str, dict[str, Any]] = {
    "json": {"type": Path, "metavar": "FILE", "help": "write every row here"},
    "only": {"action": "extend", "nargs": "+", "default": [], "metavar": "NAME", "help": "these alone"},
    "skip": {"action": "extend", "nargs": "+", "default": [], "metavar": "PEER", "help": "leave these peers out"},
    "shape": {"default": "*", "metavar": "PATTERN", "help": "these shapes alone, for example 'LongCat*'"},
    "quick": {"action": "store_true", "help": "briefly and small: does it run, not how fast or well"},
    "threads": {"type": _positive, "default": 2, "metavar": "N", "help": "CPU threads of every side (default: 2)"},
    "parallel": {"type": _positive, "default": 2, "metavar": "N", "help": "runs at a time, a thread each (default: 2)"},
    "emulated": {
        "action": "store_true",
        "help": "count the CUDA kernels' memory traffic on the emulator instead: bytes, sectors, bank conflicts",
    },
    "allocator": {
        "choices": ["pool", "system"],
        "default": "pool",
        "help": "keep the pages of freed tensors, as in a steady training run (default), or the system's",
    },
    "device": {"choices": ["cpu", "cuda"], "default": "cpu", "help": "(default: cpu)"},
    "sweep": {
        "action": "store_true",
        "help": "its cost over tokens and over the number of zero experts instead, as a figure",
    },
    "profile": {"action": "store_true", "help": "where its time goes instead, as a page"},
    "steps": {"type": int, "metavar": "N", "help": "of every run (default: the study's own)"},
    "data": {
        "type": Path,
        "default": Path("data-cache"),
        "metavar": "DIR",
        "help": "the prepared data (default: data-cache)",
    },
    "out": {
        "type": Path,
        "default": Path("docs"),
        "metavar": "DIR",
        "help": "where pages and figures are written (default: docs, which ablations fill in full alone)",
    },
}
"""What each option takes, as every suite has it that has it."""


def add_suites(commands: Commands) -> None:
    for name, (summary, example, options) in SUITES.items():
        parser = command(commands, name, partial(_run, name), summary, f"bench {example}")
        for option in options:
            parser.add_argument(f"--{option}", **OPTIONS[option])


def _run(suite: str, options: argparse.Namespace) -> None:
    """Hands ``options`` to the suite's own module.

    Raises:
        UserError: this is no checkout; and see there.
    """
    checkout = Path(__file__).parents[1]
    if not (checkout / "benchmarks").is_dir():
        raise UserError("benchmarks are not part of the installed package", "", "run this from a checkout of mmoe")
    sys.path.insert(0, str(checkout))
    importlib.import_module(f"benchmarks.{suite}").run(options)
