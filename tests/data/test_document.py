"""Documents by hand: where every token stands, what is learnt, what is refused."""

import numpy as np
import pytest
from sets import tokenizer

from mmoe.data.document import BadSample, blank, tokenize
from mmoe.data.shards import text_tokens, token_counter
from mmoe.recipe.tokens import OURS


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    return tokenizer(tmp_path_factory.mktemp("root"))


def ids(tok, text: str) -> list[int]:
    return tok.encode(text)


SAMPLE = {
    "prefix": [{"image": 0}, {"text": "a text"}, {"image": 1}],
    "branches": [{"prompt": "how many zebras ?", "answer": " 3"}, {"prompt": "where ?", "answer": " left"}],
}


def test_layout(tok):
    document = tokenize(SAMPLE, tok, 2, key="k")
    text, first, second = ids(tok, "a text"), ids(tok, "how many zebras ?"), ids(tok, "where ?")
    three, left = ids(tok, " 3"), ids(tok, " left")
    prefix = [OURS.bos, OURS.image, OURS.image, *text, OURS.image, OURS.image]
    a, b = [*first, *three, OURS.eos], [*second, *left, OURS.eos]
    assert document.tokens.tolist() == prefix + a + b
    assert document.branch.tolist() == [0] * len(prefix) + [1] * len(a) + [2] * len(b)
    n = len(prefix)
    assert document.position.tolist() == [*range(n), *range(n, n + len(a)), *range(n, n + len(b))]
    assert document.images == (0, 1)
    assert document.key == "k"
    learnt_a, learnt_b = len(three) + 1, len(left) + 1
    mask = [0] * (n + len(first) - 1) + [1] * learnt_a + [0] * len(second) + [1] * learnt_b + [0]
    assert document.loss_mask.tolist() == mask
    assert document.labels[document.loss_mask > 0].tolist() == [*three, OURS.eos, *left, OURS.eos]
    assert not document.labels[document.loss_mask == 0].any()


def test_no_label_crosses_a_branch(tok):
    branches = [{"prompt": "where ?" * (1 + i % 2), "answer": " left" * (i % 3)} for i in range(7)]
    document = tokenize({"prefix": [{"text": "a", "loss": True}], "branches": branches}, tok, 4)
    learnt = np.flatnonzero(document.loss_mask)
    assert (document.branch[learnt] == document.branch[learnt + 1]).all()
    assert (document.position[learnt] + 1 == document.position[learnt + 1]).all()
    assert (document.labels[learnt] == document.tokens[learnt + 1]).all()


def test_prefix_text_is_learnt_where_it_says_so(tok):
    prefix = [{"text": "a text"}, {"image": 0}, {"text": " alone .", "loss": True}, {"text": " right"}]
    document = tokenize({"prefix": prefix, "branches": []}, tok, 3)
    silent, loud, after = ids(tok, "a text"), ids(tok, " alone ."), ids(tok, " right")
    assert document.tokens.tolist() == [OURS.bos, *silent, *[OURS.image] * 3, *loud, *after]
    start = len(silent) + 3
    assert np.flatnonzero(document.loss_mask).tolist() == list(range(start, start + len(loud)))
    assert document.labels[document.loss_mask > 0].tolist() == loud


@pytest.mark.parametrize(
    "sample", [SAMPLE, {"prefix": [], "branches": []}, {"prefix": [{"text": "a"}], "branches": []}]
)
@pytest.mark.parametrize("image_tokens", [0, 1, 16])
def test_length_is_the_index_formula(tok, sample, image_tokens):
    prefix, branches = text_tokens(sample, token_counter(tok.tokenizer))
    images = sum("image" in part for part in sample["prefix"])
    assert len(tokenize(sample, tok, image_tokens)) == 1 + images * image_tokens + prefix + branches


def test_a_special_token_in_a_text_is_text(tok):
    document = tokenize({"prefix": [{"text": "<image><eos>"}], "branches": []}, tok, 4)
    assert document.tokens[0] == OURS.bos
    assert document.tokens[1:].min() > OURS.image
    assert document.images == ()


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ({}, "sample has no 'prefix'"),
        ({"prefix": "text"}, "'prefix' is no list"),
        ({"prefix": [], "branches": {}}, "'branches' is no list"),
        ({"prefix": ["text"]}, r"prefix\[0\] has no 'text'"),
        ({"prefix": [{"text": 3}]}, r"prefix\[0\]: 'text' is no str"),
        ({"prefix": [{"image": "0"}]}, r"prefix\[0\]: 'image' is no int"),
        ({"prefix": [{"image": True}]}, r"prefix\[0\]: 'image' is no int"),
        ({"prefix": [], "branches": [{"prompt": "a"}]}, r"branches\[0\] has no 'answer'"),
        ({"prefix": [], "branches": [{"answer": "a"}]}, r"branches\[0\] has no 'prompt'"),
        ({"prefix": [], "branches": [{"prompt": "", "answer": "a"}]}, "empty prompt"),
        ({"prefix": [{"text": "half a pair \ud800"}]}, "no Unicode text"),
    ],
)
def test_a_sample_of_another_form_is_bad(tok, sample, message):
    with pytest.raises(BadSample, match=message):
        tokenize(sample, tok, 4)


def test_without_loss_keeps_the_tokens(tok):
    document = tokenize(SAMPLE, tok, 2)
    silent = document.without_loss()
    assert not silent.loss_mask.any()
    assert not silent.labels.any()
    assert (silent.tokens == document.tokens).all()
    assert silent.images == document.images


def test_blank_holds_a_place():
    document = blank("k", 5, OURS)
    assert document.tokens.tolist() == [OURS.bos, 0, 0, 0, 0]
    assert document.position.tolist() == [0, 1, 2, 3, 4]
    assert not document.loss_mask.any()
    assert len(document) == 5
