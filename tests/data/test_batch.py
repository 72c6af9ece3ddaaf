"""Documents with images → batches, in the order in which they come."""

import pytest
import torch
from pictures import encode, picture
from sets import record, tokenizer

from mmoe.data.batch import Illustrated, batches_from_documents, collate, illustrate, pictures, to_device
from mmoe.data.decoders import View
from mmoe.data.decoders.threads import ThreadDecoder
from mmoe.data.document import BadSample, blank
from mmoe.data.source import Encoded
from mmoe.errors import UserError
from mmoe.recipe.tokens import OURS

SIZE, IMAGE_TOKENS = 8, 2


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    return tokenizer(tmp_path_factory.mktemp("root"))


@pytest.fixture(scope="module")
def decoder():
    return ThreadDecoder(View((SIZE, 2 * SIZE)), 1, "pillow")


def item(tok, key: str, images: int, **changes) -> Illustrated:
    encoded = tuple(encode(picture(i + len(key), SIZE, SIZE)) for i in range(images))
    return illustrate(Encoded(record=record(images, **changes), images=encoded), tok, IMAGE_TOKENS, key)


def test_images_follow_the_documents(tok, decoder):
    one, two = item(tok, "one", 1), item(tok, "three", 3)
    packs = [[one, item(tok, "none", 0)], [two]]
    batch, problems = collate(packs, 128, decoder(pictures(packs)))
    assert batch["samples"] == [["one", "none"], ["three"]]
    assert problems == ["", "", ""]
    want, sizes, _ = decoder([*one.images, *two.images])
    assert batch["images"].keys() == {SIZE, 2 * SIZE}
    assert all(torch.equal(batch["images"][size], want[size]) for size in want)
    assert torch.equal(batch["original_sizes"], sizes)


def test_a_prefix_may_take_its_images_in_any_order(tok, decoder):
    first, second = (encode(picture(i, SIZE, SIZE)) for i in range(2))
    swapped = {"prefix": [{"image": 1}, {"text": "a"}, {"image": 0}], "branches": []}
    made = illustrate(Encoded(record=swapped, images=(first, second)), tok, IMAGE_TOKENS, "k")
    batch, _ = collate([[made]], 32, decoder(pictures([[made]])))
    assert torch.equal(batch["images"][SIZE], decoder([second, first]).images[SIZE])


@pytest.mark.parametrize("shown", [[0, 0], [1, 0, 1]])
def test_an_image_that_is_shown_twice_makes_a_bad_sample(tok, shown):
    images = tuple(encode(picture(i, SIZE, SIZE)) for i in range(2))
    twice = {"prefix": [{"image": i} for i in shown], "branches": []}
    with pytest.raises(BadSample, match="shows an image twice"):
        illustrate(Encoded(record=twice, images=images), tok, IMAGE_TOKENS, "k")


def test_one_bad_image_blanks_all_of_its_document_and_nothing_else(tok, decoder):
    good, bad = item(tok, "good", 2), item(tok, "bad", 3)
    bad = Illustrated(document=bad.document, images=(bad.images[0], b"", bad.images[2]))
    unread = Illustrated(document=blank("unread", 5, OURS), problem="it is gone")
    packs = [[good, bad], [unread]]
    batch, problems = collate(packs, 128, decoder(pictures(packs)))
    assert problems == ["", "image 1: empty image", "it is gone"]
    assert batch["skipped"] == ["bad: image 1: empty image", "unread: it is gone"]
    for pixels in batch["images"].values():
        assert pixels[:2].any(dim=(1, 2, 3)).all()
        assert not pixels[2:].any()
    first, second = batch["document"][0] == 1, batch["document"][0] == 2
    assert torch.equal(batch["loss_mask"][0][first], torch.from_numpy(good.document.loss_mask))
    assert not batch["loss_mask"][0][second].any()
    assert torch.equal(batch["tokens"][0][second], torch.from_numpy(bad.document.tokens))


def test_every_tensor_of_a_batch_changes_its_device(tok, decoder):
    packs = [[item(tok, "one", 1)]]
    batch, _ = collate(packs, 64, decoder(pictures(packs)))
    moved = to_device(batch, torch.device("meta"))
    tensors = [value for value in (*moved.values(), *moved["images"].values()) if isinstance(value, torch.Tensor)]
    assert len(tensors) == 9
    assert all(tensor.is_meta for tensor in tensors)
    assert moved["samples"] == [["one"]]


def test_a_named_image_that_is_not_there_is_bad(tok):
    with pytest.raises(BadSample, match="image 1 is named but not there, of 1"):
        illustrate(Encoded(record=record(2), images=(b"",)), tok, IMAGE_TOKENS, "k")
    with pytest.raises(BadSample, match="image -1"):
        illustrate(Encoded(record={"prefix": [{"image": -1}]}, images=(b"",)), tok, IMAGE_TOKENS, "k")


def test_documents_are_packed_in_their_order(tok, decoder):
    items = [item(tok, f"k{i}", i % 3) for i in range(23)]
    batches = list(batches_from_documents(items, decoder=decoder, sequence_length=100, packs=2, images_per_pack=3))
    assert [key for batch in batches for pack in batch["samples"] for key in pack] == [f"k{i}" for i in range(23)]
    assert [len(batch["samples"]) for batch in batches[:-1]] == [2] * (len(batches) - 1)
    images = {entry.document.key: len(entry.images) for entry in items}
    for batch in batches:
        assert batch["tokens"].shape == (len(batch["samples"]), 100)
        assert all(sum(images[key] for key in pack) <= 3 for pack in batch["samples"])


def test_no_documents_give_no_batches(decoder):
    assert not list(batches_from_documents([], decoder=decoder, sequence_length=9, packs=2, images_per_pack=3))


@pytest.mark.parametrize(
    "bounds", [{"sequence_length": 10, "images_per_pack": 3}, {"sequence_length": 99, "images_per_pack": 0}]
)
def test_a_document_that_fits_in_no_pack_is_refused(tok, decoder, bounds):
    with pytest.raises(UserError, match=f"a pack holds {bounds['sequence_length']} and {bounds['images_per_pack']}"):
        list(batches_from_documents([item(tok, "k", 1)], decoder=decoder, packs=1, **bounds))
