"""The byte-level tokenizer."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer, processors

from mmoe.data.tokenizer import load_tokenizer, tokenizer_hash, train_tokenizer
from mmoe.errors import UserError
from mmoe.recipe.tokens import OURS, SPECIAL

TEXTS = ["how many zebras ?", "how many pigs ?", " Ein Zebra.", "しまうま"] * 20


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "tokenizer.json"
    train_tokenizer(TEXTS, 320).save(str(path))
    return path


def test_any_text_comes_back(saved: Path) -> None:
    tokenizer = load_tokenizer(saved)
    for text in ("how many zebras ?", " 3", "Ωλ 斑马 🦓\n\t", "", " two  spaces "):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_frequent_words_are_one_token(saved: Path) -> None:
    assert len(load_tokenizer(saved).encode("how many zebras ?")) == 4


def test_specials_have_their_numbers(saved: Path) -> None:
    tokenizer = load_tokenizer(saved)
    numbers = [OURS.pad, OURS.bos, OURS.eos, OURS.image]
    assert [tokenizer.tokenizer.token_to_id(token) for token in SPECIAL] == numbers == [0, 1, 2, 3]
    assert tokenizer.size <= 320


def test_text_cannot_hold_a_special_token(saved: Path) -> None:
    tokenizer = load_tokenizer(saved)
    ids = tokenizer.encode("a <image> and <eos><pad>")
    assert not set(ids) & {OURS.pad, OURS.bos, OURS.eos, OURS.image}
    assert tokenizer.decode(ids) == "a <image> and <eos><pad>"


def test_the_same_texts_give_the_same_tokenizer(saved: Path, tmp_path: Path) -> None:
    again, other = tmp_path / "again.json", tmp_path / "other.json"
    train_tokenizer(iter(TEXTS), 320).save(str(again))
    train_tokenizer([*TEXTS, " a penguin"] * 2, 320).save(str(other))
    assert tokenizer_hash(again) == tokenizer_hash(saved)
    assert tokenizer_hash(other) != tokenizer_hash(saved)


def test_a_file_larger_than_any_has_no_hash(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmoe.data.tokenizer.LARGEST", 100)
    with pytest.raises(UserError, match="more than 100 bytes"):
        tokenizer_hash(saved)


def test_bad_files_are_the_users_errors(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such tokenizer"):
        load_tokenizer(tmp_path / "none.json")
    broken = tmp_path / "broken.json"
    broken.write_text(saved.read_text()[:100])
    with pytest.raises(UserError, match="cannot read the tokenizer"):
        load_tokenizer(broken)


def test_what_a_tokenizer_puts_around_a_text_is_left_out(saved: Path, tmp_path: Path) -> None:
    around = Tokenizer.from_file(str(saved))
    around.post_processor = processors.BertProcessing(("<eos>", 2), ("<bos>", 1))
    around.save(str(tmp_path / "around.json"))
    assert around.encode("how many").ids[0] == 1
    assert load_tokenizer(tmp_path / "around.json").encode("how many") == load_tokenizer(saved).encode("how many")
