"""The pools of ranks, shared by the tests of a file.

Not by those of a session: each layout leaves gloo's threads behind, which wake a hundred times a second. Eight ranks
that had been through all layouts took a fifth of two cores from every test after them.
"""

from collections.abc import Iterator

import pool
import pytest


@pytest.fixture(scope="module")
def ranks() -> Iterator[pool.Pools]:
    with pool.pools() as everyone:
        yield everyone
