"""How CUDA kernels are launched: pure functions of the shapes."""

import pytest

from mmoe import _host

WARP = 32
SHARED_BY_DEFAULT = 48 * 1024


def test_sva_at_cambrian_8b():
    """16 heads of 64 in bf16: a warp reads 512 bytes, four heads; 1 + 1 + 1 + 16 keys."""
    launch = _host.sva_projected_launch(heads=16, width=64, element_bytes=2, aligned=True, keys=19)
    assert launch == {"vectors": True, "width": 64, "groups": 4, "warps": 4, "shared_bytes": 4 * 19 * 4 * 8}


@pytest.mark.parametrize("keys", [1, 19, 512, 1024])
@pytest.mark.parametrize("element_bytes", [2, 4])
@pytest.mark.parametrize("width", [1, 8, 32, 40, 64, 80, 128])
@pytest.mark.parametrize("aligned", [False, True])
def test_sva_over_projected_encoders(width, element_bytes, keys, aligned):
    launch = _host.sva_projected_launch(5, width, element_bytes, aligned, keys)
    assert launch["width"] in (32, 64, 128)
    assert launch["width"] >= width
    heads_of_warp = WARP * 16 // element_bytes // launch["width"] if aligned else 1
    assert launch["groups"] == -(-5 // heads_of_warp)
    assert 1 <= launch["warps"] <= 4
    assert launch["shared_bytes"] == launch["warps"] * keys * heads_of_warp * 8
    assert launch["shared_bytes"] <= SHARED_BY_DEFAULT
