"""Stamps: captions, classes, and a split that keeps variants together."""

import io
from pathlib import Path

import made_stamps
import pytest
from PIL import Image

from mmoe.data.index import read_index, read_sample
from mmoe.data.prepare import prepare_stamps
from mmoe.data.prepare.catalogue import Catalogue, Stamp, load_card, load_catalogue, original
from mmoe.data.prepare.stamps import CAPTION_BYTES, LONGEST_SIDE, StampMaker, parts, usable
from mmoe.data.shards import read_card
from mmoe.errors import UserError


@pytest.fixture
def catalogue(tmp_path: Path) -> Catalogue:
    return made_stamps.make_catalogue(tmp_path / "stamps")


def test_captions_are_read_in_the_languages_of_the_card(catalogue: Catalogue) -> None:
    bee = next(stamp for stamp in catalogue.stamps if stamp.path == "animals/bee1.png")
    assert bee.captions == {"en": "A bee.", "de": "Ein bee.", "ja": "しま"}
    assert (bee.category, bee.label) == ("animals", "bee")


def test_a_caption_that_is_not_utf8_is_skipped_and_named(catalogue: Catalogue) -> None:
    thing = next(stamp for stamp in catalogue.stamps if stamp.path == "things/thing0.png")
    assert thing.captions == {"en": "Thing 0."}
    assert catalogue.skipped == ("things/thing0.png: line 2 of thing0.txt is not UTF-8",)


def test_every_class_has_stamps_on_both_sides(catalogue: Catalogue) -> None:
    for label in made_stamps.LABELS:
        held_out = {original(stamp.path) for stamp in catalogue.members(label, held_out=True)}
        train = {original(stamp.path) for stamp in catalogue.members(label, held_out=False)}
        assert len(held_out) == 1
        assert len(train) == made_stamps.STAMPS_PER_LABEL - 1
        assert not held_out & train


def test_a_variant_goes_with_its_original_and_has_its_captions(catalogue: Catalogue) -> None:
    by_path = {stamp.path: stamp for stamp in catalogue.stamps}
    for stamp in catalogue.stamps:
        assert stamp.held_out == by_path[original(stamp.path)].held_out
    assert by_path["animals/ant0_mirror.png"].captions == by_path["animals/ant0.png"].captions
    assert by_path["animals/ant0_mirror.png"].label == "ant"


def test_stamps_of_no_class_are_split_by_their_own_hash(catalogue: Catalogue) -> None:
    """Adding stamps moves no other stamp to the other side."""
    before = {stamp.path: stamp.held_out for stamp in catalogue.stamps if not stamp.label}
    assert set(before.values()) == {True, False}
    made_stamps.draw(catalogue.root / "things" / "more.png", (40, 40), (1, 2, 3))
    after = {stamp.path: stamp.held_out for stamp in load_catalogue(catalogue.root, catalogue.card).stamps}
    assert before.items() <= after.items()


def test_a_class_that_cannot_be_split_is_the_users_error(catalogue: Catalogue) -> None:
    for number in range(1, made_stamps.STAMPS_PER_LABEL):
        (catalogue.root / "animals" / f"hen{number}.png").unlink()
    with pytest.raises(UserError, match="'hen' has fewer than two stamps"):
        load_catalogue(catalogue.root, catalogue.card)


def test_unusable_stamps_are_named_on_their_own_side(catalogue: Catalogue) -> None:
    reasons = {}
    for held_out in (False, True):
        good, skipped = usable(catalogue, held_out=held_out)
        assert all(stamp.held_out == held_out for stamp in good)
        reasons.update(line.split(": ", 1) for line in skipped)
    assert reasons["things/thing1.png"] == "no caption"
    assert reasons["things/thing2.png"] == "fully transparent"
    assert "cannot identify image file" in reasons["things/thing3.png"]


def test_stamps_become_samples(catalogue: Catalogue, tmp_path: Path) -> None:
    root = tmp_path / "root"
    prepare_stamps(catalogue, root, workers=1)
    paths = set()
    for split in ("train", "heldout"):
        path = root / "stamps" / split
        index = read_index(path)
        for number in range(len(index["key"])):
            sample = read_sample(path, index, number)
            assert len(sample.images) == 1
            assert sample.record["license"] == "CC0-1.0"
            assert sample.record["category"] in ("animals", "things")
            paths.add(sample.record["truth"]["stamp"])
    listed = {stamp.path for stamp in catalogue.stamps}
    assert paths == listed - {"things/thing1.png", "things/thing2.png", "things/thing3.png"}
    skipped = [line for split in ("train", "heldout") for line in read_card(root / "stamps" / split)["skipped"]]
    assert len(skipped) == len(set(skipped)) == 4


def test_a_stamp_is_cut_bounded_and_put_on_white(catalogue: Catalogue) -> None:
    stamp = next(stamp for stamp in catalogue.stamps if stamp.path == "things/thing4.png")
    sample = StampMaker(catalogue.root, (stamp,), "CC0-1.0")(0)
    with Image.open(io.BytesIO(sample.images[0][1])) as image:
        assert max(image.size) == LONGEST_SIDE
        assert image.mode == "RGB"
        assert image.getpixel((0, 0)) == (255, 255, 255)
        assert image.getpixel((image.width // 2, image.height // 2)) == (90, 60, 30)


def test_long_captions_are_shared_out_among_samples() -> None:
    captions = {"en": "e" * 200, "de": "d" * 100, "fr": "f", "ja": "し" * 120, "zh_CN": "z" * 10}
    shared = parts(Stamp("a.png", "", captions, "", False))
    assert [list(part.captions) for part in shared] == [["en", "de"], ["fr"], ["ja"], ["zh_CN"]]
    assert {language: text for part in shared for language, text in part.captions.items()} == captions
    assert CAPTION_BYTES == 300


def test_the_shipped_card_names_eight_classes() -> None:
    card = load_card()
    names = [entry["name"] for entry in card["class"]]
    assert len(names) == len(set(names)) == 8
    assert len(card["package"]["sha256"]) == 64
