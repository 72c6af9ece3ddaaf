"""The table type: both ways, bit for bit, and no name unread."""

import pytest
import torch

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
