"""Prints the table of docs/parallelism.md: how far each layout is from one process.

python tests/distributed/table.py [NAME ...]        (all layouts without names; 8 ranks and 8 GiB at most)
"""

import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE)]

import pool  # noqa: E402 - found through the line above
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


def main() -> None:
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
