"""What the cache of frozen encoders' features saves: training from ``data.features`` beside training from pixels.

A CLIP ViT-B/16 of the published shape (random weights: the work is the same) with LLaVA-1.5's connector, as in LLaVA's
alignment: encoder and language model are frozen. The language model is small, so that a step is mostly the encoder's;
beside one of 7 billion parameters the share that the cache saves is smaller, the time that it saves an image is not.
"""

import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from benchmarks.loading import files
from benchmarks.loading.rates import Rate, Side, alternate, judged, started
from benchmarks.report import Row
from mmoe.data.loader import Loader
from mmoe.models.multimodal import build_stages
from mmoe.parallel import engine
from mmoe.recipe.model import MLP, Llama, Model, ViT
from mmoe.recipe.schema import Data, Optimizer, Recipe, Train
from mmoe.train import encode
from mmoe.train.step import Stepper

IMAGES, SAMPLES = 32, 3
PACKS, PER_PACK = 2, 4
"""Of a micro-batch, which is a step."""
AHEAD, LOADED = 6, 24
"""Batches that no loader reads ahead more of, and those in a sample where nothing but loading is timed."""
ENCODER = "clip"
RATE = 1e-4
UNITS = (("", "images/s", 0), (".processor", "images/CPU s", 1))
"""Of a :class:`Rate`: what a row's name ends with, its unit, which number it is."""


def recipe(found: files.Files, *, quick: bool, features: Path | None) -> Recipe:
    side, patch, width, layers, heads = (32, 16, 32, 1, 2) if quick else (224, 16, 768, 12, 12)
    hidden, depth = (32, 1) if quick else (512, 4)
    grid = side // patch
    encoder = ViT(
        name=ENCODER, type="vit", image_size=side, patch_size=patch, width=width, layers=layers, heads=heads,
        activation="quick_gelu", class_token=True, pre_norm=True, patch_bias=False, final_norm=False, pooling="norm",
        feature_layer=-1 if quick else -2,
    )  # fmt: skip
    backbone = Llama(
        type="llama", vocab_size=512, hidden_size=hidden, layers=depth, heads=hidden // 32, kv_heads=hidden // 32,
        head_dim=32, ffn_hidden_size=hidden * 8 // 3 // 8 * 8,
    )  # fmt: skip
    return Recipe(
        name="frozen",
        model=Model(backbone=backbone, encoders=(encoder,), connector=MLP(type="mlp", grid=grid)),
        data=Data(
            mixture=str(found.mixture),
            root=str(found.root),
            sequence_length=(grid**2 + 24) * PER_PACK,
            images_per_pack=PER_PACK,
            decoder="simplejpeg",
            features=str(features or ""),
        ),
        train=Train(steps=1, global_batch=PACKS, micro_batch=PACKS, frozen=("encoders", "language")),
        optimizer=Optimizer(lr=RATE),
    )


def loader(of: Recipe, features: Mapping[str, Any]) -> Loader:
    """A step's batches; ``features``: what :func:`mmoe.train.encode.expected` gives, or nothing."""
    sizes = of.model.sizes_of(without=features)
    tokens = of.model.image_tokens
    return Loader(
        of.data,
        image_tokens=tokens,
        image_sizes=sizes,
        micro_batch=PACKS,
        global_batch=PACKS,
        seed=0,
        features=features,
    )


def rows(folder: Path, threads: int, *, quick: bool) -> list[Row]:
    """Measures in ``folder``, which is empty, on so many threads; torch has as many afterwards as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return _rows(folder, threads, quick=quick)
    finally:
        torch.set_num_threads(before)


def _rows(folder: Path, threads: int, *, quick: bool) -> list[Row]:
    count, size = (16, (32, 48)) if quick else (IMAGES, (files.HEIGHT, files.WIDTH))
    found, cache = files.write(folder, count, *size), folder / "features"
    plain, cached = (recipe(found, quick=quick, features=where) for where in (None, cache))
    engine.start(plain.parallel, plain.train.seed, alone=True)
    models = build_stages(plain)
    stepper, encoder = Stepper(plain, models), models[0].encoders[ENCODER]
    used = time.process_time()
    made = encode.encode(plain, {ENCODER: encoder.eval()}, cache)
    making = Rate(made.images / made.seconds, made.images / (time.process_time() - used))
    features = encode.expected(cached, models)
    samples, ahead, loaded = (2, 0, 1) if quick else (SAMPLES, AHEAD, LOADED)
    with ExitStack() as closing:

        def batches(of: Recipe) -> Loader:
            return closing.enter_context(loader(of, features if of is cached else {}))

        def stepped(of: Recipe) -> Iterator[int]:
            for batch in batches(of):
                stepper.step(iter([batch]), RATE)
                yield len(batch["original_sizes"])

        def encoded() -> Iterator[int]:
            for batch in batches(plain):
                with torch.no_grad():
                    encoder(batch["images"][plain.model.encoders[0].image_size])
                yield len(batch["original_sizes"])

        loading = (len(batch["original_sizes"]) for batch in batches(cached))
        # Decoding ahead costs little beside the encoder: one batch settles those sides.
        few = min(ahead, 1)
        sides = {
            "features": Side(started(loading), loaded, ahead),
            "encode": Side(started(encoded()), 1, few),
            "step": Side(started(stepped(cached)), 2 if ahead else 1, few),
            "step from pixels": Side(started(stepped(plain)), 1, few),
        }
        rates = alternate(sides, samples)
    parameters = sum(parameter.numel() for parameter in encoder.parameters()) / 1e6
    name = "quick" if quick else f"CLIP ViT-B/16@224 ({parameters:.0f} M)"
    shape = f"{name}, {PACKS * PER_PACK} images, {threads} threads"
    disk = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file()) / count
    jpeg = statistics.fmean(map(len, found.images))
    return [
        *_pair("data.features", shape, rates["features"], rates["encode"], "decode + encode"),
        *_pair("data.features.step", shape, rates["step"], rates["step from pixels"], "step from pixels"),
        Row("data.features.disk", shape, "float32", disk / 1e3, jpeg / 1e3, "the JPEG", "kB/image", jpeg / disk),
        *(Row(f"data.features.make{suffix}", shape, "float32", making[i], unit=unit) for suffix, unit, i in UNITS),
        Row("data.features.pays", shape, "float32", _epochs(making, rates), unit="epochs"),
    ]


def _pair(name: str, shape: str, mine: list[Rate], theirs: list[Rate], peer: str) -> list[Row]:
    return [judged(name + suffix, shape, mine, theirs, peer, unit, i) for suffix, unit, i in UNITS]


def _epochs(making: Rate, rates: dict[str, list[Rate]]) -> float:
    """Of steps, after which the processor time that the cache took is saved; without end where it saves none."""
    ours, theirs = (
        statistics.median(1 / rate.processor for rate in rates[name]) for name in ("step", "step from pixels")
    )
    return 1 / making.processor / (theirs - ours) if theirs > ours else float("inf")
