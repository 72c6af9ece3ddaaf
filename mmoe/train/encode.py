"""Features of the frozen encoders, made once for all images of a mixture, and checked where a run reads them."""

import dataclasses
import hashlib
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from mmoe.checkpoint.load import state_dict
from mmoe.checkpoint.tensors import memory
from mmoe.data.cache import SHARD_BYTES, SHARD_IMAGES, Card, Parts, Writer, parts_of, place
from mmoe.data.decoders import Decoded, Decoder, build
from mmoe.data.document import BadSample
from mmoe.data.features import cached
from mmoe.data.mixture import load_mixture
from mmoe.data.source import Source
from mmoe.ending import say
from mmoe.errors import Interrupted, UserError
from mmoe.models import multimodal
from mmoe.models.encoders import build_encoder
from mmoe.models.encoders.vit import ViT, resize_position
from mmoe.models.encoders_parallel import whole
from mmoe.models.multimodal import MultimodalModel
from mmoe.parallel import cpu_platform, engine
from mmoe.progress import IMAGES, progress
from mmoe.recipe.checks import is_frozen
from mmoe.recipe.schema import Parallel, Recipe

BATCH = 32
"""Images that are encoded at a time."""


@dataclass(frozen=True)
class Made:
    """What one process did."""

    images: int
    """That it encoded."""
    seconds: float
    left: int
    """Shards that other processes have still to write."""

    @property
    def complete(self) -> bool:
        return not self.left


def weights_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of tensors: names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(memory(tensor.detach().cpu().contiguous().view(-1)))
    return digest.hexdigest()


def expected(recipe: Recipe, models: Sequence[MultimodalModel]) -> dict[str, Parts]:
    """The encoders that ``data.features`` holds features of, with what those have to be made of by the weights of
    ``models``, this rank's pipeline stages; none without a cache. Called by all ranks together.

    Raises:
        UserError: the folder holds nothing of use, or features of an encoder that is trained.
    """
    data, encoders = recipe.data, {encoder.name: encoder for encoder in recipe.model.encoders}
    if not data.features:
        return {}
    names = cached(Path(data.features), [part.path for part in load_mixture(data.mixture)], list(encoders))
    for name in names:
        if not is_frozen(encoders[name], recipe.train):
            what = f"the features of encoder {name} are cached, but it is trained here: it would not learn"
            fix = f'add "encoders.{name}" to train.frozen, or leave data.features out'
            raise UserError(what, f"data.features = {data.features}", fix)
    mine = {name: whole(model.encoders[name]) for model in models if model.pre_process for name in names}
    hashes = {name: weights_hash(tensors) for name, tensors in mine.items()} if engine.ranks().first else {}
    hashes = engine.from_first(hashes)
    return {name: parts_of(encoders[name], hashes[name], data, recipe.precision.dtype) for name in names}


def run(recipe: Recipe, checkpoint: Path | None, out: Path, only: Sequence[str] = ()) -> Made:
    """Fills ``out`` with features of the recipe's frozen encoders, those named in ``only`` where it names any, for
    every image of its mixture; the ranks of the launch share the shards. What is there already stays. The rank that
    ends last declares the features complete; one that ends before says what it leaves to the others.

    Args:
        recipe: without stages, or one of them.
        checkpoint: whose weights; None: the recipe's first ones.

    Raises:
        UserError: no encoder is frozen, the data, the checkpoint or ``out`` do not fit the recipe, or what was
            written is gone.
        Interrupted: SIGTERM came; whole shards stay.
    """
    names = [encoder.name for encoder in recipe.model.encoders if is_frozen(encoder, recipe.train)]
    if not names:
        raise UserError("no encoder is frozen: features of one that learns go out of date", "train.frozen", "name one")
    if unknown := [name for name in only if name not in names]:
        raise UserError(f"{unknown[0]!r} is no frozen encoder", "--only", f"these are: {', '.join(names)}")
    with _settings():
        encoders = _encoders(recipe, checkpoint, list(only) or names)
        made = encode(recipe, encoders, out)
    encoded = f"{made.images} images encoded in {made.seconds:.0f} s"
    if made.complete:
        say(f"{out}: complete, {encoded}; set data.features to it")
    else:
        rank, world = engine.announced()
        say(f"{out}: not complete: rank {rank} of {world} is done, {encoded}; the others have {made.left} shards left")
    return made


