"""The files that every side reads: JPEGs of photographs' size, in our shards, which are WebDataset tars."""

import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from mmoe.data.shards import DatasetWriter, Description, Sample, shard_name, token_counter, write_shard
from mmoe.data.tokenizer import tokenizer_hash, train_tokenizer

NAME, PER_SHARD = "photographs", 64
HEIGHT, WIDTH = 480, 640
"""Of a photograph, pixels."""
QUESTIONS = [("what is it ?", " a made picture"), ("is it noisy ?", " yes")]


class Files(NamedTuple):
    """Where they lie."""

    root: Path
    """As `data.root`: the data set, its mixture and the tokenizer."""
    mixture: Path
    shards: list[Path]
    images: list[bytes]


def photograph(seed: int, height: int, width: int) -> bytes:
    """A JPEG with broad gradients, edges and a sensor's noise, about as many bytes a pixel as a photograph."""
    random = np.random.default_rng(seed)
    broad = Image.fromarray(random.integers(0, 256, (8, 10, 3), dtype=np.uint8))
    fine = Image.fromarray(random.integers(0, 256, (height // 10, width // 10, 3), dtype=np.uint8))
    layers = [np.asarray(part.resize((width, height), Image.Resampling.BICUBIC), np.float32) for part in (broad, fine)]
    pixels = 0.75 * layers[0] + 0.25 * layers[1] + random.normal(0, 3, (height, width, 3))
    out = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=90)
    return out.getvalue()


def write(root: Path, count: int, height: int, width: int) -> Files:
    """``count`` samples of one image and two questions each."""
    tokenizer = train_tokenizer([text for pair in QUESTIONS for text in pair], 300)
    tokenizer.save(str(root / "tokenizer.json"))
    description = Description(NAME, "made", "CC0-1.0", count, PER_SHARD, tokenizer_hash(root / "tokenizer.json"), {})
    writer = DatasetWriter(root / NAME, description)
    writer.open()
    images = [photograph(seed, height, width) for seed in range(count)]
    record = {
        "source": "made",
        "license": "CC0-1.0",
        "category": "made",
        "prefix": [{"image": 0}],
        "branches": [{"task": "made", "prompt": prompt, "answer": answer} for prompt, answer in QUESTIONS],
        "truth": {},
    }
    counter = token_counter(tokenizer)
    for number, part in enumerate(description.shards):
        samples = [Sample(f"sample-{i:05d}", record, [("jpg", images[i])]) for i in part]
        write_shard(writer.folder / shard_name(number), samples, counter)
    writer.finish()
    mixture = root / "mixture.toml"
    mixture.write_text(f'[[source]]\npath = "{NAME}"\nweight = 1\n')
    loose = root / "loose"
    loose.mkdir()
    for i, image in enumerate(images):
        (loose / f"{i:05d}.jpg").write_bytes(image)
    return Files(root, mixture, sorted((root / NAME).glob("*.tar")), images)
