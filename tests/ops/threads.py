"""Every result is the same, bit for bit, for any number of threads."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def check_bits(run: Callable[[], Iterable[Tensor]]) -> None:
    """``run`` returns the same bits with one, two and three threads, and with two again."""
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            results.append(list(run()))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for got, first in zip(other, results[0], strict=True):
            assert torch.equal(got, first)
