"""Perceptual hashes by their equation, pairs by comparing all, and data sets that share pictures."""

import io
import json
import math
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from pictures import encode, picture, save, smooth
from PIL import Image
from sets import record, write_set

from mmoe import cli
from mmoe.data import leakage
from mmoe.data.leakage import LOW, SIDE, close_pairs, perceptual_hash
from mmoe.data.shards import Sample


def by_the_equation(image: Image.Image) -> int:
    pixels = np.asarray(image.convert("L").resize((SIDE, SIDE), Image.Resampling.LANCZOS)).tolist()
    low = []
    for u in range(LOW):
        for v in range(LOW):
            terms = (
                pixels[y][x]
                * math.cos(math.pi * (2 * y + 1) * u / (2 * SIDE))
                * math.cos(math.pi * (2 * x + 1) * v / (2 * SIDE))
                for y in range(SIDE)
                for x in range(SIDE)
            )
            scale = math.sqrt((1 + (u > 0)) * (1 + (v > 0))) / SIDE
            low.append(scale * math.fsum(terms))
    median = (sorted(low)[31] + sorted(low)[32]) / 2
    return sum((value > median) << (63 - i) for i, value in enumerate(low))


@pytest.mark.parametrize("shape", [(64, 64), (37, 90)])
def test_the_hash_is_its_equation(shape):
    for make in (picture, smooth):
        image = Image.fromarray(make(1, *shape))
        assert perceptual_hash(image) == by_the_equation(image)


def test_pictures_of_one_colour_have_one_hash():
    assert {perceptual_hash(Image.new("RGB", (20, 30), colour)) for colour in ("red", "white", (3, 4, 5))} == {1 << 63}


def test_a_picture_changes_little_when_it_is_made_again():
    pixels = smooth(3, 96, 128)
    whole, another = Image.fromarray(pixels), Image.fromarray(smooth(4, 96, 128))
    for other in (Image.open(io.BytesIO(encode(pixels, "JPEG", quality=60))), whole.resize((80, 60))):
        assert (perceptual_hash(whole) ^ perceptual_hash(other)).bit_count() <= 4
    assert (perceptual_hash(whole) ^ perceptual_hash(another)).bit_count() > 12


@pytest.mark.parametrize("threshold", [0, 1, 4, 10, 31])
@pytest.mark.parametrize(("tests", "trains"), [(0, 5), (5, 0), (60, 80)])
def test_every_close_pair_is_found_once(monkeypatch, threshold, tests, trains):
    """Random hashes, and some of them with 0 to 12 bits turned."""
    monkeypatch.setattr("mmoe.data.leakage.LARGEST_STEP", 50)
    random = np.random.default_rng(threshold)
    train = random.integers(0, 2**64, trains, dtype=np.uint64)
    test = random.integers(0, 2**64, tests, dtype=np.uint64)
    for i in range(min(tests, trains, 40)):
        turned = random.choice(64, i % 13, replace=False)
        test[i] = train[i % 7] ^ np.uint64(sum(1 << int(bit) for bit in turned))
    got = [tuple(row) for pieces in close_pairs(test, train, threshold) for row in np.stack(pieces, 1).tolist()]
    want = [
        (i, j, bits)
        for i, a in enumerate(test.tolist())
        for j, b in enumerate(train.tolist())
        if (bits := (a ^ b).bit_count()) <= threshold
    ]
    assert sorted(got) == want


