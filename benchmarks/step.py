"""``mmoe bench step``: a whole training step beside those of others, its cost over sizes, and where its time goes."""

from argparse import Namespace

import torch
from rich.console import Console

from benchmarks import allocator, measure, report
from benchmarks.measure import Effort
from benchmarks.ops import GEMM_SIDE, machine
from benchmarks.report import Row
from benchmarks.training import breakdown, compare, overlap, sweep
from benchmarks.training.ours import ROUTINGS
from mmoe.errors import UserError

OVERLAP = "overlap"
KNOWN = [*compare.PEERS, OVERLAP]
STEP_EFFORT = Effort(seconds=30.0, least=5, most=15, longest=90.0, enough=3)


def run(options: Namespace) -> None:
    """The command; ``options`` as ``mmoe bench`` reads them.

    Raises:
        UserError: two things at once, or an unknown name to skip.
    """
    if options.sweep and options.profile:
        raise UserError("two things at once", "--sweep --profile", "ask for one of them")
    if (options.sweep or options.profile) and (options.json or options.skip):
        raise UserError("rows of peers are of neither --sweep nor --profile", "--json, --skip", "leave them out")
    for name in options.skip:
        if name not in KNOWN:
            raise UserError(f"there is no {name!r}", "--skip", f"choose from {', '.join(KNOWN)}")
    console = Console(width=200, soft_wrap=True)
    if options.allocator == "pool" and not options.quick:
        allocator.preload()
    torch.set_num_threads(options.threads)
    about = machine(torch.device("cpu"))
    console.print(about, highlight=False)
    if options.sweep:
        sweep.run(options, console)
    elif options.profile:
        breakdown.run(options, console, about)
    else:
        _compare(options, console)


def _compare(options: Namespace, console: Console) -> None:
    quick, skip = options.quick, set(options.skip)
    effort, side = (measure.QUICK, 64) if quick else (STEP_EFFORT, GEMM_SIDE)
    targets = [] if quick else report.load_targets()
    rows: list[Row] = []
    progress = Console(stderr=True)

    def take(title: str, mine: list[Row]) -> None:
        judged = [report.judge(row, targets) for row in mine]
        report.show(title, judged, console)
        rows.extend(judged)
        if options.json:
            report.write(options.json, rows)

    for dtype in compare.DTYPES:
        for routing in ROUTINGS:
            torch.manual_seed(0)
            with progress.status(f"{routing}, {dtype}"):
                found = list(compare.rows(routing, dtype, quick=quick, skip=skip, effort=effort, gemm_side=side))
            take(f"{routing}, {dtype}", found)
        if OVERLAP not in skip:
            with progress.status(f"overlap, {dtype}"):
                found = overlap.rows(dtype, quick=quick, threads=options.threads)
            take(f"overlap, {dtype}", found)
    if asked := [row for row in rows if row.met is not None]:
        console.print(f"{sum(row.met is True for row in asked)} of {len(asked)} targets met")
