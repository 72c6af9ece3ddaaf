"""Held-out loss against sequences that are scored one by one, and against the training step's own."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sets
import torch
import torch.nn.functional as F
import training
from pictures import encode, picture

from mmoe.checkpoint.load import Loaded, begin
from mmoe.data.batch import batches_from_documents, illustrate
from mmoe.data.decoders import build as build_decoder
from mmoe.data.document import BadSample
from mmoe.data.pixels import preprocess
from mmoe.data.shards import Sample
from mmoe.data.source import Source
from mmoe.errors import UserError
from mmoe.evaluate.asked import Asking
from mmoe.evaluate.loss import measure
from mmoe.models.multimodal import build
from mmoe.parallel import engine
from mmoe.recipe import Recipe, load_recipe
from mmoe.train.step import Stepper


def samples() -> list[Sample]:
    """Two tasks, a text that is trained on, a corrupt picture, and a sample longer than a pack."""
    made = sets.varied(9)
    text = sets.record(0, "a text alone . ", 1)
    text["prefix"][0]["loss"] = True
    text["branches"][0] |= {"task": "where", "prompt": "where is the pig ?", "answer": " left"}
    broken = Sample("broken", sets.record(), [("png", encode(picture(1))[:60])])
    return [*made, Sample("text", text, []), broken, Sample("long", sets.record(0, "a text alone . " * 40), [])]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("loss")
    sets.write_set(root, "held", samples())
    training.write_recipe(root, sets.write_mixture(root, held=1.0))
    return root


@pytest.fixture(scope="module")
def recipe(place: Path) -> Recipe:
    # Pillow's decoding is the definition of an image.
    return load_recipe(place / "tiny.toml", ["data.decoder=pillow"])


@pytest.fixture(scope="module")
def model(recipe: Recipe) -> Loaded:
    return begin(recipe, None)


@pytest.fixture(scope="module")
def source(place: Path) -> Source:
    return Source(place / "held", "made/held")


def scored(model: Loaded, ids: list[int], learned: list[int], images: tuple[bytes, ...]) -> list[float]:
    """float64 losses of the tokens at the places ``learned`` of one plain sequence."""
    views = [preprocess(image, model.image_sizes) for image in images]
    pixels = {
        side: torch.from_numpy(np.stack([view[side] for view, _ in views])) for side in model.image_sizes if views
    }
    sizes = torch.tensor([size for _, size in views])
    logits = model.logits(torch.tensor([ids]), *((pixels, sizes) if views else ()))[0].double()
    return F.cross_entropy(logits[[i - 1 for i in learned]], torch.tensor(ids)[learned], reduction="none").tolist()


def by_hand(model: Loaded, source: Source, key: str) -> list[tuple[str, float]]:
    """Task and loss of every token that a sample trains on, each branch a sequence of its own."""
    number = next(i for i in range(len(source)) if source.key(i).endswith(key))
    sample = source.read(number)
    encoded = model.tokenizer.encode
    prefix, learned, found = [1], [], []
    for part in sample.record["prefix"]:
        ids = [3] * model.image_tokens if "image" in part else encoded(part["text"])
        learned += range(len(prefix), len(prefix) + len(ids)) if part.get("loss") else []
        prefix += ids
    found += [("text", loss) for loss in scored(model, prefix, learned, sample.images)] if learned else []
    for branch in sample.record["branches"]:
        start = [*prefix, *encoded(branch["prompt"])]
        whole = [*start, *encoded(branch["answer"]), 2]
        losses = scored(model, whole, list(range(len(start), len(whole))), sample.images)
        found += [(branch["task"], loss) for loss in losses]
    return found


def test_the_loss_is_that_of_every_answer_scored_alone(model: Loaded, source: Source) -> None:
    result = measure(model, source)
    keys = [sample.key for sample in samples()[:10]]
    every = [pair for key in keys for pair in by_hand(model, source, key)]
    assert result["tokens"] == len(every)
    # fp32 logits of packs and of single sequences differ by rounding.
    assert result["loss"] == pytest.approx(np.mean([loss for _, loss in every]), abs=1e-5)
    assert sorted(result["tasks"]) == ["count", "text", "where"]
    for task, row in result["tasks"].items():
        mine = [loss for name, loss in every if name == task]
        assert row["tokens"] == len(mine)
        assert row["loss"] == pytest.approx(np.mean(mine), abs=1e-5)
    assert result["samples"] == 12
    skipped = dict(reason.split(": ", 1) for reason in result["skipped"])
    assert sorted(skipped) == ["made/held/broken", "made/held/long"]
    assert skipped["made/held/long"].endswith("and 0 images fit in no pack of 96 and 6")


def test_it_is_the_training_steps_own_loss(recipe: Recipe, model: Loaded, source: Source) -> None:
    def documents() -> Any:
        for number in range(len(source) - 1):  # the last one is too long
            try:
                yield illustrate(source.read(number), model.tokenizer, model.image_tokens, source.key(number))
            except BadSample:
                continue

    packs = {"packs": recipe.train.micro_batch, "images_per_pack": recipe.data.images_per_pack}
    decoder = build_decoder(recipe.data, model.image_sizes)
    batches = list(
        batches_from_documents(documents(), decoder=decoder, sequence_length=recipe.data.sequence_length, **packs)
    )
    micro = recipe.train.micro_batch
    train = dataclasses.replace(recipe.train, global_batch=micro * len(batches))
    trained = dataclasses.replace(recipe, train=train)
    engine.start(recipe.parallel, recipe.train.seed, alone=True)
    outcome = Stepper(trained, [build(trained)]).step(iter(batches), 1e-3)
    assert len(batches) > 1
    assert measure(model, source)["loss"] == pytest.approx(outcome.loss, rel=1e-12)


def test_blank_pictures_change_the_loss_of_what_they_show_alone(model: Loaded, source: Source) -> None:
    seen, blank = measure(model, source), measure(model, source, Asking(images="blank"))
    assert seen["tasks"]["count"]["loss"] != blank["tasks"]["count"]["loss"]
    assert seen["tasks"]["where"] == blank["tasks"]["where"]
    none = measure(model, source, Asking(images="none"))
    assert none["tasks"]["where"]["loss"] == pytest.approx(seen["tasks"]["where"]["loss"], abs=1e-5)
    # The sample with a corrupt picture counts, too: nothing of it is read.
    assert none["tokens"] > seen["tokens"]


def test_limit_takes_the_first_samples(model: Loaded, source: Source) -> None:
    result = measure(model, source, Asking(limit=1))
    assert (result["samples"], result["tokens"]) == (1, len(by_hand(model, source, samples()[0].key)))


def test_what_has_no_loss_is_refused(model: Loaded, recipe: Recipe, place: Path, source: Source) -> None:
    data = sets.write_set(place, "silent", [Sample("silent", sets.record(0, "a text alone . ", 0), [])])
    with pytest.raises(UserError, match="no token of it carries loss"):
        measure(model, Source(data, "made/silent"))
    plain = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, encoders=(), connector=None))
    with pytest.raises(UserError, match="the model has no encoder"):
        measure(begin(plain, None), source)
