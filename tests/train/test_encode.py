"""Training from cached features against training without them, and caches that must not be used."""

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sets
import torch
import training
from pictures import bad_images, encode, picture

from mmoe.data.cache import CARD, Card, Writer
from mmoe.data.decoders import build as build_decoder
from mmoe.data.loader import Loader
from mmoe.data.shards import Sample
from mmoe.data.source import Source
from mmoe.errors import UserError
from mmoe.models.multimodal import build, build_stages
from mmoe.parallel import engine
from mmoe.recipe.load import load_recipe
from mmoe.recipe.schema import Recipe
from mmoe.train import encode as features
from mmoe.train.step import Stepper

ENCODERS = ("vit", "convnet")
FROZEN = ('train.frozen=["encoders"]', "data.decoder=pillow")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two data sets with a picture that no decoder reads and a sample that is not there, a recipe, and the cache."""
    root = tmp_path_factory.mktemp("root")
    broken = Sample("broken", sets.record(2), [("png", encode(picture(1))), ("png", bad_images()["cut"][0])])
    sets.write_set(root, "a", [*sets.varied(20), broken])
    sets.write_set(root, "b", sets.varied(6, seed=1))
    training.write_recipe(root, sets.write_mixture(root, a=3, b=1))
    cut = root / "b" / "shard-000000.tar"
    index = np.load(root / "b" / "index.npz")
    last = int(index["image_offset"][-1])
    cut.write_bytes(cut.read_bytes()[: last + 10])
    assert fill(root, root / "cache").complete
    return root


def recipe(root: Path, *changes: str) -> Recipe:
    return load_recipe(str(root / "tiny.toml"), [*FROZEN, *changes])


def cached(root: Path, folder: str = "cache") -> Recipe:
    return recipe(root, f"data.features={root / folder}")


def fill(root: Path, out: Path, *changes: str, only: tuple[str, ...] = ENCODERS, images: int = 8) -> features.Made:
    wanted = recipe(root, *changes)
    return features.encode(wanted, features._encoders(wanted, None, only), out, shard_images=images)


@pytest.fixture
def copy(made: Path) -> Iterator[Path]:
    """The data with a cache to be altered, under the name ``copy``."""
    shutil.copytree(made / "cache", made / "copy")
    yield made
    shutil.rmtree(made / "copy")


def loader(wanted: Recipe, parts: Any, **options: Any) -> Loader:
    return Loader(
        wanted.data,
        image_tokens=wanted.model.image_tokens,
        image_sizes=wanted.model.sizes_of(without=parts),
        micro_batch=2,
        global_batch=4,
        seed=0,
        features=parts,
        **options,
    )


def begin(wanted: Recipe) -> tuple[Stepper, dict]:
    engine.start(wanted.parallel, wanted.train.seed, alone=True)
    models = build_stages(wanted)
    stepper = Stepper(wanted, models)
    return stepper, features.expected(wanted, models)


def read(wanted: Recipe) -> list[dict]:
    """Two steps' micro-batches, as a run with the recipe's first weights reads them."""
    with loader(wanted, begin(wanted)[1]) as batches:
        return [next(batches) for _ in range(8)]


def losses(wanted: Recipe, steps: int = 8) -> tuple[list, list, list]:
    """Losses and gradient norms of each step, the keys of its samples, and the bad ones."""
    stepper, parts = begin(wanted)
    numbers, seen = [], []
    with loader(wanted, parts) as batches:
        watched = [next(batches) for _ in range(2 * steps)]
        for step in range(steps):
            outcome = stepper.step(iter(watched[2 * step : 2 * step + 2]), 1e-2)
            numbers.append((outcome.loss, outcome.grad_norm, outcome.balance_loss))
        seen = [batch["samples"] for batch in watched]
    return numbers, seen, [reason for batch in watched for reason in batch["skipped"]]


def test_training_from_the_cache_is_training_without(made: Path) -> None:
    """Bad samples among it: their features are those of zeros.

    A GEMM of another number of rows may add up in another order, which costs fp32's 2⁻²⁴ of a sum a few times over.
    """
    plain, from_cache = losses(recipe(made)), losses(cached(made))
    assert plain[1:] == from_cache[1:]
    assert any("image 1: " in reason for reason in plain[2])
    assert any("is truncated" in reason for reason in plain[2])
    torch.testing.assert_close(torch.tensor(plain[0]), torch.tensor(from_cache[0]), rtol=2e-6, atol=0)


def test_all_but_pixels_is_the_same_and_no_image_is_opened(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = read(recipe(made))
    monkeypatch.setattr("mmoe.data.decoders.threads.open_image", lambda *_: pytest.fail("an image is decoded"))
    for batch, other in zip(read(cached(made)), plain, strict=True):
        assert batch["images"] == {}
        assert batch["features"].keys() == set(ENCODERS)
        assert batch["skipped"] == other["skipped"]
        assert torch.equal(batch["original_sizes"], other["original_sizes"])
        assert torch.equal(batch["tokens"], other["tokens"])
        assert len(batch["features"]["vit"][0]) == len(other["images"][16])


def test_another_encoder_goes_on_reading_pixels(made: Path, tmp_path: Path) -> None:
    fill(made, tmp_path / "vit", only=("vit",))
    wanted = recipe(made, f"data.features={tmp_path / 'vit'}")
    for batch, other in zip(read(wanted), read(recipe(made)), strict=True):
        assert batch["features"].keys() == {"vit"}
        assert torch.equal(batch["images"][16], other["images"][16])


def test_a_row_is_what_the_encoder_makes_of_the_image(made: Path) -> None:
    wanted = recipe(made)
    decoder, model = build_decoder(wanted.data, (16,)), begin(wanted)[0].models[0]
    arrays = {name: Card.read(made / "cache" / "a" / name) for name in ENCODERS}
    source = Source(made / "a", "a")
    number = next(i for i in range(len(source)) if len(source.image_range(i)) == 3)
    pixels = decoder(source.read(number).images).images[16]
    import tensorstore as ts

    for name, card in arrays.items():
        path = made / "cache" / "a" / name / "map-0"
        array = ts.open({"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}).result()
        rows = source.image_range(number)
        got = torch.from_numpy(array[rows.start : rows.stop].read().result())
        assert list(got.shape[1:]) == card.maps[0]
        want = model.encoders[name](pixels)[0].detach()
        torch.testing.assert_close(got, want, rtol=2e-6, atol=2e-6 * float(want.abs().max()))


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_stream_resumes_at_another_number_of_ranks(made: Path, ranks: int) -> None:
    wanted = cached(made)
    parts = begin(wanted)[1]
    with loader(wanted, parts) as batches:
        first = [next(batches) for _ in range(2)]
        state = batches.state()
        rest = [next(batches) for _ in range(2)]
    assert first
    got = []
    for rank in range(ranks):
        with loader(wanted, parts, state=state, rank=rank, ranks=ranks) as batches:
            got += [next(batches) for _ in range(2 // ranks)]
    for batch, other in zip(got, rest, strict=True):
        assert batch["samples"] == other["samples"]
        for name in ENCODERS:
            assert torch.equal(batch["features"][name][0], other["features"][name][0])


def test_bf16_goes_through_as_it_is(made: Path, tmp_path: Path) -> None:
    bf16 = "precision.dtype=bf16"
    fill(made, tmp_path / "bf16", bf16)
    wanted = recipe(made, bf16, f"data.features={tmp_path / 'bf16'}")
    assert read(wanted)[0]["features"]["vit"][0].dtype == torch.bfloat16
    with pytest.raises(UserError, match=r'precision.dtype: there "bf16", here "fp32"'):
        read(recipe(made, f"data.features={tmp_path / 'bf16'}"))


def test_an_interrupted_encoding_goes_on(made: Path, tmp_path: Path) -> None:
    """Lost: a mark, as of a process killed while it wrote; the temporary file of tensorstore stays beside it."""
    out = tmp_path / "cache"
    shutil.copytree(made / "cache", out)
    folder = out / "a" / "vit"
    card = Card.read(folder)
    card.complete = False
    card.write(folder)
    (folder / "done" / "000001.json").unlink()
    half = folder / "map-0" / "c" / "1" / "0" / "0"
    (half / "0.__lock").write_bytes((half / "0").read_bytes()[:100])
    (half / "0").write_bytes(b"half")
    kept = (folder / "map-0" / "c" / "0" / "0" / "0" / "0").stat()
    wanted = recipe(made, f"data.features={out}")
    with pytest.raises(UserError, match="not complete"):
        read(wanted)
    again = fill(made, out)
    assert (again.images, again.complete) == (8, True)
    same = ("cache", "a", "vit", "map-0", "c")
    assert (half / "0").read_bytes() == made.joinpath(*same, "1", "0", "0", "0").read_bytes()
    assert (folder / "map-0" / "c" / "0" / "0" / "0" / "0").stat() == kept
    assert read(wanted)
    assert fill(made, out).images == 0


def as_rank(monkeypatch: pytest.MonkeyPatch, rank: int, world: int = 2) -> None:
    monkeypatch.setattr(engine, "announced", lambda: (rank, world))


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_ranks_share_the_shards(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: Any) -> None:
    """A rank that looks at the disk when another is done makes its own share all the same."""
    whole = fill(made, tmp_path / "whole").images
    done = []
    for rank in order:
        as_rank(monkeypatch, rank)
        done.append(fill(made, tmp_path / "shared"))
    assert [one.complete for one in done] == [False, True]
    assert sum(one.images for one in done) == whole
    assert min(one.images for one in done) > 0
    assert read(recipe(made, f"data.features={tmp_path / 'shared'}"))


def test_ranks_that_look_apart_make_no_shard_twice(made: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Rank 1 does all of its share after the first shard of rank 0, which goes on then with what it had listed."""
    written: list[tuple[Path, int]] = []
    write = Writer.write

    def recorded(writer: Writer, shard: int, *rest: Any) -> None:
        write(writer, shard, *rest)
        written.append((writer.folder, shard))
        if len(written) == 1:
            as_rank(monkeypatch, 1)
            fill(made, tmp_path / "shared")

    monkeypatch.setattr(Writer, "write", recorded)
    as_rank(monkeypatch, 0)
    assert fill(made, tmp_path / "shared").complete
    assert len(written) == len(set(written))


