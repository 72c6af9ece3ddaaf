"""Small data sets on disk, written as `mmoe data prepare` writes them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pictures import encode, picture

from mmoe.data.shards import DatasetWriter, Description, Sample, shard_name, token_counter, write_shard
from mmoe.data.tokenizer import Vocabulary, load_tokenizer, read_tokenizer, tokenizer_hash, train_tokenizer

TEXTS = ["how many zebras ?", " 1", " 2", " 3", "where is the pig ?", " left", " right", "a text alone ."]


def record(images: int = 1, text: str = "", branches: int = 2) -> dict[str, Any]:
    prefix: list[dict[str, Any]] = [{"image": i} for i in range(images)]
    if text:
        prefix.append({"text": text})
    asked = [{"task": "count", "prompt": "how many zebras ?", "answer": f" {i + 1}"} for i in range(branches)]
    return {
        "source": "made",
        "license": "CC0-1.0",
        "category": "test",
        "prefix": prefix,
        "branches": asked,
        "truth": {},
    }


def varied(count: int, seed: int = 0) -> list[Sample]:
    """Samples of no, one and many images, with texts of different lengths."""
    random = np.random.default_rng(seed)
    samples = []
    for i in range(count):
        images = [("png", encode(picture(1000 * seed + 10 * i + j))) for j in range(random.integers(0, 4))]
        text = "a text alone . " * int(random.integers(0, 4))
        samples.append(Sample(f"sample-{i:04d}", record(len(images), text, int(random.integers(1, 4))), images))
    return samples


def tokenizer(root: Path) -> Vocabulary:
    """The data root's tokenizer; trained and saved where there is none."""
    path = root / "tokenizer.json"
    if not path.exists():
        root.mkdir(parents=True, exist_ok=True)
        train_tokenizer(TEXTS, 300).save(str(path))
    return load_tokenizer(path)


def write_set(root: Path, name: str, samples: Sequence[Sample], per_shard: int = 10) -> Path:
    """Writes the data set ``root/name``."""
    path = root / "tokenizer.json"
    if not path.exists():
        tokenizer(root)
    count = token_counter(read_tokenizer(path))
    description = Description(
        name, "made", "CC0-1.0", len(samples), per_shard, tokenizer_hash(root / "tokenizer.json"), {}
    )
    writer = DatasetWriter(root / name, description)
    writer.out.parent.mkdir(parents=True, exist_ok=True)
    writer.open()
    for number, part in enumerate(description.shards):
        write_shard(writer.folder / shard_name(number), [samples[i] for i in part], count)
    writer.finish()
    return root / name


def write_mixture(root: Path, **weights: float) -> str:
    """Writes a mixture of the named data sets; returns its path."""
    path = root / "mixture.toml"
    path.write_text("".join(f'[[source]]\npath = "{name}"\nweight = {weight}\n' for name, weight in weights.items()))
    return str(path)
