"""From a mixture to micro-batches: order → packs → read → decode → tensors, in a thread ahead of the trainer."""

import hashlib
import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from mmoe.data.batch import Batch, Illustrated, collate, illustrate, pictures, places
from mmoe.data.cache import Parts
from mmoe.data.decoders import Decoded, Decoder, build
from mmoe.data.document import BadSample, blank, with_system_prompt
from mmoe.data.features import Cached, Features
from mmoe.data.mixture import load_mixture
from mmoe.data.order import Order
from mmoe.data.pack import Planner, Slot
from mmoe.data.source import Source
from mmoe.data.tokenizer import Vocabulary, load_tokenizer, tokenizer_hash
from mmoe.errors import UserError
from mmoe.recipe.model import Special
from mmoe.recipe.schema import Data
from mmoe.recipe.tokens import OURS


class Position(NamedTuple):
    """The next pack of the stream."""

    window: int = 0
    pack: int = 0


class _Pack(NamedTuple):
    slots: tuple[Slot, ...]
    oversize: tuple[Slot, ...]
    """Samples before it in the stream that fit in no pack, named along with this one."""


class _Begun(NamedTuple):
    """A micro-batch that is read."""

    packs: list[_Pack]
    rows: list[list[Illustrated]]
    decoded: Callable[[], Decoded]
    cached: Callable[[], Cached | None]
    after: Position
    """Where the step after its own begins."""


