"""A finished run, trained once for all tests that alter copies of it."""

from pathlib import Path

import pytest
import sets
import training


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A recipe and its uninterrupted run, which keeps the checkpoints of steps 4, 8 and 10."""
    root = tmp_path_factory.mktemp("run")
    sets.write_set(root, "varied", sets.varied(40))
    recipe = training.write_recipe(root, sets.write_mixture(root, varied=1.0))
    done = training.run(recipe, root / "whole")
    assert done.returncode == 0, done.stderr
    return recipe, root / "whole"
