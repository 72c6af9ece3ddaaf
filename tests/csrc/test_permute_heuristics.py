"""How the CUDA kernels of permute and unpermute cut a row among threads."""

import pytest

from mmoe import _host

WARP, LARGEST = 32, 512


def test_rows_at_longcat_flash():
    """d = 6144: 768 pieces of 16 bytes in bf16, 1536 in fp32; permute holds 4 of them a thread, unpermute 2."""
    assert [_host.row_threads(768, held) for held in (4, 2)] == [192, 384]
    assert [_host.row_threads(1536, held) for held in (4, 2)] == [384, 384]


@pytest.mark.parametrize("held", [1, 2, 4])
@pytest.mark.parametrize("pieces", [0, 1, 31, 32, 33, 1000, 2048, 2049, 100_000])
def test_rows(pieces, held):
    threads = _host.row_threads(pieces, held)
    assert threads % WARP == 0
    assert WARP <= threads <= LARGEST
    rounds = -(-pieces // (threads * held))
    assert rounds == -(-pieces // (LARGEST * held))  # no more than the largest block would take
    assert pieces > (threads - WARP) * held * rounds or threads == WARP  # and a warp less would take more
