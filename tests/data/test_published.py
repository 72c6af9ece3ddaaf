"""Published models' tokenizers: read as transformers reads them, and a document's special tokens where they are."""

import json
import re
from pathlib import Path

import pytest
from tokenizer_kinds import KINDS
from tokenizers import AddedToken, Regex, Tokenizer, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mmoe.data.document import BadSample, tokenize
from mmoe.data.tokenizer import Vocabulary, load_tokenizer, same_tokens
from mmoe.errors import UserError
from mmoe.recipe.model import Special
from mmoe.recipe.tokens import OURS

TEXTS = ["how many zebras ?", " 12", "Ωλ 斑马 🦓\n\t", "", " two  spaces ", "<s> and </s><|end_of_text|> are text"]
RECORD = {
    "prefix": [{"text": "look :"}, {"image": 0}],
    "branches": [{"prompt": "how many zebras ?", "answer": " 12"}],
}


@pytest.mark.parametrize("kind", KINDS)
def test_texts_are_read_as_by_transformers(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "tokenizer.json"
    mine = load_tokenizer(path, KINDS[kind](path))
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(path))
    for text in TEXTS:
        ids = mine.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert mine.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        # A blank in front is the one that it would have put there.
        assert mine.decode(ids) == (text.removeprefix(" ") if kind == "metaspace" else text)


@pytest.mark.parametrize("kind", KINDS)
def test_no_text_is_read_as_a_special_token(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "tokenizer.json"
    special = KINDS[kind](path)
    names = Tokenizer.from_file(str(path)).get_added_tokens_decoder()
    ids = load_tokenizer(path, special).encode(" ".join(token.content for token in names.values()))
    assert not set(ids) & {*names, special.image}


@pytest.mark.parametrize("kind", KINDS)
def test_a_document_has_the_models_special_tokens(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "tokenizer.json"
    special = KINDS[kind](path)
    tokenizer = load_tokenizer(path, special)
    document = tokenize(RECORD, tokenizer, 2)
    look, how, many = (tokenizer.encode(text) for text in ("look :", "how many zebras ?", " 12"))
    wanted = [special.bos, *look, special.image, special.image, *how, *many, special.eos]
    assert document.tokens.tolist() == wanted
    assert document.labels[document.loss_mask > 0].tolist() == [*many, special.eos]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["pad", "bos", "eos", "image"])
def test_an_ordinary_token_is_no_special_one(tmp_path: Path, kind: str, name: str) -> None:
    path = tmp_path / "tokenizer.json"
    special = KINDS[kind](path)
    known = Tokenizer.from_file(str(path))
    ordinary = known.token_to_id("a")
    wrong = Special(**{**vars(special), name: ordinary})
    message = re.escape(f"token {ordinary}, 'a', is no special one, but model.special.{name}")
    with pytest.raises(UserError, match=message) as caught:
        load_tokenizer(path, wrong)
    number, token = next(iter(known.get_added_tokens_decoder().items()))
    assert f"{number} {token.content}" in caught.value.fix


def test_a_token_that_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    special = KINDS["tiktoken"](path)
    for name in ("eos", "image"):
        with pytest.raises(UserError, match=rf"it has no token 9999, but model\.special\.{name}"):
            load_tokenizer(path, Special(**{**vars(special), name: 9999}))


def change(path: Path, **parts: object) -> Path:
    path.write_text(json.dumps(json.loads(path.read_text()) | parts))
    return path


def test_bytes_without_a_token_are_told(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    special = KINDS["sentencepiece"](path)
    model = json.loads(path.read_text())["model"]
    with pytest.raises(UserError, match="no ByteLevel, its model no byte_fallback"):
        load_tokenizer(change(path, model=model | {"byte_fallback": False}), special)
    names = {("<0xZZ>" if name == "<0x41>" else name): number for name, number in model["vocab"].items()}
    with pytest.raises(UserError, match="1 have no token, as '<0x41>'"):
        load_tokenizer(change(path, model=model | {"vocab": names}), special)


def test_texts_that_would_grow_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    special = KINDS["sentencepiece"](path)
    grows = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1000}
    with pytest.raises(UserError, match="its normalizer makes 1000 characters of one"):
        load_tokenizer(change(path, normalizer={"type": "Sequence", "normalizers": [grows]}), special)
    twice = grows | {"content": "aa"}
    assert load_tokenizer(change(path, normalizer={"type": "Sequence", "normalizers": [twice] * 3}), special)
    with pytest.raises(UserError, match="its normalizer makes 16 characters of one"):
        load_tokenizer(change(path, normalizer={"type": "Sequence", "normalizers": [twice] * 4}), special)


def test_a_pattern_that_repeats_a_group_is_refused(tmp_path: Path) -> None:
    """It can take time without end; a bracket that is text, or a choice, can stand any number of times."""
    path = tmp_path / "tokenizer.json"
    special = KINDS["tiktoken"](path)
    words = json.loads(path.read_text())["pre_tokenizer"]
    for expression, refused in ((r"(a+)+$", True), (r"(?:a|aa){2,}", True), (r"\)+|[()]*|(?:'s|'t)?x+", False)):
        parts = [words["pretokenizers"][0] | {"pattern": {"Regex": expression}}, words["pretokenizers"][1]]
        change(path, pre_tokenizer=words | {"pretokenizers": parts})
        if refused:
            with pytest.raises(UserError, match="its pre_tokenizer has a pattern that repeats a group"):
                load_tokenizer(path, special)
        else:
            assert load_tokenizer(path, special).encode("a frog")


def test_a_pattern_that_does_not_end_spoils_its_sample_alone(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    special = KINDS["tiktoken"](path)
    slow = Tokenizer.from_file(str(path))
    bytewise = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    slow.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r"(a+)+$"), "isolated"), bytewise])
    tokenizer = Vocabulary(slow, special)
    assert tokenizer.encode("a frog")
    with pytest.raises(BadSample, match=r"branches\[0\]: the tokenizer gives up on it"):
        tokenize({"prefix": [], "branches": [{"prompt": "a" * 40 + "b", "answer": "a"}]}, tokenizer, 1)


def test_whether_two_read_alike(tmp_path: Path) -> None:
    one, other = tmp_path / "one.json", tmp_path / "other.json"
    KINDS["tiktoken"](one)
    more = Tokenizer.from_file(str(one))
    more.add_special_tokens(["<image>"])
    more.post_processor = None
    more.save(str(other))
    assert same_tokens(one, other)
    more.add_tokens([AddedToken("frog", special=False)])
    more.save(str(other))
    assert not same_tokens(one, other), "a text with a frog is read otherwise"
    KINDS["sentencepiece"](other)
    assert not same_tokens(one, other)


def test_ours_is_where_nothing_else_is_said(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    KINDS["tiktoken"](path)
    with pytest.raises(UserError, match=r"token 0, '!', is no special one, but model\.special\.pad"):
        load_tokenizer(path)
    assert Special(pad=0, bos=1, eos=2, image=3) == OURS


def test_a_model_of_text_needs_no_token_for_images(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    special = KINDS["tiktoken"](path)
    ordinary = Special(**{**vars(special), "image": 3})
    with pytest.raises(UserError, match=r"model\.special\.image"):
        load_tokenizer(path, ordinary)
    assert load_tokenizer(path, ordinary, images=False).encode("a frog")
