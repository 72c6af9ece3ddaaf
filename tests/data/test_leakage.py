"""Perceptual hashes by their equation, pairs by comparing all, and data sets that share pictures."""

import io
import json
import math
import shutil
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pictures import encode, picture, save, smooth
from PIL import Image
from sets import record, write_set

from mmoe import cli
from mmoe.data import cv_bench, leakage
from mmoe.data.leakage import LOW, SIDE, close_pairs, perceptual_hash
from mmoe.data.shards import Sample
from mmoe.errors import UserError


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


def cv_bench_rows(images: Sequence[bytes]) -> list[dict[str, Any]]:
    """CV-Bench's rows, every third one 3D."""
    rows = []
    for number, image in enumerate(images):
        kind, task, source = ("3D", "Depth", "Omni3D") if number % 3 == 2 else ("2D", "Count", "COCO")
        name = f"img/{kind}/{task.lower()}/{source.lower()}_{number}.png"
        row = dict.fromkeys(cv_bench.schema().names) | {"idx": number, "type": kind, "task": task, "source": source}
        row |= {"prompt": cv_bench.prompt("what ?", ["3", "2"]), "choices": ["3", "2"], "answer": "(A)"}
        rows.append(row | {"filename": name, "image": {"bytes": image, "path": None}})
    return rows


