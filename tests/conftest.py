"""What every test shares: the root of the checkout, the skip of GPU tests where there is no GPU, and which tests two
workers leave to one of them (`make test`)."""

from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout that holds these tests."""
    return Path(__file__).resolve().parents[1]


TOGETHER = ("csrc", "distributed", "emulated", "launch")
"""Folders whose tests share what takes minutes to make, or a place on this machine: builds, pools of ranks, a Slurm
cluster. Of the others each file goes to one worker by itself."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        file = item.path.relative_to(here)
        item.add_marker(pytest.mark.xdist_group(file.parts[0] if file.parts[0] in TOGETHER else file.as_posix()))
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
