"""The byte-level BPE tokenizer: training, loading, identity."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from mmoe import reading
from mmoe.errors import UserError
from mmoe.recipe.tokens import SPECIAL

LARGEST = 1 << 26
"""Bytes of a tokenizer's file."""
_PARTS = {
    "model": "BPE",
    "pre_tokenizer": "ByteLevel",
    "decoder": "ByteLevel",
    **dict.fromkeys(("normalizer", "post_processor", "truncation", "padding")),
}
"""What a tokenizer of ours is made of. Others can hold regular expressions that never end, texts that grow and padding
to any length."""
_PLAIN = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")
"""What its model has not: with dropout one text has other tokens each time, the rest change what a token is."""


def train_tokenizer(texts: Iterable[str], vocab_size: int = 1024) -> Tokenizer:
    """Train on texts, each counted as often as it occurs; the same texts give the same tokenizer.

    Every byte is in the vocabulary, so that any text has tokens. Specials come first (:mod:`mmoe.recipe.tokens`).
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def load_tokenizer(path: Path | str) -> Tokenizer:
    """Read a tokenizer.json; a special token's name inside a text is read as plain text.

    Raises:
        UserError: the file is missing, unreadable, no byte-level BPE, or does not number the specials 0 to 3.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError("no such tokenizer", str(path), "`mmoe data prepare` writes one beside the data sets")
    try:
        source = reading.text(path, LARGEST)
        parts = reading.json_object(source)
        tokenizer = Tokenizer.from_str(source)
    except Exception as error:  # tokenizers raises bare Exception for whatever is wrong with the file
        raise UserError(f"cannot read the tokenizer: {error}", str(path), "prepare the data again") from error
    model = parts.get("model")
    extra = {f"model.{name}": model.get(name) for name in _PLAIN} if isinstance(model, dict) else {}
    for name, kind in {**_PARTS, **dict.fromkeys(extra)}.items():
        found = {**parts, **extra}.get(name)
        if (found.get("type") if kind and isinstance(found, dict) else found) != kind:
            what = f"its {name} is not {kind or 'absent'}"
            raise UserError(f"no tokenizer of ours: {what}", str(path), "use a tokenizer made by `mmoe data prepare`")
    if set(tokenizer.get_vocab().values()) != set(range(tokenizer.get_vocab_size())):
        what = "its tokens are not numbered from 0 without gaps"
        raise UserError(f"no tokenizer of ours: {what}", str(path), "use a tokenizer made by `mmoe data prepare`")
    for number, token in enumerate(SPECIAL):
        if tokenizer.token_to_id(token) != number:
            raise UserError(f"{token} must be token {number}", str(path), "use a tokenizer made by `mmoe data prepare`")
    tokenizer.encode_special_tokens = True
    return tokenizer


def tokenizer_hash(path: Path | str) -> str:
    """Identity of a tokenizer: SHA-256 of its file, hexadecimal, as data sets record it.

    Raises:
        UserError: it cannot be read, or is larger than any tokenizer.
    """
    try:
        return hashlib.sha256(reading.content(Path(path), LARGEST)).hexdigest()
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the tokenizer: {error}", str(path), "prepare the data again") from None
