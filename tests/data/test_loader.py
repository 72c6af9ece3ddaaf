"""The stream of micro-batches: the same at every layout and after a resume."""

import hashlib
import itertools
import json
import threading
from typing import Any

import numpy as np
import pytest
import torch
from sets import record, varied, write_mixture, write_set

from mmoe.data.loader import Loader
from mmoe.data.pack import WINDOW
from mmoe.data.pixels import SCALE, preprocess
from mmoe.data.shards import Sample
from mmoe.errors import UserError
from mmoe.recipe.schema import Data

SIZE, IMAGE_TOKENS, LENGTH = 16, 4, 128


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("root")
    write_set(root, "a", varied(60))
    write_set(root, "b", varied(14, seed=1))
    write_mixture(root, a=3, b=1)
    return root


def data(root, **changes: Any) -> Data:
    values = {"mixture": str(root / "mixture.toml"), "root": str(root)}
    return Data(**(values | {"sequence_length": LENGTH, "images_per_pack": 6} | changes))


def loader(root, **changes: Any) -> Loader:
    own = {name: changes.pop(name) for name in ("rank", "ranks", "state", "seed", "global_batch") if name in changes}
    options = {"micro_batch": 2, "global_batch": 8, "seed": 0} | own
    return Loader(data(root, **changes), image_tokens=IMAGE_TOKENS, image_sizes=(SIZE,), **options)


def take(source: Loader, count: int) -> list[dict]:
    return list(itertools.islice(source, count))


def assert_same(got: list[dict], want: list[dict]) -> None:
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            if name == "images":
                assert a[name].keys() == b[name].keys()
                assert all(torch.equal(pixels, b[name][size]) for size, pixels in a[name].items())
            elif isinstance(a[name], torch.Tensor):
                assert a[name].dtype == b[name].dtype
                assert torch.equal(a[name], b[name]), name
            else:
                assert a[name] == b[name], name


def test_a_batch_has_the_shapes_of_the_contract(root):
    with loader(root) as source:
        batch = next(source)
    shape, images = (2, LENGTH), int((batch["tokens"] == 3).sum()) // IMAGE_TOKENS
    batch |= {f"images of {size}": pixels for size, pixels in batch.pop("images").items()}
    assert {
        name: (tuple(batch[name].shape), batch[name].dtype) for name in batch if name not in ("samples", "skipped")
    } == {
        "tokens": (shape, torch.int64),
        "labels": (shape, torch.int64),
        "position": (shape, torch.int64),
        "loss_mask": (shape, torch.float32),
        "document": (shape, torch.int32),
        "branch": (shape, torch.int32),
        f"images of {SIZE}": ((images, 3, SIZE, SIZE), torch.float32),
        "original_sizes": ((images, 2), torch.int64),
    }
    assert [len(keys) for keys in batch["samples"]] == batch["document"].amax(1).tolist()
    assert batch["skipped"] == []


def test_images_stand_in_the_order_of_their_tokens(root):
    pictures = {sample.key: [image for _, image in sample.images] for sample in varied(60)}
    pictures = {f"a/{key}": images for key, images in pictures.items()}
    pictures |= {f"b/{sample.key}": [image for _, image in sample.images] for sample in varied(14, seed=1)}
    with loader(root) as source:
        for batch in take(source, 4):
            keys = [key for pack in batch["samples"] for key in pack]
            want = [preprocess(image, (SIZE,))[0][SIZE] for key in keys for image in pictures[key]]
            assert np.array_equal(batch["images"][SIZE].numpy(), np.stack(want))
            assert batch["original_sizes"].tolist() == [[16, 16]] * len(want)


