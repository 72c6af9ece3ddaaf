"""The table type: both ways, bit for bit, whole or a stretch at a time, and no name unread."""

from dataclasses import replace

import pytest
import torch

from mmoe.checkpoint.tensors import Memory, Spec, Tensors
from mmoe.convert.mapping import Entry, Table
from mmoe.errors import UserError

TABLE = Table(
    [
        Entry("plain", ("p",)),
        Entry("joined", ("gate", "up")),
        Entry("stacked", ("e0.a", "e0.b", "e1.a", "e1.b"), stacked=2),
        Entry("short", ("long",), unused_rows=2),
    ],
    {"e2.a": "e0.a"},
)


def ours() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "plain": torch.randn(3),
        "joined": torch.randn(4, 2),
        "stacked": torch.randn(2, 6, 5),
        "short": torch.randn(3, 2),
    }


def test_write():
    state = ours()
    theirs = TABLE.write(state)
    assert theirs.keys() == {"p", "gate", "up", "e0.a", "e0.b", "e1.a", "e1.b", "e2.a", "long"}
    assert torch.equal(theirs["gate"], state["joined"][:2])
    assert torch.equal(theirs["up"], state["joined"][2:])
    assert torch.equal(theirs["e1.a"], state["stacked"][1, :3])
    assert torch.equal(theirs["long"], torch.cat([state["short"], torch.zeros(2, 2)]))
    assert torch.equal(theirs["e2.a"], torch.zeros(3, 5))


def test_there_and_back():
    back = TABLE.read(TABLE.write(ours()), "here")
    assert back.keys() == ours().keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in ours().items())


def test_what_no_computation_reads_is_not_read():
    theirs = dict(TABLE.write(ours()))
    theirs["long"][3:] = torch.nan
    del theirs["e2.a"]
    assert torch.equal(TABLE.read(theirs, "here")["short"], ours()["short"])


@pytest.mark.parametrize("name", ["p", "up", "e1.b", "long"])
def test_a_missing_tensor_is_named(name):
    theirs = dict(TABLE.write(ours()))
    del theirs[name]
    with pytest.raises(UserError, match=f"here lacks tensor {name}"):
        TABLE.read(theirs, "here")


def test_an_unread_tensor_is_named():
    with pytest.raises(UserError, match="here has unread tensor q and 1 more"):
        TABLE.read({**TABLE.write(ours())} | {"q": torch.zeros(1), "r": torch.zeros(1)}, "here")
    with pytest.raises(UserError, match="state has unread tensor extra"):
        TABLE.write(ours() | {"extra": torch.zeros(1)})
    with pytest.raises(UserError, match="state lacks tensor joined"):
        TABLE.write({name: tensor for name, tensor in ours().items() if name != "joined"})


KINDS = Table(
    [
        Entry("qkv", ("q", "k", "v")),
        Entry("embedding", ("embed",), tied=("head",)),
        Entry("token", ("class",), shapes=((1, 1, 3), (3,))),
        Entry("halves", ("a.g", "a.u", "b.g", "b.u"), stacked=2, halves=True),
        Entry("router", ("r",), fp32=True),
        Entry("scalar", ("s",)),
        Entry("fused", ("f",), unused_rows=1, halves=True),
    ]
)


def kinds() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    shapes = {"qkv": (24, 5), "embedding": (7, 3), "token": (1, 1, 3), "halves": (2, 2, 3, 4), "router": (2, 3)}
    shapes |= {"scalar": (), "fused": (3, 2, 2, 2)}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def test_every_kind_of_entry():
    state = kinds()
    theirs = KINDS.write(state)
    for name, part in zip("qkv", state["qkv"].chunk(3), strict=True):
        assert torch.equal(theirs[name], part)
    assert torch.equal(theirs["class"], state["token"].view(3))
    assert torch.equal(theirs["b.g"], state["halves"][1, 0])
    assert torch.equal(theirs["b.u"], state["halves"][1, 1])
    assert torch.equal(theirs["f"], torch.cat([state["fused"].flatten(1, 2), torch.zeros(1, 4, 2)]))
    assert "head" not in theirs
    back = KINDS.read(theirs, "here")
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())


