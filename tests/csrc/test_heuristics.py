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


def test_router_at_longcat_flash():
    """768 columns: 6 vectors a lane, 32 warps; one block on each of the 132 multiprocessors of sm_90."""
    row = 768 * 4
    launch = _host.router_forward_launch(8192, 768, aligned=True, multiprocessors=132, shared_limit=227 * 1024)
    assert launch == {"vectors": 6, "warps": 32, "blocks": 132, "shared_bytes": 2 * row + 32 * (row + 768)}
    launch = _host.router_backward_launch(tokens=8192, columns=768, multiprocessors=132)
    assert launch == {"warps": 8, "blocks": 528, "shared_bytes": 9 * row}


@pytest.mark.parametrize("tokens", [0, 1, 100, 1024, 100_000])
@pytest.mark.parametrize("columns", [1, 24, 128, 129, 770, 1536, 2304])
@pytest.mark.parametrize("shared_limit", [99 * 1024, 163 * 1024, 227 * 1024])
@pytest.mark.parametrize("aligned", [False, True])
def test_router(tokens, columns, shared_limit, aligned):
    launch = _host.router_forward_launch(tokens, columns, aligned, 108, shared_limit)
    assert launch["vectors"] in ((1, 2, 4, 6, 18) if aligned else (2, 6, 18))
    assert launch["vectors"] * 128 >= columns
    assert 1 <= launch["warps"] <= (32 if launch["vectors"] <= 6 else 8)
    assert launch["shared_bytes"] <= shared_limit
    assert launch["blocks"] == min(108, -(-tokens // launch["warps"]))
    launch = _host.router_backward_launch(tokens, columns, 108)
    assert 1 <= launch["warps"] <= 8
    assert launch["shared_bytes"] <= SHARED_BY_DEFAULT
    assert launch["blocks"] == min(4 * 108, -(-tokens // launch["warps"]))


A100 = {"most": 163 * 1024, "preferred": 81 * 1024}
H100 = {"most": 227 * 1024, "preferred": 113 * 1024}


@pytest.mark.parametrize(
    ("device", "element_bytes", "backward", "blocks", "streams", "positions"),
    [
        (H100, 2, False, 2, False, True),
        (H100, 2, True, 2, True, False),
        (H100, 4, False, 2, False, False),
        (H100, 4, True, 1, True, False),
        (A100, 2, False, 2, False, True),
        (A100, 2, True, 1, True, True),
        (A100, 4, False, 2, False, False),
        (A100, 4, True, 2, False, False),
    ],
)
def test_sva_at_cambrian_8b_absorbed(device, element_bytes, backward, blocks, streams, positions):
    """In bf16 x̂ is 32 KiB, and so are positions, which never cost the second block of a multiprocessor; the backward's
    absorbed and grad_pooled, 64 KiB, stay where a block can have them beside x̂."""
    layout = _host.sva_absorbed_layout([(4, 1024, True)], 16, element_bytes, True, backward, **device)
    assert layout["staged"]
    assert layout["streams"] == [streams]
    assert layout["positions"] == [positions]
    assert layout["bytes"] <= device["most"]
    assert (layout["bytes"] <= device["preferred"]) == (blocks == 2)
    of_multiprocessor = device["most"] + 1024
    assert _host.sva_absorbed_blocks(576, 132, of_multiprocessor, layout["bytes"]) == 132 * blocks


def test_sva_absorbed_blocks():
    """As many as registers and shared memory hold, but no more than queries; one a multiprocessor at least."""
    assert _host.sva_absorbed_blocks(10_000, 132, 228 * 1024, 66_832) == 264
    assert _host.sva_absorbed_blocks(10_000, 132, 228 * 1024, 1000) == 264
    assert _host.sva_absorbed_blocks(9, 132, 228 * 1024, 1000) == 9
    assert _host.sva_absorbed_blocks(10_000, 132, 100 * 1024, 99 * 1024) == 132


@pytest.mark.parametrize(("window", "heads"), [(1, 1), (4, 16), (5, 7), (8, 16)])
def test_sva_weights_lie_apart(window, heads):
    """Rows and planes start 16 banks apart, so that the two halves of a warp's store meet in none."""
    layout = _host.sva_absorbed_layout([(window, 64, False)] * 2, heads, 4, True, True, **H100)
    assert layout["row"] % 32 == 16
    assert layout["row"] >= 2 * window**2
    assert layout["plane"] % 32 == 16
    assert layout["plane"] >= heads * layout["row"]


@pytest.mark.parametrize(("channels", "aligned"), [(64, False), (1024, True)])
def test_sva_without_room(channels, aligned):
    """Off the vector grid, or 64 keys of 1024 floats: only weights and moments stay in shared memory."""
    layout = _host.sva_absorbed_layout([(8, channels, True)], 16, 4, aligned, True, **H100)
    assert not layout["staged"]
    assert layout["streams"] == layout["positions"] == [False]
    assert layout["bytes"] <= SHARED_BY_DEFAULT