@pytest.mark.parametrize("ranks", [2, 4])
def test_every_layout_sees_the_same_micro_batches(root, ranks):
    with loader(root) as source:
        whole = take(source, 12)
    parts = []
    for rank in range(ranks):
        with loader(root, rank=rank, ranks=ranks) as source:
            assert source.micro_batches == 4 // ranks
            parts.append(take(source, 12 // ranks))
    share = 4 // ranks
    union = [parts[rank][step * share + i] for step in range(3) for rank in range(ranks) for i in range(share)]
    assert_same(union, whole)


def test_another_seed_is_another_stream(root):
    with loader(root) as one, loader(root, seed=1) as other:
        assert next(one)["samples"] != next(other)["samples"]


def test_the_number_of_batches_ahead_and_of_threads_changes_nothing(root):
    with loader(root, prefetch=1) as one, loader(root, prefetch=7, workers=2) as other:
        assert_same(take(other, 9), take(one, 9))


@pytest.mark.parametrize("steps", [0, 1, 5, 23])
def test_resuming_goes_on_bit_for_bit(root, steps):
    with loader(root) as source:
        take(source, 4 * steps)
        state = source.state()
        rest = take(source, 16)
    with loader(root, state=state) as resumed:
        assert resumed.state() == state
        assert_same(take(resumed, 16), rest)


def test_a_state_is_small_json_and_the_same_on_every_rank_and_layout(root):
    with loader(root) as one, loader(root, rank=1, ranks=2) as half:
        take(one, 12)
        take(half, 6)
        assert one.state() == half.state()
        state = json.loads(json.dumps(one.state()))
        rest = take(one, 4)
    with loader(root, state=state, rank=1, ranks=2) as resumed:
        assert_same(take(resumed, 2), rest[2:])


@pytest.fixture(scope="module")
def mixed(root):
    """A mixture whose weights count epochs, of 15 of 60 samples and of 14, the first behind a system prompt."""
    path = root / "mixed.toml"
    parts = (
        '[[source]]\npath = "a"\ncap = 15\nsystem_prompt = "where is the pig ?"\n[[source]]\npath = "b"\nweight = 2\n'
    )
    path.write_text(f'weights = "epochs"\n{parts}')
    return str(path)


def test_capped_sources_come_whole_each_epoch_behind_their_system_prompts(root, mixed):
    seen: dict[str, list[str]] = {"a": [], "b": []}
    with loader(root, mixture=mixed) as source:
        planner, prompt = source._planner, source._tokenizer.encode("where is the pig ?")
        stream, numbers = planner.order.at(0, 4300)
        keys = [source._sources[s].key(n) for s, n in zip(stream.tolist(), numbers.tolist(), strict=True)]
        for batch in take(source, 40):
            assert batch["skipped"] == []
            for row, names in enumerate(batch["samples"]):
                for number, name in enumerate(names, 1):
                    seen[name[0]].append(name)
                    here = batch["document"][row] == number
                    begins = batch["tokens"][row][here][1 : 1 + len(prompt)].tolist() == prompt
                    assert begins == (name[0] == "a")
                    assert not batch["loss_mask"][row][here][: len(prompt)].any()
    assert len(seen["a"]) > 60
    # 15 samples of the one to twice 14 of the other in the stream: 4300 places hold 100 epochs and 200.
    assert [sum(key[0] == name for key in keys) for name in "ab"] == pytest.approx([1500, 2800], abs=2)
    drawn = [key for key in keys if key[0] == "a"]
    assert all(len(set(drawn[start : start + 15])) == 15 for start in range(0, 1485, 15))
    assert len(set(drawn)) == 60


def test_a_capped_stream_resumes_bit_for_bit_and_its_state_is_its_own(root, mixed, tmp_path):
    with loader(root, mixture=mixed) as source:
        take(source, 12)
        state = source.state()
        rest = take(source, 8)
    with loader(root, mixture=mixed, state=state, rank=0, ranks=1) as resumed:
        assert_same(take(resumed, 8), rest)
    text = (root / "mixed.toml").read_text()
    for change in (("cap = 15", "cap = 16"), ("pig ?", "pig !"), ("epochs", "samples")):
        other = tmp_path / "other.toml"
        other.write_text(text.replace(*change))
        with pytest.raises(UserError, match="other data"):
            loader(root, mixture=str(other), state=state)


def test_the_fingerprint_of_a_plain_mixture_is_that_of_its_order_and_lengths(root):
    """Digest by the definition of the first release: its states go on."""
    with loader(root) as source:
        order, lengths = source._planner.order, source._planner.lengths
        text = repr((("a", "b"), (60, 14), order.counts.tolist(), 0)) + repr((LENGTH, 6, IMAGE_TOKENS))
        digest = hashlib.sha256(text.encode())
        for part in lengths:
            digest.update(part.tokens.tobytes() + part.images.tobytes())
        assert source.state()["stream"] == digest.hexdigest()


def test_another_global_batch_goes_on_at_the_same_pack(root):
    with loader(root) as one:
        take(one, 4)
        state = one.state()
        want = take(one, 4)
    with loader(root, state=state, global_batch=4) as other:
        assert_same(take(other, 4), want)


def test_within_a_step_there_is_no_state(root):
    with loader(root) as source:
        next(source)
        with pytest.raises(RuntimeError, match="between steps"):
            source.state()


@pytest.mark.parametrize("change", [{"seed": 1}, {"sequence_length": 160}, {"images_per_pack": 5}])
def test_a_state_of_another_stream_is_refused(root, change):
    with loader(root) as source:
        state = source.state()
    with pytest.raises(UserError, match="other data"):
        loader(root, state=state, **change)


def test_a_state_of_data_with_other_lengths_is_refused(tmp_path):
    mixture = write_mixture(tmp_path, a=1)
    write_set(tmp_path, "a", varied(20))
    with loader(tmp_path, mixture=mixture) as source:
        state = source.state()
    write_set(tmp_path, "a", varied(20, seed=3))
    with pytest.raises(UserError, match="other data"):
        loader(tmp_path, mixture=mixture, state=state)


def test_a_sample_too_long_for_any_pack_is_named_once_an_epoch_also_after_a_resume(tmp_path):
    samples = [Sample(f"s{i}", record(0, "a text alone . " * (200 if i % 4 == 0 else 1)), []) for i in range(WINDOW)]
    write_set(tmp_path, "some", samples)
    mixture = write_mixture(tmp_path, some=1)
    with loader(tmp_path, mixture=mixture) as source:
        first = take(source, 8)
        state = source.state()
        rest = take(source, 60)
    with loader(tmp_path, mixture=mixture, state=state) as resumed:
        assert_same(take(resumed, 60), rest)
    seen = [key for batch in first + rest for pack in batch["samples"] for key in pack]
    named = [entry.split(":")[0] for batch in first + rest for entry in batch["skipped"]]
    assert len(seen) > WINDOW
    assert len(named) % (WINDOW // 4) == 0
    assert set(named) == {f"some/s{i}" for i in range(0, WINDOW, 4)}


def test_the_batch_must_divide(root):
    with pytest.raises(UserError, match="cannot be shared by 3 ranks"):
        loader(root, ranks=3)


def test_a_model_without_encoders_reads_text_alone(root, tmp_path):
    texts = [Sample(f"text-{i}", record(0, "a text alone . " * (i % 5)), []) for i in range(20)]
    write_set(tmp_path, "text", texts)
    mixture = write_mixture(tmp_path, text=1)
    with Loader(
        data(tmp_path, mixture=mixture, images_per_pack=0),
        image_tokens=0,
        image_sizes=(),
        micro_batch=1,
        global_batch=1,
        seed=0,
    ) as source:
        batch = next(source)
    assert batch["images"] == {}
    assert batch["original_sizes"].shape == (0, 2)
    assert batch["loss_mask"].any()
    with pytest.raises(UserError, match="no encoder"):
        Loader(data(root), image_tokens=0, image_sizes=(), micro_batch=1, global_batch=1, seed=0)


def test_another_tokenizer_is_refused(tmp_path):
    write_set(tmp_path, "a", varied(5))
    path = tmp_path / "tokenizer.json"
    path.write_text(path.read_text() + "\n")
    with pytest.raises(UserError, match="prepared with another tokenizer"):
        loader(tmp_path, mixture=write_mixture(tmp_path, a=1))


@pytest.mark.parametrize("decoder", ["dali", "simplejpeg", "pillow"])
def test_every_decoder_gives_every_size_in_the_same_stream(root, decoder):
    """Pictures of 16 × 16 at their own size are exact whatever decodes them; twice as large, within a step."""
    options = {"image_tokens": IMAGE_TOKENS, "micro_batch": 2, "global_batch": 8, "seed": 0}
    settings = data(root, decoder=decoder, workers=2, fit="crop")
    with Loader(settings, image_sizes=(2 * SIZE, SIZE), **options) as source, loader(root) as plain:
        for got, want in zip(take(source, 6), take(plain, 6), strict=True):
            assert list(got["images"]) == [2 * SIZE, SIZE]
            assert torch.equal(got["images"][SIZE], want["images"][SIZE])
            assert torch.equal(got["tokens"], want["tokens"])
            pictures = want["images"][SIZE]
            twice = torch.nn.functional.interpolate(pictures, scale_factor=2, mode="bilinear")
            torch.testing.assert_close(got["images"][2 * SIZE], twice, atol=1.01 / SCALE, rtol=0)


def test_what_was_read_before_a_defect_comes_out_before_it(root, monkeypatch):
    with loader(root) as source:
        want = take(source, 3)
    read, left = Loader._read, [sum(map(len, batch["samples"])) for batch in want]
    calls = itertools.count()

    def fails_later(self, slot):
        if next(calls) == sum(left):
            raise ZeroDivisionError("made up")
        return read(self, slot)

    monkeypatch.setattr(Loader, "_read", fails_later)
    with loader(root) as source:
        assert_same(take(source, 3), want)
        with pytest.raises(ZeroDivisionError):
            next(source)


def test_closing_ends_the_thread_and_the_stream(root):
    source = loader(root)
    next(source)
    source.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "mmoe-loader"]
    with pytest.raises(RuntimeError, match="closed"):
        next(source)


def test_a_defect_in_the_thread_reaches_the_trainer(root, monkeypatch):
    def fail(*_: Any) -> None:
        raise ZeroDivisionError("made up")

    monkeypatch.setattr("mmoe.data.loader.collate", fail)
    with loader(root) as source:
        for _ in range(2):
            with pytest.raises(ZeroDivisionError, match="made up"):
                next(source)
