"""Bounded memory, resuming, and files as others write them: conversions of a small model, a few KB at a time."""

import dataclasses
import fcntl
import hashlib
import json
import math
import os
import pickle
import shutil
import threading
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from exporting import MODEL, load
from huggingface_hub import save_torch_state_dict
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata
from transformers import LongcatFlashConfig, LongcatFlashForCausalLM

from mmoe.checkpoint import layout, shards, stream
from mmoe.checkpoint.load import load as load_checkpoint
from mmoe.checkpoint.load import state_dict, weights
from mmoe.checkpoint.stream import File, Stretch
from mmoe.checkpoint.tensors import Memory
from mmoe.convert import export, from_hf, ingest, to_hf, verify
from mmoe.convert.families import longcat
from mmoe.convert.weights import INDEX
from mmoe.errors import UserError
from mmoe.layers.router import CONTROLLER_STATE
from mmoe.models.multimodal import build
from mmoe.parallel import pickles
from mmoe.parallel.state import Place

SHARD = "40KB"


@pytest.fixture
def checkpoint(exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of many files, its larger tensors in several chunks."""
    monkeypatch.setattr(ingest, "FILE", 40_000)
    monkeypatch.setattr(shards, "LARGEST_CHUNK", 5_000)
    from_hf(exported.out, tmp_path / "run")
    return tmp_path / "run/checkpoints/step_00000000"


def test_a_checkpoint_of_many_files_and_chunks(exported, checkpoint: Path) -> None:
    assert len(list((checkpoint / "state").glob("__1_*.distcp"))) > 5
    assert layout.verify(checkpoint) == len([path for path in checkpoint.rglob("*") if path.is_file()]) - 1
    loaded = load_checkpoint(checkpoint)
    found = weights(loaded.network)
    assert found.keys() == exported.state.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in exported.state.items())
    fresh, mine = build(loaded.recipe).state_dict(), loaded.network.state_dict()
    controller = [name for name in fresh if name.endswith(CONTROLLER_STATE)]
    assert controller
    assert all(torch.equal(mine[name], fresh[name]) for name in controller)
    lazy = state_dict(checkpoint)[1]
    assert lazy.keys() == found.keys()
    assert all(torch.equal(lazy[name], tensor) for name, tensor in found.items())


def test_files_are_those_of_transformers(exported, foreign, checkpoint: Path, tmp_path: Path) -> None:
    """Byte for byte: the whole in one file as ``save_pretrained`` writes it, and many as huggingface_hub does, which
    transformers calls; and the index as transformers writes it."""
    one = (exported.out / "language/model.safetensors").read_bytes()
    assert one == (exported.out.with_name("again-language") / "model.safetensors").read_bytes()
    for dtype in (None, "bf16"):
        out, again = tmp_path / f"hf-{dtype}", tmp_path / f"again-{dtype}"
        to_hf(checkpoint, out, dtype, max_shard_size=SHARD)
        wanted = torch.bfloat16 if dtype else None
        recipe, state, _ = state_dict(checkpoint)
        again.mkdir()
        language = {name: tensor for name, tensor in state.items() if name.startswith("language.")}
        table = longcat.table(recipe.model.backbone, recipe.model.moe, fused=False)
        save_torch_state_dict(dict(table.write(language, wanted)), str(again), max_shard_size=SHARD)
        names = {path.name for path in again.iterdir()}
        assert len(names) > 3
        assert names <= {path.name for path in (out / "language").iterdir()}
        divided = [json.loads((folder / INDEX).read_text())["weight_map"] for folder in (out / "language", again)]
        assert divided[0] == divided[1]
        for name in sorted(names - {INDEX}):
            assert (out / "language" / name).read_bytes() == (again / name).read_bytes(), name
    language = tmp_path / "hf-None/language"
    model, info = LongcatFlashForCausalLM.from_pretrained(language, output_loading_info=True)
    assert not any(info.values())
    model.save_pretrained(tmp_path / "theirs", max_shard_size=SHARD)
    ours, theirs = (json.loads((folder / INDEX).read_text()) for folder in (language, tmp_path / "theirs"))
    assert ours.keys() == theirs.keys()
    assert ours["metadata"] == theirs["metadata"]
    assert ours["weight_map"].keys() == theirs["weight_map"].keys()
    assert verify(checkpoint, tmp_path / "hf-None") == []


class Broken(Exception):
    pass


@pytest.mark.parametrize("way", ["to-hf", "from-hf"])
def test_goes_on_where_it_was_broken_off(exported, checkpoint, tmp_path, monkeypatch, way) -> None:
    out = tmp_path / "out"
    if way == "to-hf":
        part, whole = tmp_path / ".out.part", out

        def convert() -> None:
            to_hf(checkpoint, out, max_shard_size=SHARD)
    else:
        part, whole = out / "checkpoints/.step_00000000.part", out / "checkpoints/step_00000000"

        def convert() -> None:
            from_hf(exported.out, out)

    written: list[Path] = []
    real = stream._write

    def write(path: Path, *rest):
        if len(written) == limit:
            (path.parent / f".{path.name}.tmp").write_bytes(b"half of it")
            raise Broken
        written.append(path)
        return real(path, *rest)

    monkeypatch.setattr(stream, "_write", write)
    limit = 4
    with pytest.raises(Broken):
        convert()
    assert not whole.exists()
    assert not (out / "checkpoints/latest").exists()
    damaged, *kept = written
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1  # of the same size, other than it was written
    damaged.write_bytes(content)
    before = {path.relative_to(part): path.stat() for path in kept}
    written.clear()
    limit = 10**9
    convert()
    assert damaged in written
    assert not set(kept) & set(written)
    for path, stat in before.items():
        assert ((whole / path).stat().st_ino, (whole / path).stat().st_mtime_ns) == (stat.st_ino, stat.st_mtime_ns)
    assert not part.exists()
    assert not [path for path in whole.rglob("*") if path.name.endswith(".tmp") or path.name == stream.JOURNAL]
    assert verify(whole, exported.out) == []


def test_another_source_starts_anew(tmp_path: Path) -> None:
    class Known(Memory):
        def __init__(self, known: str, value: float) -> None:
            super().__init__({"a": torch.full((3,), value), "b": torch.full((2,), value)})
            self.known = known

        def fingerprint(self) -> str:
            return self.known

    def files(source: Memory) -> list[File]:
        return [File("one", source, [Stretch("a", 0, 3)]), File("two", source, [b"12345678", Stretch("b", 1, 1)])]

    folder = tmp_path / "folder"
    for known, value, wanted in (("x", 1.0, 1.0), ("x", 2.0, 1.0), ("y", 3.0, 3.0)):
        told: list[int] = []
        with stream.alone(folder):
            entries = stream.write(folder, files(Known(known, value)), told.append)
        assert sum(told) == 24
        assert (folder / "one").read_bytes() == np.full(3, wanted, dtype=np.float32).tobytes()
        assert (folder / "two").read_bytes() == b"12345678" + np.float32(wanted).tobytes()
        for name, entry in entries.items():
            content = (folder / name).read_bytes()
            assert entry == (len(content), hashlib.sha256(content).hexdigest())


@pytest.mark.parametrize("way", ["to-hf", "from-hf"])
def test_another_process_leaves_what_is_written_alone(exported, tmp_path, monkeypatch, way) -> None:
    """A second one starts when the tensors are written, and again right before and behind the renaming."""
    out = tmp_path / "out"
    part = tmp_path / ".out.part" if way == "to-hf" else out / "checkpoints/.step_00000000.part"

    def convert() -> None:
        if way == "to-hf":
            to_hf(tmp_path, out, load=load(exported.state, exported.tokenizer))
        else:
            from_hf(exported.out, out)

    refused: list[Path] = []

    def beside(real):
        def called(*arguments, **options):
            with pytest.raises(UserError, match="another process writes there"), stream.alone(part):
                pass
            refused.append(part)
            return real(*arguments, **options)

        return called

    real = Path.rename

    def rename(path: Path, target: Path) -> Path:
        if path != part:  # torch's index has another name at first
            return real(path, target)
        handle = os.open(path, os.O_RDONLY)
        there = os.fstat(handle)
        beside(lambda: None)()
        found = real(path, target)
        assert os.path.samestat(there, target.stat())
        with pytest.raises(BlockingIOError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(handle)
        return found

    monkeypatch.setattr(Path, "rename", rename)
    for module, name in ((export, "_describe"), (shards, "write_index"), (layout, "write_manifest")):
        monkeypatch.setattr(module, name, beside(getattr(module, name)))
    convert()
    assert len(refused) == (2 if way == "to-hf" else 3)
    assert not part.exists()
    assert not list(out.rglob(stream.JOURNAL))
    if way == "from-hf":
        assert not any(stream.JOURNAL in name for name in layout.manifest(out / "checkpoints/step_00000000"))


def test_a_folder_that_was_renamed_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lock is had when the other process is done: what it holds is no longer the folder of that name."""
    real = fcntl.flock

    def flock(handle: int, how: int) -> None:
        (tmp_path / "part").rename(tmp_path / "whole")
        real(handle, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(UserError, match="another process writes there"), stream.alone(tmp_path / "part"):
        pass


def test_what_is_not_ours_is_not_emptied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "folder"
    (folder / "letters").mkdir(parents=True)
    (folder / "letters/one").write_text("Dear")
    file = File("file", Memory({"a": torch.ones(3)}), [Stretch("a", 0, 3)])
    with stream.alone(folder), pytest.raises(UserError, match="it holds letters, and no conversion wrote it"):
        stream.write(folder, [file], lambda count: None)
    assert (folder / "letters/one").read_text() == "Dear"

    def broken(path: Path, *rest) -> None:
        path.write_bytes(b"half")
        raise Broken

    with monkeypatch.context() as patch:
        patch.setattr(stream, "_write", broken)
        with stream.alone(tmp_path / "new"), pytest.raises(Broken):
            stream.write(tmp_path / "new", [file], lambda count: None)
    with stream.alone(tmp_path / "new"):
        stream.write(tmp_path / "new", [file], lambda count: None)
    assert (tmp_path / "new/file").stat().st_size == 12


class Counting(Memory):
    """Notes what is asked of it."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__(tensors)
        self.places: set[int] = set()
        self.longest = 0

    def read(self, name: str, start: int, out: torch.Tensor) -> None:
        self.places.add(out.untyped_storage().data_ptr())
        self.longest = max(self.longest, out.nbytes)
        super().read(name, start, out)


def test_memory_is_that_of_the_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of tensors of megabytes, four pieces of 16 KiB are held: what is read is asked for into them."""
    monkeypatch.setattr(stream, "PIECE", 16 << 10)
    tensors = {"large": torch.randn(700, 1001), "half": torch.randn(300_001).bfloat16(), "last": torch.randn(5)}
    source = Counting(tensors)
    parts = [Stretch(name, 0, tensor.numel()) for name, tensor in tensors.items() if name != "half"]
    file = File("file", source, [b"header8.", *parts, Stretch("half", 0, 300_001)])
    with stream.alone(tmp_path):
        stream.write(tmp_path, [file], lambda count: None)
    wanted = b"".join(tensors[name].flatten().view(torch.uint8).numpy().tobytes() for name in ("large", "last", "half"))
    assert (tmp_path / "file").read_bytes() == b"header8." + wanted
    assert source.longest == 16 << 10
    assert len(source.places) == stream.PIECES


def test_zeros_are_holes(tmp_path: Path) -> None:
    tensor = torch.zeros(12 << 20, dtype=torch.uint8)
    tensor[[5 << 20, -1]] = 1
    file = File("file", Memory({"a": tensor}), [Stretch("a", 0, len(tensor))])
    with stream.alone(tmp_path):
        stream.write(tmp_path, [file], lambda count: None)
    assert (tmp_path / "file").read_bytes() == tensor.numpy().tobytes()
    assert (tmp_path / "file").stat().st_blocks * 512 < 3 << 20


def test_boxes_are_the_stretch() -> None:
    for shape in ((), (5,), (3, 4), (2, 3, 1, 2)):
        numbers = torch.arange(math.prod(shape)).view(shape)
        for start in range(numbers.numel()):
            for count in range(numbers.numel() - start + 1):
                found = []
                for place, box in shards.boxes(shape, start, count):
                    assert place == sum(map(len, found))
                    part = numbers[tuple(slice(a, a + n) for a, n in zip(*box, strict=True))].flatten()
                    assert all(b - a == 1 for a, b in pairwise(part.tolist()))
                    found.append(part)
                assert torch.cat([*found, torch.empty(0)]).tolist() == list(range(start, start + count))


def test_chunks_that_do_not_tile_their_tensor(checkpoint: Path) -> None:
    """As many elements as the tensor has, some twice and others not at all; nothing is made up for these."""
    path = checkpoint / "state" / pickles.METADATA
    with path.open("rb") as file:
        index = pickles.load_metadata(file)
    state = checkpoint / "state"
    key, tensor = next((k, t) for k, t in index.state_dict_metadata.items() if len(getattr(t, "chunks", ())) > 2)
    assert isinstance(tensor, TensorStorageMetadata)
    place = Place(key, (), tuple(tensor.size), torch.empty(tensor.size, dtype=torch.float32, device="meta"))
    whole = list(tensor.chunks)
    assert whole[0].sizes == whole[1].sizes
    second = index.storage_data[MetadataIndex(key, whole[1].offsets)]
    shifted = ChunkStorageMetadata(torch.Size([whole[1].offsets[0] - 1, *whole[1].offsets[1:]]), whole[1].sizes)
    index.storage_data[MetadataIndex(key, shifted.offsets)] = second
    for chunks in ([whole[0], whole[0], *whole[2:]], [whole[0], shifted, *whole[2:]], whole[1:], [*whole, whole[0]]):
        tensor.chunks[:] = chunks
        path.write_bytes(pickle.dumps(index))
        with pytest.raises(UserError, match="do not have each of its elements once"):
            shards.Shards(state, {"x": place}, "")
    tensor.chunks[:] = reversed(whole)
    path.write_bytes(pickle.dumps(index))
    assert shards.Shards(state, {"x": place}, "")["x"].shape == tensor.size


def test_a_chunk_in_another_order_is_refused(checkpoint: Path) -> None:
    state = checkpoint / "state"
    with (state / pickles.METADATA).open("rb") as file:
        index = pickles.load_metadata(file)
    key, tensor = next((k, t) for k, t in index.state_dict_metadata.items() if len(getattr(t, "size", ())) == 2)
    tensor.chunks[:] = [ChunkStorageMetadata(torch.Size([0, 0]), tensor.size)]
    place = Place(key, (), tuple(tensor.size), torch.empty(tensor.size, device="meta"))
    torch.save(torch.ones(tensor.size[::-1]).t(), state / "other.distcp")
    where = filesystem._StorageInfo("other.distcp", 0, (state / "other.distcp").stat().st_size)
    index.storage_data[MetadataIndex(key, torch.Size([0, 0]))] = where
    (state / pickles.METADATA).write_bytes(pickle.dumps(index))
    with pytest.raises(UserError, match="not in row-major order"):
        shards.Shards(state, {"x": place}, "")["x"]


def test_an_altered_checkpoint_is_not_converted(checkpoint: Path, exported, tmp_path: Path) -> None:
    """The bytes of a tensor, which nothing but the checksum tells of; and a file that ends early."""
    path = max((checkpoint / "state").glob("__1_*.distcp"), key=lambda path: path.stat().st_size)
    content = path.read_bytes()
    for damaged in (content[:2000] + b"????" + content[2004:], content[:2000]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="was altered since it was saved"):
            to_hf(checkpoint, tmp_path / "hf")
        with pytest.raises(UserError, match="was altered since it was saved"):
            verify(exported.out, checkpoint)
    assert not (tmp_path / "hf").exists()
    path.write_bytes(content)
    to_hf(checkpoint, tmp_path / "hf")


def test_a_foreign_model_keeps_its_dtype(exported, tmp_path: Path) -> None:
    moe = dataclasses.replace(MODEL.moe, expert_hidden_size=16)  # a width that bf16 is trained with
    fields = longcat.to_config(MODEL.backbone, moe, "bfloat16")
    config = LongcatFlashConfig(**{k: v for k, v in fields.items() if k not in ("architectures", "model_type")})
    LongcatFlashForCausalLM(config).bfloat16().save_pretrained(tmp_path / "hf")
    shutil.copy(exported.tokenizer, tmp_path / "hf")
    from_hf(tmp_path / "hf", tmp_path / "run")
    checkpoint = tmp_path / "run/checkpoints/step_00000000"
    recipe, state, _ = state_dict(checkpoint)
    assert recipe.precision.dtype == "bf16"
    assert {spec.dtype for name, spec in state.specs.items() if ".router." not in name} == {torch.bfloat16}
    assert all(".router." in line for line in verify(checkpoint, tmp_path / "hf"))  # fp32 with us


def test_only_what_cannot_be_read_waits_for_the_checksums(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[bool] = []

    def digest(path: Path, event: threading.Event) -> str:
        ended.append(event.wait(0.5))
        return ""

    monkeypatch.setattr(layout, "_digest", digest)
    with pytest.raises(UserError, match="no space"), layout.verified(checkpoint):
        raise UserError("no space")
    with pytest.raises(UserError, match="was altered since"), layout.verified(checkpoint):
        raise layout.Unreadable("tensor x cannot be read")
    assert ended == [True, False]


def test_sizes_that_are_none(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "verified", None)  # no checksum is begun
    with pytest.raises(UserError, match="'much' is no size"):
        to_hf(checkpoint, tmp_path / "hf", max_shard_size="much")
    assert not (tmp_path / ".hf.part").exists()
    assert json.loads((checkpoint / "manifest.json").read_text())["format"] == 1