def write_cv_bench(folder: Path, rows: Sequence[dict[str, Any]], layout: str) -> Path:
    """``parquet``, ``jsonl``, or ``both``: 2D as the one and 3D as the other."""
    folder.mkdir(parents=True)
    for kind, stem in cv_bench.TYPES.items():
        mine = [row for row in rows if row["type"] == kind]
        if layout == "parquet" or (layout == "both" and kind == "2D"):
            cv_bench.write(folder / f"{stem}.parquet", mine, "")
            continue
        for row in mine:
            picture_file = folder / row["filename"]
            picture_file.parent.mkdir(parents=True, exist_ok=True)
            picture_file.write_bytes(row["image"]["bytes"])
        lines = [json.dumps({name: value for name, value in row.items() if name != "image"}) for row in mine]
        (folder / f"{stem}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def found(results: Path) -> tuple[int, int, dict[str, str]]:
    """Pictures of the one test set, how many matched, and each of these with the closest training picture."""
    (result,) = json.loads(results.read_text())
    return result["images"], result["leaked"], {m["test"]: m["closest"][0]["train"] for m in result["matches"]}


@pytest.mark.parametrize("layout", ["parquet", "jsonl", "both"])
def test_cv_benchs_pictures_are_found_in_training_data(tmp_path: Path, layout: str) -> None:
    """The other way round too: CV-Bench's as the training data."""
    pictures = [smooth(i, 64, 80) for i in range(12)]
    training = write_set(
        tmp_path, "train", [Sample(f"t{i}", record(1), [("png", encode(pictures[i]))]) for i in range(6)]
    )
    again = save(Image.fromarray(pictures[2]).resize((60, 48)), "JPEG", quality=80)
    images = [encode(pictures[7]), again, encode(pictures[5]), encode(pictures[8]), b"GIF8", encode(pictures[9])]
    rows = cv_bench_rows(images)
    rows[1]["answer"] = "none of these"  # no question, but a picture
    bench, out = write_cv_bench(tmp_path / "data" / "CV-Bench", rows, layout), tmp_path / "leakage.json"
    assert cli.main(["data", "leakage", str(training), str(bench), "--json", str(out)]) == 0
    shared = {
        "data/CV-Bench/test_2d/1:img/2D/count/coco_1.png": f"{tmp_path.name}/train/t2:0",
        "data/CV-Bench/test_3d/0:img/3D/depth/omni3d_2.png": f"{tmp_path.name}/train/t5:0",
    }
    assert found(out) == (5, 2, shared)
    (bad,) = json.loads(out.read_text())[0]["bad"]
    assert bad.startswith("data/CV-Bench/test_2d/3:img/2D/count/coco_4.png: unsupported format GIF")
    assert cli.main(["data", "leakage", str(bench), str(training), "--json", str(out)]) == 0
    assert found(out) == (6, 2, {train: test for test, train in shared.items()})


def test_rows_without_a_picture_are_named_and_the_others_compared(tmp_path: Path) -> None:
    images = [encode(smooth(i, 64, 80)) for i in range(6)]
    training = write_set(tmp_path, "train", [Sample("t", record(1), [("png", images[0])])])
    rows, out = cv_bench_rows(images), tmp_path / "leakage.json"
    rows[1]["image"], rows[3]["filename"], rows[4]["filename"] = None, None, "a\x1b[2J\n"
    rows[4]["image"]["bytes"] = images[0]
    bench = write_cv_bench(tmp_path / "parquet", rows, "parquet")
    assert cli.main(["data", "leakage", str(training), str(bench), "--json", str(out)]) == 0
    name = f"{tmp_path.name}/parquet/test_2d"
    assert found(out)[:2] == (5, 2)
    assert set(found(out)[2]) == {f"{name}/0:img/2D/count/coco_0.png", rf"{name}/3:'a\x1b[2J\n'"}
    assert json.loads(out.read_text())[0]["bad"] == [f"{name}/1:img/2D/count/coco_1.png: it has no picture"]

    bench = write_cv_bench(tmp_path / "jsonl", cv_bench_rows(images), "jsonl")
    (bench / "img/2D/count/coco_0.png").unlink()
    (bench / "img/2D/count/coco_1.png").write_bytes(images[1][:300])
    lines = (bench / "test_2d.jsonl").read_text().replace("img/2D/count/coco_3.png", "../train/coco_3.png")
    (bench / "test_2d.jsonl").write_text(lines)
    assert cli.main(["data", "leakage", str(training), str(bench), "--json", str(out)]) == 0
    assert found(out) == (3, 0, {})
    reasons = [
        reason.removeprefix(f"{tmp_path.name}/jsonl/test_2d/") for reason in json.loads(out.read_text())[0]["bad"]
    ]
    assert [reason.partition(": ")[0][:2] for reason in reasons] == ["0:", "1:", "2:"]
    for reason, what in zip(reasons, ["its picture cannot be read", "corrupt image", "no path within"], strict=True):
        assert what in reason


@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        (shutil.rmtree, "neither a data set nor CV-Bench's files are there (CV-Bench): give a folder"),
        (lambda bench: (bench / "test_2d.parquet").write_bytes(b"PAR1"), "no parquet file that can be read"),
        (lambda bench: pq.write_table(pa.table({"idx": [1]}), bench / "test_3d.parquet"), "no column 'image'"),
        (
            lambda bench: (bench / "test_2d.parquet").rename(bench / "test_2d.jsonl").write_text("{"),
            "(CV-Bench/test_2d.jsonl:1): give CV-Bench's own file",
        ),
    ],
    ids=["missing", "no parquet", "no pictures", "no JSON"],
)
def test_broken_cv_bench_files_are_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    spoil: Callable[[Path], Any],
    what: str,
) -> None:
    """By a relative path, which has nothing above it."""
    write_set(tmp_path, "train", [Sample("t", record(1), [("png", encode(smooth(0, 64, 80)))])])
    spoil(
        write_cv_bench(tmp_path / "CV-Bench", cv_bench_rows([encode(smooth(i, 64, 80)) for i in range(3)]), "parquet")
    )
    monkeypatch.chdir(tmp_path)
    for sets in (["train", "CV-Bench"], ["CV-Bench", "train"]):
        assert cli.main(["data", "leakage", *sets]) == 2
        printed = capsys.readouterr().err
        assert what in printed
        assert len(printed.strip().splitlines()) == 1


def test_a_missing_set_is_told_before_any_picture_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = write_set(tmp_path, "train", [Sample("t", record(1), [("png", encode(smooth(0, 64, 80)))])])
    monkeypatch.setattr(leakage, "perceptual_hash", lambda _: pytest.fail("a picture is read"))
    with pytest.raises(UserError, match="neither a data set nor"):
        leakage.compare(training, [training, tmp_path / "none"])


def stand_in(monkeypatch: pytest.MonkeyPatch, **sets: list[int]) -> None:
    """Data sets of pictures with these hashes; a picture's name is its set's and its place."""
    monkeypatch.setattr(leakage, "open_pictures", lambda path: path.name)
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
