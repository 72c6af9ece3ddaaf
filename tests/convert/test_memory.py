"""How much memory a conversion takes, measured in a process of its own as `mmoe bench convert` does."""

from pathlib import Path

import pytest

from benchmarks import convert
from mmoe.checkpoint import stream

SHARD = "30MB"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """0.2 GB."""
    folder = tmp_path_factory.mktemp("memory")
    convert.make(folder, convert.recipe(8, 3), SHARD)
    return folder


@pytest.mark.parametrize("name", ["from_hf", "to_hf"])
def test_memory_is_that_of_the_pieces_whatever_the_model(made: Path, name: str) -> None:
    """Half as much again as the pieces, where the model has twice that and the checkpoint is one file."""
    sizes = [path.stat().st_size for path in (made / "hf").glob("*.safetensors")]
    assert len(sizes) > 5
    bound = 1.5 * stream.PIECES * stream.PIECE
    assert sum(sizes) > 2 * bound
    peak = convert.peak(name, made, SHARD)
    assert peak < bound, f"{peak / 1e6:.0f} MB"
    assert peak > 20e6, "less than the pieces that were written: it is not the conversion that was measured"