@contextmanager
def _settings() -> Iterator[None]:
    """As in training; SIGTERM ends with :class:`Interrupted`."""

    def end(*_: Any) -> NoReturn:
        raise Interrupted("stopped; whole shards are kept, go on with the same command")

    before, strict = signal.signal(signal.SIGTERM, end), torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(strict)
        signal.signal(signal.SIGTERM, before)


def _encoders(recipe: Recipe, checkpoint: Path | None, names: Sequence[str]) -> dict[str, nn.Module]:
    """The encoders called ``names``, as training has them."""
    if checkpoint is None:
        plain = dataclasses.replace(recipe, parallel=Parallel())
        with torch.random.fork_rng():
            engine.start(Parallel(), recipe.train.seed, alone=True)
            model = multimodal.build(plain)
        return {name: model.encoders[name].to(cpu_platform.device()).eval() for name in names}
    if not (checkpoint / "recipe.toml").is_file():
        raise UserError("no checkpoint is there", str(checkpoint), "give one, or - for the recipe's first weights")
    tensors, made = state_dict(checkpoint)[1], {}
    dtype = torch.bfloat16 if recipe.precision.dtype == "bf16" else torch.float32
    for config in (encoder for encoder in recipe.model.encoders if encoder.name in names):
        encoder, prefix = build_encoder(config).to(dtype), f"encoders.{config.name}."
        own = {name: tensors[prefix + name] for name in encoder.state_dict() if prefix + name in tensors}
        if isinstance(encoder, ViT) and "position" in own:
            own["position"] = resize_position(own["position"], encoder.config)
        try:
            encoder.load_state_dict(own)
        except RuntimeError as error:
            what = f"the weights do not fit encoder {config.name}: {' '.join(str(error).split())}"
            raise UserError(what, str(checkpoint), "give a checkpoint of this model") from None
        made[config.name] = encoder.to(cpu_platform.device()).eval()
    return made


