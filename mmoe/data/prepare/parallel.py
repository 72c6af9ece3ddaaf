"""Write a data set's shards in parallel."""

import multiprocessing
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mmoe.data.shards import DatasetWriter, Description, Sample, shard_name, token_counter, write_shard
from mmoe.data.tokenizer import read_tokenizer

Maker = Callable[[int], Sample]
"""Makes sample i of a data set: a pure function of i, so that any worker may make it; must be picklable."""

_write_one: Callable[[int], int]


def _start(make: Maker, tokenizer: Path, folder: Path, shards: Sequence[range]) -> None:
    """Set up a worker: what every shard needs is sent once."""
    global _write_one
    count = token_counter(read_tokenizer(tokenizer))

    def write(number: int) -> int:
        write_shard(folder / shard_name(number), (make(i) for i in shards[number]), count)
        return len(shards[number])

    _write_one = write


def _run(number: int) -> int:
    return _write_one(number)


def build(
    out: Path, description: Description, make: Maker, tokenizer: Path, *, workers: int, skipped: Sequence[str] = ()
) -> bool:
    """Make the data set ``out`` unless it is there; False if it was up to date.

    Args:
        out: the data set's folder; replaced as a whole when the new one is complete.
        description: what to make.
        make: makes one sample.
        tokenizer: path of the tokenizer.json that the description names by its hash.
        workers: processes; with 1 the work is done in this one.
        skipped: recorded in the data set's card.
    """
    writer = DatasetWriter(out, description)
    if writer.up_to_date:
        return False
    writer.open()
    missing, shards = writer.missing, description.shards
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        done = description.samples - sum(len(shards[number]) for number in missing)
        bar = progress.add_task(description.name, total=description.samples, completed=done)
        arguments = (make, tokenizer, writer.folder, shards)
        if min(workers, len(missing)) > 1:
            # Not fork: the tokenizer's threads do not survive it.
            context = multiprocessing.get_context("spawn")
            with context.Pool(min(workers, len(missing)), _start, arguments) as pool:
                for samples in pool.imap_unordered(_run, missing):
                    progress.advance(bar, samples)
        else:
            _start(*arguments)
            for number in missing:
                progress.advance(bar, _run(number))
    writer.finish(skipped)
    return True
