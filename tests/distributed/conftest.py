"""The pools of ranks, shared by all tests of a session."""

from collections.abc import Iterator

import pool
import pytest


@pytest.fixture(scope="session")
def ranks() -> Iterator[pool.Pools]:
    with pool.pools() as everyone:
        yield everyone