class Loader:
    """The micro-batches of one data parallel rank, without end; close it, or use it as a context.

    Step t takes the packs [t·global_batch, (t+1)·global_batch) of the stream. Its micro-batches are numbered, and rank
    r of R takes the r-th of R contiguous parts of them: every layout computes the same micro-batches.

    Args:
        data: the recipe's table.
        image_tokens: tokens that an image takes; 0 for a model without encoders.
        image_sizes: sides that images are resized to, pixels; without any no image is read.
        micro_batch: packs in a micro-batch.
        global_batch: packs in a step, over all ranks.
        seed: of the order.
        rank: within the data parallel group.
        ranks: size of the data parallel group.
        state: where to go on, from :meth:`state`; at any number of ranks.
        device: where images are decoded and lie, see :func:`mmoe.data.decoders.build`.
        features: encoders whose features come from ``data.features``, with what those have to be made of.
        special: the recipe's ``model.special``.

    Raises:
        UserError: the mixture, a data set or the tokenizer is missing or does not fit the others, or the state belongs
            to another stream; from the iterator: too many bad samples came one after another.
    """

    def __init__(
        self,
        data: Data,
        *,
        image_tokens: int,
        image_sizes: tuple[int, ...],
        micro_batch: int,
        global_batch: int,
        seed: int,
        rank: int = 0,
        ranks: int = 1,
        state: dict[str, Any] | None = None,
        device: Literal["cpu", "mixed"] = "cpu",
        features: Mapping[str, Parts] | None = None,
        special: Special = OURS,
    ) -> None:
        if global_batch % (micro_batch * ranks):
            raise UserError(
                f"{global_batch} packs a step cannot be shared by {ranks} ranks in micro-batches of {micro_batch}",
                "train.global_batch",
                "choose a multiple of train.micro_batch times the data parallel ranks",
            )
        self.data, self.image_tokens, self.micro_batch, self.global_batch = (
            data,
            image_tokens,
            micro_batch,
            global_batch,
        )
        self.micro_batches = global_batch // micro_batch // ranks
        """Of a step, on this rank."""
        self.skipped = 0
        """Bad samples in the micro-batches handed out so far."""
        self._first_pack = rank * self.micro_batches * micro_batch
        root, parts = Path(data.root), load_mixture(data.mixture)
        self._sources = [Source(root / part.path, part.path) for part in parts]
        self._tokenizer = self._vocabulary(root / data.tokenizer, special)
        self._prompts = [part.system_prompt for part in parts]
        names, sizes = [part.path for part in parts], [len(source) for source in self._sources]
        sized = list(zip(parts, sizes, strict=True))
        shares, epochs = [part.share(size) for part, size in sized], [part.epoch(size) for part, size in sized]
        self._planner = Planner(
            Order(names, sizes, shares, seed, epochs),
            [
                source.lengths(image_tokens, len(self._tokenizer.encode(prompt)))
                for source, prompt in zip(self._sources, self._prompts, strict=True)
            ],
            sequence_length=data.sequence_length,
            images_per_pack=data.images_per_pack,
        )
        if not image_tokens and any(lengths.images.any() for lengths in self._planner.lengths):
            raise UserError(
                "the data has images, but the model has no encoder",
                f"data.mixture = {data.mixture}",
                "add an encoder and a connector, or choose a mixture of text alone",
            )
        self._decodes = bool(image_sizes)
        self._features = Features(Path(data.features), self._sources, features) if data.features and features else None
        self._stream = self._fingerprint()
        self._position, self._taken = self._start(state), 0
        decoder = build(data, image_sizes, device)
        self._ahead = _Ahead(self._micro_batches(self._position, decoder), data.prefetch)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch, self._position = next(self._ahead)
        self._taken += 1
        self.skipped += len(batch["skipped"])
        return batch

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def state(self) -> dict[str, Any]:
        """Where the next step begins, as JSON: what was handed out counts, what was decoded ahead does not.

        Raises:
            RuntimeError: between two micro-batches of one step, which other layouts have no name for.
        """
        if self._taken % self.micro_batches:
            raise RuntimeError("the stream's position is defined between steps, not within one")
        return {"stream": self._stream, "window": self._position.window, "pack": self._position.pack}

    def close(self) -> None:
        """Ends the thread and closes the files."""
        self._ahead.close()
        for source in self._sources:
            source.close()

    def _fingerprint(self) -> str:
        """Of everything that the stream of packs depends on."""
        order, planner = self._planner.order, self._planner
        digest = hashlib.sha256(
            repr((order.names, order.sizes, order.counts.tolist(), order.seed)).encode()
            + repr((planner.sequence_length, planner.images_per_pack, self.image_tokens)).encode()
        )
        # Named only where they are: a mixture without them goes on with a state of a version that had none.
        if order.epochs != order.sizes:
            digest.update(repr(("epochs", order.epochs)).encode())
        if any(self._prompts):
            digest.update(repr(("system prompts", self._prompts)).encode())
        for lengths in planner.lengths:
            digest.update(lengths.tokens.tobytes() + lengths.images.tobytes())
        return digest.hexdigest()

    def _vocabulary(self, path: Path, special: Special) -> Vocabulary:
        tokenizer, digest = load_tokenizer(path, special, images=self.image_tokens > 0), tokenizer_hash(path)
        for source in self._sources:
            if source.tokenizer != digest:
                what = f"the data set {source.name} was prepared with another tokenizer"
                raise UserError(what, str(path), "prepare it again")
        return tokenizer

    def _start(self, state: dict[str, Any] | None) -> Position:
        if state is None:
            return Position()
        if state["stream"] != self._stream:
            raise UserError(
                "the checkpoint was made with other data, another mixture, seed or pack size",
                f"data.mixture = {self.data.mixture}",
                "resume with the recipe and the data of the run, or start a new run",
            )
        return Position(state["window"], state["pack"])

    def _steps(self, start: Position) -> Iterator[tuple[list[_Pack], Position]]:
        """The packs of each step, and where the next one begins."""
        packs: list[_Pack] = []
        oversize: tuple[Slot, ...] = ()
        number, first = start
        while True:
            window = self._planner.window(number)
            if first == 0:
                oversize += window.oversize
            for pack in range(first, len(window.packs)):
                packs.append(_Pack(window.packs[pack], oversize))
                oversize = ()
                if len(packs) == self.global_batch:
                    yield packs, Position(number, pack + 1)
                    packs = []
            number, first = number + 1, 0

    def _micro_batches(self, start: Position, decoder: Decoder) -> Iterator[tuple[Batch, Position]]:
        """This rank's micro-batches, each with where the step after its own begins."""
        in_a_row: list[str] = []
        for begun in _one_ahead(self._begun(start, decoder)):
            batch, problems = collate(begun.rows, self.data.sequence_length, begun.decoded(), begun.cached())
            keys = [key for pack in batch["samples"] for key in pack]
            for key, problem in zip(keys, problems, strict=True):
                in_a_row = [*in_a_row, f"{key}: {problem}"] if problem else []
                if len(in_a_row) >= self.data.max_bad_in_a_row:
                    raise UserError(
                        f"{len(in_a_row)} bad samples one after another, the last: {'; '.join(in_a_row[-3:])}",
                        f"data.max_bad_in_a_row = {self.data.max_bad_in_a_row}",
                        "mend or prepare the data again",
                    )
            batch["skipped"] += [self._too_long(slot) for pack in begun.packs for slot in pack.oversize]
            yield batch, begun.after

    def _begun(self, start: Position, decoder: Decoder) -> Iterator[_Begun]:
        """This rank's micro-batches, read, and their images on the way."""
        for packs, after in self._steps(start):
            last = self._first_pack + self.micro_batches * self.micro_batch
            for first in range(self._first_pack, last, self.micro_batch):
                chosen = packs[first : first + self.micro_batch]
                rows = [[self._read(slot) for slot in pack.slots] for pack in chosen]
                cached = self._features.start(places(rows)) if self._features else lambda: None
                yield _Begun(chosen, rows, decoder.start(pictures(rows) if self._decodes else []), cached, after)

    def _read(self, slot: Slot) -> Illustrated:
        """The slot's document, exactly as long as it was planned."""
        source, number = self._sources[slot[0]], slot[1]
        lengths, key = self._planner.lengths[slot[0]], source.key(number)
        planned = int(lengths.tokens[number]), int(lengths.images[number])
        try:
            if self._features and (reason := self._features.unreadable(*slot)):
                raise BadSample(reason)
            sample = source.read(number, self._decodes)
            sample = replace(sample, record=with_system_prompt(sample.record, self._prompts[slot[0]]))
            item = illustrate(sample, self._tokenizer, self.image_tokens, key)
            actual = len(item.document), len(item.document.images)
            if actual != planned:
                raise BadSample(f"it has {actual} tokens and images, but the index says {planned}")
        except BadSample as error:
            return Illustrated(document=blank(key, planned[0], self._tokenizer.special), problem=str(error))
        return replace(item, first=(slot[0], source.image_range(number).start))

    def _too_long(self, slot: Slot) -> str:
        lengths, key = self._planner.lengths[slot[0]], self._sources[slot[0]].key(slot[1])
        tokens, images = int(lengths.tokens[slot[1]]), int(lengths.images[slot[1]])
        return (
            f"{key}: {tokens} tokens and {images} images fit in no pack of {self.data.sequence_length} and"
            f" {self.data.images_per_pack}"
        )