def test_a_rank_says_what_it_leaves(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    as_rank(monkeypatch, 0)
    assert features.run(recipe(made), None, tmp_path / "cache").left == 2
    assert "not complete: rank 0 of 2 is done" in capsys.readouterr().err
    as_rank(monkeypatch, 1)
    assert features.run(recipe(made), None, tmp_path / "cache").complete


def test_a_shard_that_vanishes_is_an_error(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finish = Writer.finish

    def robbed(writer: Writer) -> int:
        (writer.folder / "done" / "000001.json").unlink(missing_ok=True)
        return finish(writer)

    monkeypatch.setattr(Writer, "finish", robbed)
    with pytest.raises(UserError, match="shard 1 was written and is gone"):
        fill(made, tmp_path / "cache")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (('data.fit="pad"',), r'another data.fit: there "stretch", here "pad"'),
        (("train.seed=1",), "another weights"),
        (("model.encoders.0.image_size=32", "model.encoders.1.image_size=32"), "another encoder.image_size"),
        (('train.frozen=["encoders.vit"]',), "encoder convnet are cached, but it is trained"),
        (("data.features=/nowhere",), "no features of vit, convnet are there"),
    ],
)
def test_a_cache_of_something_else_is_refused(made: Path, changes: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(recipe(made, f"data.features={made / 'cache'}", *changes))


def test_a_cache_of_another_recipe_is_not_written_into(made: Path) -> None:
    with pytest.raises(UserError, match=r"another data.fit.*mmoe data encode"):
        fill(made, made / "cache", "data.fit=pad")


def test_features_without_a_frozen_encoder_are_refused(made: Path) -> None:
    with pytest.raises(UserError, match="no encoder is frozen"):
        load_recipe(str(made / "tiny.toml"), ["data.features=somewhere"])


def alter(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


SHARD = "a/vit/map-0/c/0/0/0/0"


def damage(cache: Path, how: str) -> None:
    shard, card = cache / SHARD, cache / "a" / "vit" / CARD
    values = json.loads(card.read_text())
    match how:
        case "flipped":
            for row in range(8):
                alter(shard, row * (shard.stat().st_size // 8 - 8) + 50)
        case "truncated":
            shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
        case "empty":
            shard.write_bytes(b"")
        case "gone":
            shard.unlink()
        case "a data set gone":
            shutil.rmtree(cache / "b" / "vit")
        case "no JSON":
            card.write_text("{")
        case "key":
            card.write_text(json.dumps(values | {"key": "0"}))
        case "part":
            values["parts"]["data.fit"] = "pad"
            card.write_text(json.dumps(values))
        case "type":
            card.write_text(json.dumps(values | {"images": "many"}))
        case "dtype":
            path = cache / "a" / "vit" / "map-0" / "zarr.json"
            path.write_text(path.read_text().replace("float32", "int32").replace('"NaN"', "0"))
        case "sizes":
            alter(cache / "a" / "vit" / "sizes" / "c" / "0" / "0", 3)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("flipped", rf"Digest mismatch.*{SHARD}.*remove this file and make it again"),
        ("truncated", rf"{SHARD}.*remove this file and make it again"),
        ("empty", rf"{SHARD}.*remove this file and make it again"),
        ("gone", "not complete"),
        ("a data set gone", "but not of the data set b"),
        ("no JSON", rf"unreadable.*a/vit/{CARD}"),
        ("key", "its key is not that of its parts"),
        ("part", "its key is not that of its parts"),
        ("type", "images is 'many'"),
        ("dtype", "int32, not .* float32"),
        ("sizes", "damaged: .*Digest mismatch|damaged: .*sizes"),
    ],
)
def test_damage_is_named(copy: Path, how: str, message: str) -> None:
    damage(copy / "copy", how)
    with pytest.raises(UserError, match=message):
        read(cached(copy, "copy"))


def test_a_removed_shard_is_made_again(copy: Path) -> None:
    cache = copy / "copy"
    before = (cache / SHARD).read_bytes()
    (cache / SHARD).unlink()
    assert fill(copy, cache).images == 8
    assert (cache / SHARD).read_bytes() == before


def test_weights_are_hashed_as_they_are_loaded(made: Path) -> None:
    wanted = recipe(made)
    engine.start(wanted.parallel, 0, alone=True)
    model = build(dataclasses.replace(wanted))
    tensors = model.encoders["vit"].state_dict()
    known = features.weights_hash(tensors)
    assert known == features.weights_hash(dict(reversed(tensors.items())))
    name = next(iter(tensors))
    assert known != features.weights_hash(tensors | {name: tensors[name] + 1e-7 * tensors[name].abs().max()})


@pytest.mark.slow
def test_runs_with_and_without_a_cache(made: Path, tmp_path: Path) -> None:
    """The command, a run from what it made, and its continuation by two ranks."""
    options = [part for value in FROZEN for part in ("--set", value)]
    file, cache = made / "tiny.toml", tmp_path / "cache"
    command = [sys.executable, "-m", "mmoe", "data", "encode", str(file), "-", "--out", str(cache), *options]
    done = subprocess.run(command, env=training.environment(), capture_output=True, text=True, timeout=120)
    assert (done.returncode, "complete" in done.stderr) == (0, True), done.stderr
    use = ("--set", f"data.features={cache}")
    for run, more, ranks in (("plain", (), 1), ("cached", use, 1), ("both", use, 2)):
        assert training.run(file, tmp_path / run, *options, *more, ranks=ranks).returncode == 0
    plain, run, both = (training.curve(tmp_path / name) for name in ("plain", "cached", "both"))
    for a, b, c in zip(plain, run, both, strict=True):
        assert abs(a["loss"] - b["loss"]) <= 2e-6 * a["loss"]
        assert abs(b["loss"] - c["loss"]) <= 1e-4 * b["loss"]
    shutil.rmtree(tmp_path / "cached" / "checkpoints" / "step_00000010")
    shutil.rmtree(tmp_path / "cached" / "checkpoints" / "step_00000008")
    (tmp_path / "cached" / "checkpoints" / "latest").unlink()
    assert training.run(file, tmp_path / "cached", *options, *use, "--resume").returncode == 0
    assert training.curve(tmp_path / "cached") == run