def test_shared_pictures_are_listed_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures = [smooth(i, 64, 80) for i in range(9)]
    write_set(tmp_path, "train", [Sample(f"t{i}", record(1), [("png", encode(pictures[i]))]) for i in range(6)])
    again = save(Image.fromarray(pictures[2]).resize((60, 48)), "JPEG")
    images = [encode(pictures[7]), again, encode(pictures[8]), encode(pictures[5]), b"GIF8"]
    write_set(tmp_path, "test", [Sample(f"s{i}", record(1), [("png", image)]) for i, image in enumerate(images)])
    write_set(tmp_path, "clean", [Sample("c", record(1), [("png", encode(pictures[7]))])])
    out = tmp_path / "leakage.json"
    sets = [str(tmp_path / name) for name in ("train", "test", "clean")]
    assert cli.main(["data", "leakage", *sets, "--json", str(out)]) == 0
    leaky, clean = json.loads(out.read_text())
    name = tmp_path.name
    assert (leaky["images"], leaky["leaked"]) == (4, 2)
    assert sorted((match["test"], match["count"], match["closest"][0]["train"]) for match in leaky["matches"]) == [
        (f"{name}/test/s1:0", 1, f"{name}/train/t2:0"),
        (f"{name}/test/s3:0", 1, f"{name}/train/t5:0"),
    ]
    assert all(len(match["closest"]) == 1 for match in leaky["matches"])
    assert {match["test"]: match["closest"][0]["bits"] for match in leaky["matches"]}[f"{name}/test/s3:0"] == 0
    assert [line.partition(": ")[0] for line in leaky["bad"]] == [f"{name}/test/s4:0"]
    assert (clean["images"], clean["leaked"], clean["matches"]) == (1, 0, [])
    printed = capsys.readouterr().out
    assert "test: 2 of 4 images are within 4 bits" in printed
    assert "1 could not be read" in printed
    assert cli.main(["data", "leakage", *sets, "--threshold", "40"]) == 2


def stand_in(monkeypatch: pytest.MonkeyPatch, **sets: list[int]) -> None:
    """Data sets of pictures with these hashes; a picture's name is its set's and its place."""
    monkeypatch.setattr(leakage, "_source", lambda path: path.name)
    made = {name: (np.array(of, np.uint64), [f"{name}/{i}" for i in range(len(of))], []) for name, of in sets.items()}
    monkeypatch.setattr(leakage, "hashes", lambda name: made[name])


def test_many_equal_pictures_are_counted_and_the_closest_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leakage, "LARGEST_STEP", 1000)
    stand_in(monkeypatch, train=[0b111] * 300 + [0b1] * 2 + [0b11] * 300 + [0] * 2 + [2**64 - 1], test=[0, 2**63] * 200)
    tracemalloc.start()
    (result,) = leakage.compare(Path("train"), [Path("test")], 3)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (result["images"], result["leaked"], len(result["matches"])) == (400, 400, 400)
    # 0 is within 3 bits of all but the last, 2^63 not of 0b111.
    assert [match["count"] for match in result["matches"]] == [604] * 200 + [304] * 200
    names = [f"train/{i}" for i in (602, 603, 300, 301, 302)]
    for match in result["matches"]:
        far = result["matches"].index(match) >= 200
        assert [one["train"] for one in match["closest"]] == names
        assert [one["bits"] for one in match["closest"]] == [bits + far for bits in (0, 0, 1, 1, 2)]
    assert len(json.dumps(result)) < 200_000
    # 181 600 pairs, of which a list takes more than 100 bytes each.
    assert peak < 4_000_000


@pytest.mark.parametrize("step", [7, 1 << 22])
def test_the_closest_are_those_of_all_pairs(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    monkeypatch.setattr(leakage, "LARGEST_STEP", step)
    random = np.random.default_rng(0)
    test, train = random.integers(0, 2**10, 30).tolist(), random.integers(0, 2**10, 200).tolist()
    stand_in(monkeypatch, train=train, test=test)
    (result,) = leakage.compare(Path("train"), [Path("test")], 2)
    want = {}
    for i, one in enumerate(test):
        close = sorted((bits, j) for j, other in enumerate(train) if (bits := (one ^ other).bit_count()) <= 2)
        if close:
            want[f"test/{i}"] = len(close), [{"train": f"train/{j}", "bits": bits} for bits, j in close[:5]]
    assert {match["test"]: (match["count"], match["closest"]) for match in result["matches"]} == want