def test_a_stretch_is_a_part_of_the_whole():
    state = kinds()
    for tensors in (KINDS.write(state), KINDS.read(KINDS.write(state), "here"), TABLE.write(ours())):
        for name, whole in tensors.items():
            flat = whole.flatten()
            for start in range(len(flat)):
                for count in range(len(flat) - start + 1):
                    out = torch.full((count,), torch.nan)
                    tensors.read(name, start, out)
                    assert torch.equal(out, flat[start : start + count]), name


class Unread(Tensors):
    def __init__(self, tensors) -> None:
        self.specs = {name: Spec(tensor.shape, tensor.dtype) for name, tensor in tensors.items()}

    def read(self, name, start, out):
        raise AssertionError(f"{name} was read")


def test_shapes_and_dtypes_are_known_before_anything_is_read():
    for table, state in ((TABLE, ours()), (KINDS, kinds())):
        theirs = table.write(state, torch.bfloat16)
        unread = table.write(Unread(state), torch.bfloat16)
        assert {n: (t.shape, t.dtype) for n, t in theirs.items()} == {
            n: tuple(vars(s).values()) for n, s in unread.specs.items()
        }
        back = table.read(unread, "here")
        assert {name: spec.shape for name, spec in back.specs.items()} == {name: t.shape for name, t in state.items()}
        meta = table.write({name: tensor.to("meta") for name, tensor in state.items()}, torch.bfloat16)
        assert meta.specs == unread.specs
    assert {name for name, spec in unread.specs.items() if spec.dtype == torch.float32} == {"r"}
    assert torch.equal(theirs["k"], KINDS.write(kinds())["k"].bfloat16())


def test_tied_tensors_are_one():
    theirs = dict(KINDS.write(kinds()))
    theirs["head"] = theirs["embed"].clone()
    assert torch.equal(KINDS.read(theirs, "here")["embedding"], theirs["embed"])
    theirs["head"][6, 2] += 1
    with pytest.raises(UserError, match="other numbers in head than in embed"):
        KINDS.read(theirs, "here")


def test_tables_are_put_together():
    both = TABLE + KINDS.prefixed("vision.", "tower.")
    state = ours() | {f"vision.{name}": tensor for name, tensor in kinds().items()}
    theirs = both.write(state)
    assert theirs.keys() == {*TABLE.write(ours()), *(f"tower.{name}" for name in KINDS.write(kinds()))}
    assert all(torch.equal(both.read(theirs, "here")[name], tensor) for name, tensor in state.items())
    with pytest.raises(ValueError, match="plain stands in the table twice"):
        TABLE + Table([Entry("plain", ("other",))])
    with pytest.raises(ValueError, match="p stands in the table twice"):
        TABLE + Table([Entry("other", ("p",))])


@pytest.mark.parametrize("shape", [(23, 5), (12, 5)])
def test_parts_that_do_not_fit(shape):
    with pytest.raises(UserError, match=r"qkv .* is not made up of q"):
        KINDS.write(kinds() | {"qkv": torch.zeros(shape[0] - 1, 5)})
    with pytest.raises(UserError, match="shapes that do not make up qkv, from tensor q"):
        KINDS.read({**KINDS.write(kinds())} | {"q": torch.zeros(shape)}, "here")


class Known(Memory):
    def fingerprint(self) -> str:
        return "x"


def test_another_table_makes_other_tensors():
    """What a conversion that goes on keeps was made by the same table, not merely of the same tensors."""
    tables = (
        Table([Entry("a", ("x", "y")), Entry("b", ("z",))]),
        Table([Entry("a", ("y", "x")), Entry("b", ("z",))]),
        Table([Entry("a", ("x", "y"), fp32=True), Entry("b", ("z",))]),
        Table([Entry("a", ("x", "y")), Entry("b", ("z",))], {"p": "x"}),
    )
    ours = {"a": torch.zeros(4, 2), "b": torch.zeros(3)}
    theirs = {"x": torch.zeros(2, 2), "y": torch.zeros(2, 2), "z": torch.zeros(3)}
    for made in (
        [table.write(Known(ours)) for table in tables],
        [table.read(Known(theirs), "there") for table in tables],
    ):
        assert len({tensors.fingerprint() for tensors in made}) == len(tables)
        assert None not in {tensors.fingerprint() for tensors in made}
    assert tables[0].write(Known(ours)).fingerprint() == replace(tables[0]).write(Known(ours)).fingerprint()
    assert tables[0].write(ours).fingerprint() is None
