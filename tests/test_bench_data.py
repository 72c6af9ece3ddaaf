"""`mmoe bench data` on tiny files: that it runs and measures, not how fast."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks.loading import files, frozen
from mmoe import cli
from mmoe.models.multimodal import build_stages
from mmoe.parallel import engine
from mmoe.train import encode
from mmoe.train.step import Stepper

MISSING = "megatron-energon: not installed"
PEERS = ["raw DALI", "simplejpeg + OpenCV", "PIL"]


def test_every_row_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.json"
    # Its processes take ten seconds to start.
    monkeypatch.setitem(sys.modules, "megatron.energon", None)
    assert cli.main(["bench", "data", "--quick", "--skip", "webdataset", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())
    rows, features = rows[:-8], rows[-8:]
    # What the features take is counted, not timed: 2 × 2 cells of 32 channels in fp32 an image, and zarr's own.
    assert 2 * 2 * 32 * 4 / 1e3 < next(row["ours"] for row in features if row["name"].endswith("disk")) < 2
    assert all(row["ours"] > 0 for row in features)
    rows, rest = rows[:-3], rows[-3:]
    assert [(row["peer_name"], row["peer"], row["ratio"]) for row in rest] == [(MISSING, None, None)] * 3
    names = [f"data.{name}{which}" for name in ("dali", "simplejpeg", "pillow") for which in ("", ".processor")]
    assert [(row["name"], row["peer_name"]) for row in rows] == [(name, peer) for name in names for peer in PEERS]
    for row in rows:
        assert row["unit"] == ("images/CPU s" if row["name"].endswith("processor") else "images/s")
        assert row["ours"] > 0
        assert row["peer"] > 0
        assert row["ratio"] > 0
        assert row["met"] is None


def test_the_two_sides_of_the_cache_train_the_same(tmp_path: Path) -> None:
    """On the same pictures in the same order: from features the loss of a step is that from pixels."""
    found = files.write(tmp_path, 8, 32, 48)
    cache = tmp_path / "features"
    plain, cached = (frozen.recipe(found, quick=True, features=where) for where in (None, cache))
    engine.start(plain.parallel, 0, alone=True)
    models = build_stages(plain)
    encode.encode(plain, {frozen.ENCODER: models[0].encoders[frozen.ENCODER]}, cache)
    parts = encode.expected(cached, models)
    stepper, losses = Stepper(plain, models), []
    for of, features in ((plain, {}), (cached, parts)):
        with frozen.loader(of, features) as batches:
            batch = next(batches)
        assert (bool(batch["images"]), "features" in batch) == (of is plain, of is cached)
        losses.append(stepper.step(iter([batch]), 0.0).loss)
    # fp32's 2⁻²⁴ of a sum, a few times over, where a GEMM has other rows.
    assert losses[1] == pytest.approx(losses[0], rel=2e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--only", "nvjpeg"], "there is no 'nvjpeg'"),
        (["--skip", "ffcv"], "there is no 'ffcv'"),
        (["--sweep"], "unrecognized arguments: --sweep: see `mmoe bench data --help`"),
    ],
)
def test_what_it_does_not_have_is_refused(capsys: pytest.CaptureFixture[str], options: list[str], message: str) -> None:
    assert cli.main(["bench", "data", *options]) == 2
    assert message in capsys.readouterr().err