@torch.no_grad()
def encode(recipe: Recipe, encoders: Mapping[str, nn.Module], out: Path, shard_images: int = SHARD_IMAGES) -> Made:
    """:func:`run` for encoders that are built; ``shard_images``: at most, in a shard."""
    rank, world = engine.announced()
    data, configs = recipe.data, {config.name: config for config in recipe.model.encoders}
    dtype, device = next(next(iter(encoders.values())).parameters()).dtype, cpu_platform.device()
    sizes = {name: configs[name].image_size for name in encoders}
    blank = {
        name: [part.cpu() for part in encoder(torch.zeros(1, 3, sizes[name], sizes[name], dtype=dtype, device=device))]
        for name, encoder in encoders.items()
    }
    row = max(part.nbytes for maps in blank.values() for part in maps)
    shard_images = max(1, min(shard_images, SHARD_BYTES // row))
    hashes = {name: weights_hash(encoder.state_dict()) for name, encoder in encoders.items()}
    sources = [Source(Path(data.root) / part.path, part.path) for part in load_mixture(data.mixture)]
    writers: list[dict[str, Writer]] = []
    for source in sources:
        of = {"data set": source.identity()}
        cards = {
            name: Card(
                {**parts_of(configs[name], hashes[name], data, recipe.precision.dtype), **of},
                source.images,
                shard_images,
                [list(part.shape[1:]) for part in blank[name]],
            )
            for name in encoders
        }
        writers.append({name: Writer(place(out, source.name, name), card) for name, card in cards.items()})
    todo = _todo(writers, rank, world)
    begin, done = time.monotonic(), 0
    decoder = build(data, tuple(dict.fromkeys(sizes.values())), "mixed" if device.type == "cuda" else "cpu")
    total = sum(len(rows) for _, rows, _ in todo)
    with progress("encoding", total, IMAGES, silent=bool(rank)) as advance:
        for number, rows, shards in todo:
            source, missing = sources[number], {name: encoders[name] for name in shards}
            maps = {name: [part.new_empty((len(rows), *part.shape[1:])) for part in blank[name]] for name in shards}
            images = range(rows.start, min(rows.stop, source.images))
            originals, unreadable, bad = torch.ones(len(rows), 2, dtype=torch.int64), {}, {}
            for first, decoded in _decoded(source, images, decoder, unreadable):
                count, start = len(decoded.sizes), first - rows.start
                originals[start : start + count] = decoded.sizes
                bad |= {first + i: reason for i, reason in decoded.bad.items()}
                for name, encoder in missing.items():
                    made = encoder(decoded.images[sizes[name]].to(device, dtype))
                    for into, part in zip(maps[name], made, strict=True):
                        into[start : start + count] = part.cpu()
                done += count
                advance(count)
            for name, shard in shards.items():
                if rows.stop > source.images:
                    for into, part in zip(maps[name], blank[name], strict=True):
                        into[-1] = part[0]
                writers[number][name].write(shard, maps[name], originals, unreadable, bad)
    for source in sources:
        source.close()
    left = sum(writer.finish() for of in writers for writer in of.values())
    for number, _, shards in _todo(writers, rank, world):
        name, shard = next(iter(shards.items()))
        what, fix = f"shard {shard} was written and is gone", "run the command again; nothing else may write there"
        raise UserError(what, str(writers[number][name].folder), fix)
    return Made(done, time.monotonic() - begin, left)


def _todo(writers: Sequence[Mapping[str, Writer]], rank: int, world: int) -> list[tuple[int, range, dict[str, int]]]:
    """A rank's share of what is missing: data set, rows and, for each encoder that misses them, its shard.

    Each rank looks at the disk at a time of its own, so that shares may not depend on what is missing.
    """
    rows: dict[tuple[int, range], dict[str, int]] = {}
    for number, of in enumerate(writers):
        for name, writer in of.items():
            for shard in (shard for shard in writer.missing if (number + shard) % world == rank):
                rows.setdefault((number, writer.card.shards[shard]), {})[name] = shard
    return [(number, part, shards) for (number, part), shards in rows.items()]


def _decoded(
    source: Source, images: range, decoder: Decoder, unreadable: dict[int, str]
) -> Iterator[tuple[int, Decoded]]:
    """The pixels of ``images``, :data:`BATCH` at a time, each batch with its first image's number; one is decoded
    while the one before is encoded. Those of an unreadable sample are zeros, and no bad images."""
    before = None
    for start in range(images.start, images.stop, BATCH):
        part = range(start, min(start + BATCH, images.stop))
        content = dict.fromkeys(part, b"")
        for sample in source.samples_of(part):
            try:
                of = zip(source.image_range(sample), source.read(sample).images, strict=True)
                content |= {number: image for number, image in of if number in content}
            except BadSample as error:
                unreadable[sample] = str(error)
        after = start, decoder.start(list(content.values()))
        if before is not None:
            yield before[0], _of_readable(source, before[0], before[1](), unreadable)
        before = after
    if before is not None:
        yield before[0], _of_readable(source, before[0], before[1](), unreadable)


def _of_readable(source: Source, first: int, decoded: Decoded, unreadable: Mapping[int, str]) -> Decoded:
    lost = {image for sample in unreadable for image in source.image_range(sample)}
    return decoded._replace(bad={i: reason for i, reason in decoded.bad.items() if first + i not in lost})
