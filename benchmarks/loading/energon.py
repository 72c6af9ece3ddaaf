"""Megatron-Energon on the same tars; its processes read their decoder from here."""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.energon import (  # pyright: ignore[reportMissingImports]
    Cooker,
    DefaultTaskEncoder,
    Sample,
    SampleDecoder,
    WorkerConfig,
    basic_sample_keys,
    get_loader,
    get_train_dataset,
    stateless,
)

from benchmarks.loading.files import Files
from benchmarks.loading.sides import BATCH, normalised


@dataclass
class Pixels(Sample):
    pixels: torch.Tensor


@stateless
def cook(sample: dict[str, Any]) -> Pixels:
    return Pixels(**basic_sample_keys(sample), pixels=torch.from_numpy(normalised(sample["0.jpg"])))


class Encoder(DefaultTaskEncoder):
    decoder = SampleDecoder(image_decode="pilrgb")
    cookers = [Cooker(cook)]  # noqa: RUF012 - energon's own protocol


def batches(files: Files, threads: int) -> Iterator[int]:
    """Its usual pipeline: a process each decoding thread."""
    folder = files.root / "energon"
    folder.mkdir()
    for shard in files.shards:
        (folder / shard.name).symlink_to(shard)
    options = ["--non-interactive", "--split-ratio", "1,0,0", "--sample-type", "CrudeWebdataset", "--no-progress"]
    command = [str(Path(sys.executable).with_name("energon")), "prepare", str(folder), *options]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    config = WorkerConfig(rank=0, world_size=1, num_workers=threads)
    data = get_train_dataset(
        folder, batch_size=BATCH, shuffle_buffer_size=None, max_samples_per_sequence=None,
        task_encoder=Encoder(), worker_config=config,
    )  # fmt: skip
    for batch in get_loader(data):
        yield len(batch.pixels)
