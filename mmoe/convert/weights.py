"""Safetensors files: the tensors of a directory read a stretch at a time, and how new ones are laid out.

Nothing in a file is trusted: safetensors itself reads the headers, and what it accepts has tensors side by side that
fill the file.
"""

import hashlib
import json
import os
from collections.abc import Container, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mmoe import reading
from mmoe.checkpoint.stream import File, Stretch
from mmoe.checkpoint.tensors import Spec, Tensors, fill
from mmoe.errors import UserError

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
OTHERS = {"F64": torch.float64, "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}
"""Of buffers that stand beside weights in published files, and are not read."""
ORDER = tuple(DTYPES.values())
"""safetensors puts tensors of the same dtype together, in this order (its Dtype, the largest first)."""
INDEX = "model.safetensors.index.json"
SHARD = "5GB"
"""As huggingface_hub's."""


class _Where(NamedTuple):
    file: Path
    offset: int


class Weights(Tensors):
    """The tensors in a directory's own ``*.safetensors``; links are followed, as in the hub's cache."""

    def __init__(self, directory: Path, buffers: bool = False) -> None:
        """
        Args:
            directory: of the files.
            buffers: tensors of other dtypes than weights have may be among them.

        Raises:
            UserError: there are no files, one is damaged, a tensor is in two of them or of a dtype that is not read.
        """
        self.dtypes = DTYPES | OTHERS if buffers else DTYPES
        files = sorted(directory.glob("*.safetensors"))
        if not files:
            pickled = any(directory.glob("*.bin")) or any(directory.glob("*.pt"))
            fix = "pickles are not read: load and save it once with transformers, which writes .safetensors"
            fix = fix if pickled else "name a Hugging Face model directory"
            raise UserError("no .safetensors files", str(directory), fix)
        self.specs: dict[str, Spec] = {}
        self.where: dict[str, _Where] = {}
        self.known = hashlib.sha256()
        for file in files:
            self._add(file)

    def _add(self, file: Path) -> None:
        try:
            handle = reading.open_regular(file)
            with open(handle, "rb") as opened, safe_open(file, "pt") as header:
                state = os.fstat(opened.fileno())
                length = int.from_bytes(opened.read(8), "little")
                self.known.update(repr((file.name, state.st_size, state.st_mtime_ns)).encode() + opened.read(length))
                found = {name: (s.get_dtype(), s.get_shape()) for name, s in self._slices(header)}
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(f"unreadable: {error}", str(file), "copy or export the file again") from None
        offset = 8 + length
        for name, (dtype, shape) in found.items():
            if dtype not in self.dtypes:
                kind = f"torch.int{dtype[1:]}" if dtype.startswith("I") else dtype
                raise UserError(f"tensor {name} is {kind}", str(file), "export it in fp32, bf16 or fp16")
            if name in self.specs:
                raise UserError(f"tensor {name} is in another file too", str(file), "leave one of the files")
            self.specs[name] = Spec(torch.Size(shape), self.dtypes[dtype])
            self.where[name] = _Where(file, offset)
            offset += self.specs[name].nbytes

    @staticmethod
    def _slices(header):
        return ((name, header.get_slice(name)) for name in header.offset_keys())

    def read(self, name: str, start: int, out: Tensor) -> None:
        file, offset = self.where[name]
        try:
            handle = reading.open_regular(file)
            try:
                fill(handle, offset + start * out.dtype.itemsize, out)
            finally:
                os.close(handle)
        except (OSError, ValueError) as error:
            raise UserError(f"unreadable: {error}", str(file), "copy or export the file again") from None

    def fingerprint(self) -> str:
        return self.known.hexdigest()


def plan(
    tensors: Tensors, folder: str, largest: str, no_parameters: Container[str] = ()
) -> tuple[list[File], bytes | None]:
    """The files that ``save_pretrained`` would write of ``tensors``, and the index if there are several.

    Args:
        tensors: in the order in which they are divided among the files.
        folder: of the files, in the one that is written; "" if that is it.
        largest: bytes of a file, as "5GB", unless one tensor has more.
        no_parameters: names of tensors that the index does not count as parameters.

    Raises:
        UserError: ``largest`` is no size.
    """
    blank = {name: torch.empty(spec.shape, dtype=spec.dtype, device="meta") for name, spec in tensors.specs.items()}
    for name, spec in tensors.specs.items():
        if spec.dtype not in ORDER:
            raise UserError(f"tensor {name} is {spec.dtype}", "--dtype", "convert to fp32 or bf16")
    try:
        split = split_torch_state_dict_into_shards(blank, max_shard_size=largest)
    except ValueError as error:
        raise UserError(f"{largest!r} is no size: {error}", "--max-shard-size", "give one as 5GB or 200MB") from None
    files = [
        File(str(Path(folder) / name), tensors, _parts(tensors, held))
        for name, held in split.filename_to_tensors.items()
    ]
    if not split.is_sharded:
        return files, None
    parameters = sum(spec.numel for name, spec in tensors.specs.items() if name not in no_parameters)
    metadata = {"total_parameters": parameters, **split.metadata}
    index = {"metadata": metadata, "weight_map": split.tensor_to_filename}
    return files, (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()


def _parts(tensors: Tensors, names: list[str]) -> list[bytes | Stretch]:
    """One file: the header, then the data as safetensors.save_file orders them."""
    ordered = sorted(names, key=lambda name: (ORDER.index(tensors.specs[name].dtype), name.encode()))
    kinds = {dtype: kind for kind, dtype in DTYPES.items()}
    header: dict[str, Mapping] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in ordered:
        spec = tensors.specs[name]
        place = [offset, offset + spec.nbytes]
        header[name] = {"dtype": kinds[spec.dtype], "shape": list(spec.shape), "data_offsets": place}
        offset = place[1]
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return [len(text).to_bytes(8, "little") + text, *(Stretch(name, 0, tensors.specs[name].numel) for name in ordered)]
