"""The stream is whole in spite of bad samples."""

import re

import pytest
import torch
from pictures import bad_images, encode, picture
from sets import record, varied, write_mixture, write_set
from test_loader import IMAGE_TOKENS, SIZE, loader, take
from test_source import overwrite

from mmoe.data.shards import Sample
from mmoe.errors import UserError


def spoil(root) -> dict[str, str]:
    """Writes the data set "bad", with one sample of each kind of damage; returns each one's key and the reason."""
    samples = varied(40, seed=2)
    reasons = {}
    for i, (image, message) in enumerate(bad_images().values()):
        samples[2 * i] = Sample(f"image-{i}", record(2), [("png", encode(picture(i))), ("jpg", image)])
        reasons[f"bad/image-{i}"] = f"image 1: .*{message}"
    samples[30] = Sample("parts", record(2), [("png", encode(picture(0)))])
    reasons["bad/parts"] = "image 1 is named but not there"
    samples[31] = Sample("pair", record(0, "x" * 20), [])
    reasons["bad/pair"] = "no Unicode"
    samples[32] = Sample("bytes", record(0, "x" * 20), [])
    reasons["bad/bytes"] = "not UTF-8"
    samples[33] = Sample("form", record(0, "x" * 20), [])
    reasons["bad/form"] = "no 'prefix'"
    samples[34] = Sample("stale", record(0, "x" * 20), [])
    reasons["bad/stale"] = "but the index says"
    samples[35] = Sample("long", record(0, "a text alone . " * 200), [])
    reasons["bad/long"] = "fit in no pack"
    path = write_set(root, "bad", samples)
    overwrite(path, 31, "json", b'{"prefix": [{"text": "\\ud800"}], "branches": []}')
    overwrite(path, 32, "json", b'{"prefix": [{"text": "\xe9"}]}')
    overwrite(path, 33, "json", b"{}")
    overwrite(path, 34, "json", b'{"prefix": [{"text": "short"}], "branches": []}')
    return reasons


def test_bad_samples_keep_their_slots_masked_and_named(tmp_path):
    reasons = spoil(tmp_path)
    mixture = write_mixture(tmp_path, bad=1)
    seen: dict[str, str] = {}
    with loader(tmp_path, mixture=mixture) as source:
        batches = take(source, 40)
        assert source.skipped == sum(len(batch["skipped"]) for batch in batches)
    good_loss = 0
    for batch in batches:
        named = dict(entry.split(": ", 1) for entry in batch["skipped"])
        seen |= named
        run = 0
        for row, keys in enumerate(batch["samples"]):
            for number, key in enumerate(keys, 1):
                here = batch["document"][row] == number
                count = int((batch["tokens"][row][here] == 3).sum()) // IMAGE_TOKENS
                pixels = batch["images"][SIZE][run : run + count]
                run += count
                assert (key in named) == (key in reasons)
                if key in reasons:
                    assert not batch["loss_mask"][row][here].any()
                    assert not pixels.any()
                    assert count == (2 if "image-" in key else 0)
                else:
                    good_loss += int(batch["loss_mask"][row][here].sum())
                    assert all(picture.any() for picture in pixels)
        assert run == len(batch["images"][SIZE])
    assert good_loss > 0
    assert seen.keys() == reasons.keys()
    for key, reason in reasons.items():
        assert re.search(reason, seen[key]), (key, seen[key])


def test_good_samples_are_the_same_beside_bad_ones(tmp_path):
    samples = varied(20)
    write_set(tmp_path, "one", samples)
    mixture = write_mixture(tmp_path, one=1)
    with loader(tmp_path, mixture=mixture) as source:
        want = take(source, 8)
    first = next(i for i, sample in enumerate(samples) if sample.images)
    overwrite(tmp_path / "one", first, "image", b"GIF89a")
    key = f"one/{samples[first].key}"
    with loader(tmp_path, mixture=mixture) as source:
        for got, whole in zip(take(source, 8), want, strict=True):
            assert torch.equal(got["tokens"], whole["tokens"])
            for row, keys in enumerate(got["samples"]):
                for number, name in enumerate(keys, 1):
                    here = got["document"][row] == number
                    if name != key:
                        assert torch.equal(got["loss_mask"][row][here], whole["loss_mask"][row][here])
                    else:
                        assert not got["loss_mask"][row][here].any()


def test_too_many_bad_samples_in_a_row_stop_the_run(tmp_path):
    samples = varied(20)
    write_set(tmp_path, "gone", samples)
    for shard in (tmp_path / "gone").glob("*.tar"):
        shard.write_bytes(b"")
    with (
        loader(tmp_path, mixture=write_mixture(tmp_path, gone=1), max_bad_in_a_row=30) as source,
        pytest.raises(UserError, match=r"30 bad samples one after another, the last: gone/sample-.* is truncated"),
    ):
        take(source, 100)


def test_bad_samples_with_good_ones_between_do_not_stop_the_run(tmp_path):
    write_set(tmp_path, "half", varied(20))
    (tmp_path / "half" / "shard-000001.tar").write_bytes(b"")
    with loader(tmp_path, mixture=write_mixture(tmp_path, half=1), max_bad_in_a_row=30) as source:
        take(source, 100)
        assert source.skipped > 100
