"""`mmoe bench`: what it takes, and the way to the checkout's benchmarks, which are not part of the package."""

import argparse
import importlib
import sys
from pathlib import Path

from mmoe.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    text = "the operators, a step, checkpoints, conversion, loading, or choices of the model; needs a checkout"
    suites = ["ops", "step", "checkpoint", "convert", "data", "ablations"]
    parser.add_argument("suite", choices=suites, help=text)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every row here")
    parser.add_argument("--only", action="extend", nargs="+", default=[], metavar="NAME", help="these alone")
    parser.add_argument("--skip", action="extend", nargs="+", default=[], metavar="PEER", help="leave these peers out")
    text = "these shapes alone, for example 'LongCat*'"
    parser.add_argument("--shape", default="*", metavar="PATTERN", help=text)
    parser.add_argument("--quick", action="store_true", help="tiny shapes, few repeats: does it run, not how fast")
    text = "CPU threads of every side; ablations: runs at a time, a thread each (default: 2)"
    parser.add_argument("--threads", type=int, default=2, metavar="N", help=text)
    text = "count the CUDA kernels' memory traffic on the emulator instead: bytes, sectors, bank conflicts"
    parser.add_argument("--emulated", action="store_true", help=text)
    text = "keep the pages of freed tensors, as in a steady training run (default), or the system's"
    parser.add_argument("--allocator", choices=["pool", "system"], default="pool", help=text)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    text = "step: its cost over tokens and over the number of zero experts, as a figure"
    parser.add_argument("--sweep", action="store_true", help=text)
    parser.add_argument("--profile", action="store_true", help="step: where its time goes, as a page")
    parser.add_argument("--steps", type=int, metavar="N", help="ablations: of every run (default: the study's own)")
    text = "ablations: the prepared data (default: data-cache)"
    parser.add_argument("--data", type=Path, default=Path("data-cache"), metavar="DIR", help=text)
    text = "where --sweep, --profile and ablations write (default: docs)"
    parser.add_argument("--out", type=Path, default=Path("docs"), metavar="DIR", help=text)


def run(options: argparse.Namespace) -> None:
    """The command: hands ``options`` to the suite's own module.

    Raises:
        UserError: this is no checkout; and see there.
    """
    checkout = Path(__file__).parents[1]
    if not (checkout / "benchmarks").is_dir():
        raise UserError("benchmarks are not part of the installed package", "", "run this from a checkout of mmoe")
    sys.path.insert(0, str(checkout))
    importlib.import_module(f"benchmarks.{options.suite}").run(options)
