"""CV-Bench's layout as it is published (arXiv 2406.16860; Hugging Face's nyu-visionx/CV-Bench): reading and writing it.

A folder holds ``test_2d.parquet`` and ``test_3d.parquet`` with the pictures inside, or ``test_2d.jsonl`` and
``test_3d.jsonl`` beside the pictures that their ``filename`` names (``img/2D/count/ade20k_10.png``).
docs/systems/cv_bench.md describes the fields.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from mmoe import reading
from mmoe.data.document import BadSample
from mmoe.errors import UserError

TYPES = {"2D": "test_2d", "3D": "test_3d"}
"""Type of task → stem of its file."""
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
SUFFIX = "Answer with the option's letter from the given choices directly."
"""What the released evaluation puts on a line of its own below a row's prompt."""
ROWS = 64
"""Rows whose pictures are in memory at once."""
LARGEST_LINES, LARGEST_PICTURE = 1 << 28, 1 << 29
"""Bytes of a .jsonl, and of a picture beside it."""
FINGERPRINT = b"mmoe"
"""Key in the metadata of files of our own making: what they were made of."""
_TEXTS = ("type", "task", "answer", "prompt", "source")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One question about one picture."""

    key: str
    """``FILE/ROW``, the row counted from 0 within its file."""
    type: str
    task: str
    source: str
    prompt: str
    """The question with its lettered options."""
    choices: tuple[str, ...]
    answer: int
    """Which of the choices is right."""
    image: bytes


def pyarrow() -> Any:
    """The package that reads and writes parquet.

    Raises:
        UserError: it is not installed.
    """
    try:
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise UserError("pyarrow is not installed", "parquet files", "pip install 'mmoe[cv-bench]'") from None
    return pyarrow


def spread(total: int, limit: int | None) -> list[int]:
    """``limit`` of ``total`` numbers at even distances: the files are ordered by task and source."""
    count = min(total, limit or total)
    return [i * total // count for i in range(count)]


def files(folder: Path) -> list[Path]:
    """Those of the layout that are in a folder, one a type of task; none where it is something else."""
    return [
        folder / f"{stem}{kind}"
        for stem in TYPES.values()
        for kind in next(([k] for k in (".parquet", ".jsonl") if (folder / f"{stem}{k}").is_file()), [])
    ]


def read(folder: Path, limit: int | None = None) -> tuple[int, Iterator[tuple[str, Row | BadSample]]]:
    """How many rows, and each of them under its key, or why it is of no use; read while they are asked for.

    Args:
        folder: see the module.
        limit: only so many rows, see :func:`spread`.

    Raises:
        UserError: a file is missing, unreadable or without a column, or pyarrow is not installed.
    """
    opened = _opened(folder, [*_TEXTS, "choices", "image"])
    wanted = spread(sum(len(file) for file in opened), limit)

    def rows() -> Iterator[tuple[str, Row | BadSample]]:
        start = 0
        for file in opened:
            here = [number - start for number in wanted if start <= number < start + len(file)]
            start += len(file)
            for number, record in file.records(here):
                key = f"{file.path.stem}/{number}"
                try:
                    yield key, _row(key, record, file)
                except BadSample as error:
                    yield key, error

    return len(wanted), rows()


def pictures(folder: Path) -> Iterator[tuple[str, bytes | BadSample]]:
    """The encoded picture of each row, a question or not, or why it cannot be read; read while they are asked for. Each
    under ``FILE/ROW:filename``, where its ``filename`` is a text; else under ``FILE/ROW``.

    Raises:
        UserError: see :func:`read`.
    """
    opened = _opened(folder, ["image"], ["filename"])

    def found() -> Iterator[tuple[str, bytes | BadSample]]:
        for file in opened:
            for number, record in file.records(range(len(file))):
                name, key = record.get("filename"), f"{file.path.stem}/{number}"
                # Nothing that a terminal takes for a command or a new line.
                key += f":{name if name.isprintable() else ascii(name)}" if isinstance(name, str) and name else ""
                try:
                    yield key, file.picture(record)
                except BadSample as error:
                    yield key, error

    return found()


def _opened(folder: Path, columns: Sequence[str], further: Sequence[str] = ()) -> "list[_Parquet | _Lines]":
    """The files of a folder; see :class:`_Parquet`."""
    found = files(folder)
    if not found:
        what = f"neither {' nor '.join(f'{stem}.parquet' for stem in TYPES.values())} here"
        raise UserError(what, str(folder), "give CV-Bench's folder, or make one with `mmoe data prepare cv_bench`")
    return [_Parquet(path, columns, further) if path.suffix == ".parquet" else _Lines(path) for path in found]


@contextmanager
def _told(path: Path) -> Iterator[Any]:
    """pyarrow; whatever it says of the file becomes one line."""
    arrow = pyarrow()
    try:
        yield arrow
    except (OSError, ValueError, NotImplementedError, arrow.ArrowException) as error:
        raise UserError(f"no parquet file that can be read: {error}", str(path), "download it again") from None


class _Parquet:
    """``columns`` are read and have to be there; ``further`` ones are read where they are."""

    def __init__(self, path: Path, columns: Sequence[str], further: Sequence[str]) -> None:
        self.path = path
        with _told(path) as arrow:
            file = arrow.parquet.ParquetFile(path)
        there = file.schema_arrow.names
        missing = [name for name in columns if name not in there]
        if missing:
            raise UserError(f"no column {missing[0]!r}", str(path), "give CV-Bench's own file")
        self.columns = [*columns, *(name for name in further if name in there)]
        self._rows = file.metadata.num_rows

    def __len__(self) -> int:
        return self._rows

    def records(self, numbers: Sequence[int]) -> Iterator[tuple[int, dict[str, Any]]]:
        wanted, start = set(numbers), 0
        with _told(self.path) as arrow:
            batches = arrow.parquet.ParquetFile(self.path).iter_batches(ROWS, columns=self.columns)
        while True:
            with _told(self.path) as arrow:
                batch = next(batches, None)
                if batch is None:
                    return
                here = [i for i in range(batch.num_rows) if start + i in wanted]
                records = batch.take(arrow.array(here, "int64")).to_pylist()
            yield from zip([start + i for i in here], records, strict=True)
            start += batch.num_rows

    def picture(self, record: dict[str, Any]) -> bytes:
        image = record.get("image")
        content = image.get("bytes") if isinstance(image, dict) else None
        if not isinstance(content, bytes):
            raise BadSample("it has no picture")
        return content


class _Lines:
    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._lines = [line for line in reading.text(path, LARGEST_LINES).split("\n") if line.strip()]
        except (OSError, ValueError) as error:
            raise UserError(f"cannot be read: {error}", str(path), "give CV-Bench's own file") from None

    def __len__(self) -> int:
        return len(self._lines)

    def records(self, numbers: Sequence[int]) -> Iterator[tuple[int, dict[str, Any]]]:
        for number in numbers:
            try:
                yield number, reading.json_object(self._lines[number])
            except ValueError as error:
                raise UserError(str(error), f"{self.path}:{number + 1}", "give CV-Bench's own file") from None

    def picture(self, record: dict[str, Any]) -> bytes:
        name = record.get("filename")
        if not isinstance(name, str) or PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise BadSample(f"its picture is {name!r}, no path within the folder")
        try:
            return reading.content(self.path.parent / name, LARGEST_PICTURE)
        except (OSError, ValueError) as error:
            raise BadSample(f"its picture cannot be read: {error}") from None


def _row(key: str, record: dict[str, Any], file: "_Parquet | _Lines") -> Row:
    """Raises :class:`BadSample` where the record is no question."""
    texts: dict[str, str] = {}
    for name in _TEXTS:
        value = record.get(name)
        if not isinstance(value, str) or not value:
            raise BadSample(f"its {name} is {value!r}, no text")
        texts[name] = value
    choices, answer = record.get("choices"), texts["answer"]
    if not isinstance(choices, list) or not choices or not all(isinstance(choice, str) for choice in choices):
        raise BadSample("its choices are no list of texts")
    if texts["type"] not in TYPES:
        raise BadSample(f"its type is {texts['type']!r}, none of {', '.join(TYPES)}")
    letters = [f"({letter})" for letter in LETTERS[: len(choices)]]
    if answer not in letters:
        raise BadSample(f"its answer {answer!r} is none of its {len(choices)} choices")
    return Row(
        key=key,
        type=texts["type"],
        task=texts["task"],
        source=texts["source"],
        prompt=texts["prompt"],
        choices=tuple(choices),
        answer=letters.index(answer),
        image=file.picture(record),
    )


def prompt(question: str, choices: Sequence[str]) -> str:
    """A question with its options as CV-Bench writes them."""
    options = "".join(f"\n({letter}) {choice}" for letter, choice in zip(LETTERS, choices, strict=False))
    return f"{question} Select from the following choices.{options}"


def schema() -> Any:
    """The columns of a file, as published; ``bbox``, which nothing here reads, is left empty in files of our own."""
    pa = pyarrow()
    text = pa.string()
    return pa.schema(
        [
            ("idx", pa.int64()),
            ("type", text),
            ("task", text),
            ("image", pa.struct([("bytes", pa.binary()), ("path", text)])),
            ("question", text),
            ("choices", pa.list_(text)),
            ("answer", text),
            ("prompt", text),
            ("filename", text),
            ("source", text),
            ("source_dataset", text),
            ("source_filename", text),
            ("target_class", text),
            ("target_size", pa.int64()),
            ("bbox", pa.list_(pa.list_(pa.float64()))),
        ]
    )


def write(path: Path, records: Iterable[dict[str, Any]], fingerprint: str) -> None:
    """Write one file; ``records`` have all columns of :func:`schema`."""
    pa = pyarrow()
    columns = schema().with_metadata({FINGERPRINT: fingerprint.encode()})
    with pa.parquet.ParquetWriter(path, columns, compression="zstd") as writer:
        waiting: list[dict[str, Any]] = []
        for record in records:
            waiting.append(record)
            if len(waiting) == ROWS:
                writer.write_table(pa.Table.from_pylist(waiting, columns))
                waiting = []
        writer.write_table(pa.Table.from_pylist(waiting, columns))


def fingerprint(path: Path) -> str:
    """What a file of our own was made of; ``""`` for any other file, or none."""
    try:
        found = pyarrow().parquet.read_schema(path).metadata or {}
    except (OSError, ValueError, pyarrow().ArrowException):
        return ""
    return found.get(FINGERPRINT, b"").decode(errors="replace")
