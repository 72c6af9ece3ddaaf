"""Hostile checkpoints: nothing in one is called, and nothing outside of it is read."""

import dataclasses
import io
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import small
import torch
import training
from torch.distributed.checkpoint import filesystem

from mmoe.errors import UserError
from mmoe.models.multimodal import build
from mmoe.parallel import pickles, state
from mmoe.train.step import Stepper

pytestmark = pytest.mark.latest


class Call:
    """Pickles as a call of ``function``."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.parts = function, arguments

    def __reduce__(self) -> Any:
        return self.parts


@pytest.fixture
def run() -> Stepper:
    small.config()
    stepper = Stepper(small.RECIPE, [build(small.RECIPE)])
    batch = {**small.batch(torch.full((2, 32), 5)), "samples": [["a"], ["b"]], "skipped": []}
    assert stepper.step(iter([batch]), 0.1).taken
    return stepper


@pytest.fixture
def folder(run: Stepper, tmp_path: Path) -> Path:
    path = tmp_path / "state"
    path.mkdir()
    training.save_state(path, run)
    return path


def load(run: Stepper, folder: Path) -> None:
    state.load(folder, run.wrapped, run.optimizer)


def test_a_checkpoint_of_ours_is_data(run: Stepper, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for asked in (None, "0"):
        if asked:
            monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", asked)
        load(run, folder)
        assert os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD") == asked
        assert filesystem.pickle is pickle


@pytest.mark.parametrize(
    ("function", "arguments", "named"),
    [
        (os.system, ("touch {marker}",), "it names posix.system"),
        (eval, ("open('{marker}', 'w')",), "it names builtins.eval"),
        (getattr, (pickles.metadata._MEM_FORMAT_ENCODING, "__class__"), "it asks for '__class__' of"),
        (getattr, (torch.Size, "__init_subclass__"), "it asks for '__init_subclass__' of"),
        (torch.load, ("{marker}",), "it names torch.serialization.load"),
    ],
)
def test_a_call_in_the_index(
    run: Stepper, folder: Path, tmp_path: Path, function: Any, arguments: tuple, named: str
) -> None:
    marker = tmp_path / "marker"
    given = [part.format(marker=marker) if isinstance(part, str) else part for part in arguments]
    (folder / ".metadata").write_bytes(pickle.dumps(Call(function, *given)))
    with pytest.raises(UserError, match=f"not data: {named}"):
        load(run, folder)
    assert not marker.exists()


@pytest.mark.parametrize("member", [pickles.planner.WriteItemType.SHARD, pickles.metadata._MEM_FORMAT_ENCODING(0)])
def test_members_of_enumerations_in_both_forms(member: Any) -> None:
    """Python 3.11.2 pickles one by getattr and its name, 3.11.7 by its class and value."""
    for form in (Call(getattr, type(member), member.name), Call(type(member), member.value)):
        assert pickles._Loader(io.BytesIO(pickle.dumps(form))).load() is member


@pytest.mark.parametrize("name", ["../other", "/etc/passwd", "..", "", "state/x"])
def test_an_index_that_leads_elsewhere(run: Stepper, folder: Path, name: str) -> None:
    index = pickle.loads((folder / ".metadata").read_bytes())
    key, place = next(iter(index.storage_data.items()))
    index.storage_data[key] = dataclasses.replace(place, relative_path=name)
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(UserError, match=f"it names the file '{name}'"):
        load(run, folder)


@pytest.mark.parametrize("content", [b"", b"\x80\x04", b"nonsense", pickle.dumps([1]), pickle.dumps(torch.Size([1]))])
def test_an_index_of_something_else(run: Stepper, folder: Path, content: bytes) -> None:
    (folder / ".metadata").write_bytes(content)
    with pytest.raises(UserError, match="not data"):
        load(run, folder)


def nested(levels: int = 80) -> bytes:
    """Tuples, each of the one below twice: as many opcodes as levels."""
    return b")" + b"\x94" + b"".join(b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86\x94" for i in range(levels))


def indices(levels: int = 80) -> bytes:
    """The same of :class:`MetadataIndex`."""
    name = b"ctorch.distributed.checkpoint.metadata\nMetadataIndex\n"
    code = b"K\0\x94"
    for i in range(levels):
        below = b"h" + bytes([i])
        code += name + b")\x81}(" + b"X\3\0\0\0fqn" + below + b"X\6\0\0\0offset" + below + b"ub\x94"
    return code


LAST = b"hP"
PICKLES = {
    "a number for 40 GB of memo": b"\x80\4K\1r\xff\xff\xff\xff.",
    "bytes without end": b"\x80\4\x8e" + (2**62).to_bytes(8, "little") + b".",
    "more bytes than can be": b"\x80\4\x8e" + b"\xff" * 8 + b".",
    "an array without end": b"\x80\5\x96" + (2**40).to_bytes(8, "little") + b".",
    "a frame without end": b"\x80\4\x95" + (2**62).to_bytes(8, "little") + b".",
    "tuples as a key": b"\x80\4" + nested() + b"}" + LAST + b"K\1s.",
    "tuples as keys": b"\x80\4" + nested() + b"}(" + LAST + b"K\1u.",
    "tuples in a set": b"\x80\4" + nested() + b"\x8f(" + LAST + b"\x90.",
    "indices as a key": b"\x80\4" + indices() + b"}" + LAST + b"K\1s.",
    "tuples as a member's name": b"\x80\4"
    + nested()
    + b"cbuiltins\ngetattr\nctorch.distributed.checkpoint.planner\nWriteItemType\n"
    + LAST
    + b"\x86R.",
    "tuples as a member's value": b"\x80\4"
    + nested()
    + b"ctorch.distributed.checkpoint.planner\nWriteItemType\n"
    + LAST
    + b"\x85R.",
    "tuples as a new member": b"\x80\4"
    + nested()
    + b"ctorch.distributed.checkpoint.planner\nWriteItemType\n"
    + LAST
    + b"\x85\x81.",
    "a class's attribute": b"\x80\4ctorch.distributed.checkpoint.metadata\nMetadata\nN}X\1\0\0\0aK\1s\x86b.",
}


@pytest.mark.parametrize("case", PICKLES)
def test_an_index_that_would_take_all_memory_or_time(case: str) -> None:
    with pytest.raises(pickle.UnpicklingError):
        pickles.load_metadata(io.BytesIO(PICKLES[case]))
    assert not hasattr(pickles.metadata.Metadata, "a")


def test_a_key_of_nested_tuples(folder: Path) -> None:
    index = pickle.loads((folder / ".metadata").read_bytes())
    key = next(iter(index.storage_data))
    vars(key)["offset"] = ((1,), (2,))
    with pytest.raises(pickle.UnpicklingError, match="a key is more than"):
        pickles.load_metadata(io.BytesIO(pickle.dumps(index)))


@pytest.mark.parametrize("name", [".metadata", "common.pt"])
@pytest.mark.parametrize("kind", ["FIFO", "folder", "device"])
def test_what_is_no_file_is_not_waited_for(run: Stepper, folder: Path, name: str, kind: str) -> None:
    (folder / name).unlink(missing_ok=True)
    if kind == "FIFO":
        os.mkfifo(folder / name)
    elif kind == "folder":
        (folder / name).mkdir()
    else:
        (folder / name).symlink_to("/dev/zero")
    with pytest.raises(UserError, match=f"{name} is not data"):
        load(run, folder)


LEGACY = io.BytesIO()
torch.save({"a": Call(os.system, "false")}, LEGACY, _use_new_zipfile_serialization=False)
CONTENTS = [b"", b"\x80", b"PK", b"nonsense", pickle.dumps([1], 2), LEGACY.getvalue(), LEGACY.getvalue()[:-20]]


@pytest.mark.parametrize("content", CONTENTS)
def test_a_common_part_of_something_else(run: Stepper, folder: Path, content: bytes) -> None:
    (folder / "common.pt").write_bytes(content)
    with pytest.raises(UserError, match=r"common\.pt is not data: [^\n]+$"):
        load(run, folder)


@pytest.mark.parametrize("content", CONTENTS)
def test_an_object_of_something_else(run: Stepper, folder: Path, content: bytes) -> None:
    redirect(folder, "random", content)
    with pytest.raises(UserError, match=r"an object in the state is not data: [^\n]+$"):
        load(run, folder)


def test_a_call_in_the_common_part(run: Stepper, folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    torch.save({"a": Call(os.system, f"touch {marker}")}, folder / "common.pt")
    with pytest.raises(UserError, match=r"common\.pt is not data: it names posix\.system \("):
        load(run, folder)
    assert not marker.exists()


def packed(value: Any) -> bytes:
    """What torch.save writes, compressed: zeros unpack to a thousand times their size."""
    plain, out = io.BytesIO(), io.BytesIO()
    torch.save(value, plain)
    with zipfile.ZipFile(plain) as parts, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as squeezed:
        for part in parts.namelist():
            squeezed.writestr(part, parts.read(part))
    return out.getvalue()


def redirect(folder: Path, chosen: str, content: bytes) -> None:
    """Has the index find what it knows by a name with ``chosen`` in it in a file of ``content``."""
    (folder / "hostile.distcp").write_bytes(content)
    index = pickle.loads((folder / ".metadata").read_bytes())
    key = next(key for key in index.storage_data if chosen in key.fqn)
    index.storage_data[key] = dataclasses.replace(
        index.storage_data[key], relative_path="hostile.distcp", offset=0, length=len(content)
    )
    (folder / ".metadata").write_bytes(pickle.dumps(index))


def test_a_compressed_common_part(run: Stepper, folder: Path) -> None:
    (folder / "common.pt").write_bytes(packed({"zeros": torch.zeros(1 << 20)}))
    with pytest.raises(UserError, match="compressed"):
        load(run, folder)


@pytest.mark.parametrize("chosen", ["random", "final_layernorm"])
def test_a_compressed_object_or_tensor(run: Stepper, folder: Path, chosen: str) -> None:
    loaded = torch.load
    redirect(folder, chosen, packed(torch.zeros(1 << 20)))
    with pytest.raises(UserError, match="an object in the state is not data: it is compressed"):
        load(run, folder)
    assert torch.load is loaded


def test_an_archive_cut_short(run: Stepper, folder: Path) -> None:
    plain = io.BytesIO()
    torch.save(torch.zeros(8), plain)
    redirect(folder, "random", plain.getvalue()[:-30])
    with pytest.raises(UserError, match="an object in the state is not data: it is no archive"):
        load(run, folder)


def test_a_call_in_an_object_among_the_tensors(run: Stepper, folder: Path, tmp_path: Path) -> None:
    """The random state is an object of its own file, which upstream reads with weights_only=False."""
    marker = tmp_path / "marker"
    hostile = io.BytesIO()
    torch.save(Call(os.system, f"touch {marker}"), hostile)
    redirect(folder, "random", hostile.getvalue())
    with pytest.raises(UserError, match=r"an object in the state is not data: it names posix\.system \("):
        load(run, folder)
    assert not marker.exists()
