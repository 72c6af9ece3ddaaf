"""Prints the tables of docs/parallelism.md: how far each layout is from one process, and so is a run that changes it.

python tests/distributed/table.py [NAME ...]        (all layouts without names; 8 ranks and 8 GiB at most)
python tests/distributed/table.py --reshard         (three steps at one layout, two at another)
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = map(str, (HERE.parents[1], HERE.parent, HERE.parent / "data", HERE))

import pool  # noqa: E402 - found through the line above
import test_reshard  # noqa: E402
from test_layouts import ONE_OF_A_KIND, TOGETHER, whole  # noqa: E402


def largest(results: list[dict[str, Any]], single: list[dict[str, Any]], name: str) -> float:
    """The largest relative difference of a curve."""
    pairs = zip(results[0][name], single[0][name], strict=True)
    return max(abs(ours - theirs) / abs(theirs) for ours, theirs in pairs)


def gradients(results: list[dict[str, Any]], single: list[dict[str, Any]]) -> str:
    """The largest difference of a gradient over the largest gradient of its parameter, and which parameter's."""
    if not results[0]["gradients"]:
        return "–"
    ours, theirs = whole(results, "gradients"), whole(single, "gradients")
    floor = max(float(gradient.abs().max()) for gradient in theirs.values()) / 1000
    worst = max(float((ours[n] - g).abs().max()) / max(float(g.abs().max()), floor) for n, g in theirs.items())
    return f"{worst:.0e}"


def reshard() -> None:
    print("| saved at | ranks | resumed at | ranks | largest difference | samples |\n|---|---|---|---|---|---|")
    with pool.pools() as ranks, tempfile.TemporaryDirectory() as folder:
        runs = test_reshard.Runs(ranks, Path(folder))
        expected, stream = runs.whole("one process")
        for first, then in test_reshard.PAIRS + test_reshard.MORE_PAIRS:
            rows, samples = runs.over(first, then)
            same = "the same" if samples == stream[len(stream) * 3 // 5 :] else "others"
            places = f"{first} | {test_reshard.LAYOUTS[first][0]} | {then} | {test_reshard.LAYOUTS[then][0]}"
            print(f"| {places} | {test_reshard.difference(rows, expected):.0e} | {same} |", flush=True)


def main() -> None:
    if sys.argv[1:] == ["--reshard"]:
        reshard()
        return
    print("| layout | ranks | loss | gradient norm | gradients |\n|---|---|---|---|---|")
    with pool.pools() as ranks:
        single = ranks(1).run("jobs", "train")
        for name, (world, parallel) in {**ONE_OF_A_KIND, **TOGETHER}.items():
            if len(sys.argv) > 1 and name not in sys.argv[1:]:
                continue
            results = ranks(world).run("jobs", "train", seconds=600, **parallel)
            loss, norm = (largest(results, single, curve) for curve in ("loss", "grad_norm"))
            print(f"| {name} | {world} | {loss:.0e} | {norm:.0e} | {gradients(results, single)} |", flush=True)


if __name__ == "__main__":
    main()