def _one_ahead(begun: Iterator[_Begun]) -> Iterator[_Begun]:
    """Hands each out when the one after it has begun: what reads it and what decodes the one before go on at once."""
    before: _Begun | None = None
    while True:
        try:
            following = next(begun)
        except BaseException:
            if before is not None:
                yield before
            raise
        if before is not None:
            yield before
        before = following


class _Ahead:
    """Runs an iterator in a thread, up to ``depth`` items ahead. What it raises comes out at the same place."""

    def __init__(self, items: Iterator[tuple[Batch, Position]], depth: int) -> None:
        self._items = items
        self._queue: queue.Queue[tuple[Batch, Position] | BaseException] = queue.Queue(max(1, depth))
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="mmoe-loader", daemon=True)
        self._thread.start()

    def __next__(self) -> tuple[Batch, Position]:
        if self._stop.is_set():
            raise RuntimeError("the loader is closed")
        if self._error is None:
            item = self._queue.get()
            if not isinstance(item, BaseException):
                return item
            self._error = item
        raise self._error

    def close(self) -> None:
        self._stop.set()
        while self._thread.is_alive():
            try:
                self._queue.get(timeout=0.05)
            except queue.Empty:
                continue
        self._thread.join()

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                self._queue.put(next(self._items))
        except BaseException as error:  # the trainer's thread shall see whatever it is
            self._queue.put(error)
