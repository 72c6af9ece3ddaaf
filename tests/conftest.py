"""What every test shares: the root of the checkout, and the skip of GPU tests where there is no GPU."""

from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout that holds these tests."""
    return Path(__file__).resolve().parents[1]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
