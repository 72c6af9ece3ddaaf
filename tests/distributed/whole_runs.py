"""What the ranks of a pool run for test_reshard.py: `mmoe train` itself, with the samples it reads written down."""

from pathlib import Path
from typing import Any

from mmoe.parallel import engine
from mmoe.recipe import load_recipe
from mmoe.train import run


def train(recipe: str, out: str, settings: list[str]) -> tuple[int, list[list[list[str]]]] | None:
    """Trains to the end, from the newest checkpoint in ``out`` if there is one. Returns this rank's place among the
    data-parallel ranks and the names of its samples, pack by pack and micro-batch by micro-batch; None from a rank
    that reads another one's."""
    seen: list[list[list[str]]] = []

    class Watch(run._Watch):
        def __next__(self) -> dict[str, Any]:
            batch = super().__next__()
            seen.append(batch["samples"])
            return batch

    before, run._Watch = run._Watch, Watch  # type: ignore[misc]
    try:
        run.train(load_recipe(recipe, settings), Path(out), resume=True)
    finally:
        run._Watch = before  # type: ignore[misc]
    here = engine.ranks()
    return (here.data_rank, seen) if here.has_batch else None
