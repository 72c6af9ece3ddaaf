"""Tokenizers: training one, loading it or a published one, identity."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from mmoe import reading
from mmoe.errors import UserError
from mmoe.recipe.model import Special
from mmoe.recipe.tokens import OURS, SPECIAL

LARGEST = 1 << 26
"""Bytes of a tokenizer's file."""
_PARTS = {
    "normalizer": ("NFC", "Prepend", "Replace"),
    "pre_tokenizer": ("ByteLevel", "Digits", "Metaspace", "Split"),
    "decoder": ("ByteFallback", "ByteLevel", "Fuse", "Metaspace", "Replace", "Strip"),
}
"""What a byte-level BPE may be made of, alone or in a sequence: ours, GPT-2's and Llama 3's kind, and those that were
SentencePiece models (Llama 2, Vicuna, Yi)."""
_ABSENT = ("truncation", "padding")
_PLAIN = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
"""What its model has not: with dropout one text has other tokens each time, the rest change what a token is."""
_LONGEST = 8
"""Characters that all parts of a normalizer, or of a decoder, may put in the place of one together."""
_REPEATED_GROUP = re.compile(r"(?<!\\)\)[*+{]")
"""A group that may come any number of times, in which others may: such patterns can take time without end."""
_PREPARE = "take the one that `mmoe data prepare` writes, or the published model's own"


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer with the numbers of the special tokens that no text is read as."""

    tokenizer: Tokenizer
    special: Special

    @property
    def size(self) -> int:
        return self.tokenizer.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """See :func:`encode`."""
        return encode(self.tokenizer, text)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of ``tokens``, special ones left out."""
        return self.tokenizer.decode(tokens)


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


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """The tokens of ``text`` alone, none of them special; the name of one inside it is plain text.

    Raises:
        ValueError, TypeError: it is no Unicode text, or the tokenizer's own pattern gives up on it.
    """
    try:
        return tokenizer.encode(text, add_special_tokens=False).ids
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # tokenizers' own, which no module exports
            raise
        raise ValueError(f"the tokenizer gives up on it: {error}") from None


def read_tokenizer(path: Path | str) -> Tokenizer:
    """Read a tokenizer.json that any text has tokens in: a byte-level BPE, or one that falls back on bytes.

    A special token's name inside a text is read as plain text, and nothing is put around a text.

    Raises:
        UserError: the file is missing, unreadable, or none of these.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError("no such tokenizer", str(path), "`mmoe data prepare` writes one beside the data sets")
    try:
        source = reading.text(path, LARGEST)
        parts = reading.json_object(source)
        tokenizer = Tokenizer.from_str(source)
    except Exception as error:  # tokenizers raises bare Exception for whatever is wrong with the file
        raise UserError(f"cannot read the tokenizer: {error}", str(path), _PREPARE) from error
    for what in _strange(parts):
        raise UserError(f"no tokenizer to train with: {what}", str(path), _PREPARE)
    if set(tokenizer.get_vocab().values()) != set(range(tokenizer.get_vocab_size())):
        what = "its tokens are not numbered from 0 without gaps"
        raise UserError(f"no tokenizer to train with: {what}", str(path), _PREPARE)
    tokenizer.post_processor = None  # puts special tokens around a text; a document has its own
    tokenizer.encode_special_tokens = True
    return tokenizer


def load_tokenizer(path: Path | str, special: Special = OURS, *, images: bool = True) -> Vocabulary:
    """:func:`read_tokenizer`, with special tokens where a recipe's ``model.special`` says.

    Args:
        path: of a ``tokenizer.json``.
        special: the numbers.
        images: the model reads images; else that of their token does not count.

    Raises:
        UserError: see there; or one of ``special`` is a token that texts are read as.
    """
    tokenizer = read_tokenizer(path)
    known = {number: token for number, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    for name in ("pad", "bos", "eos", "image")[: None if images else 3]:
        number, size = getattr(special, name), tokenizer.get_vocab_size()
        if number not in known and (name != "image" or number != size):
            token = tokenizer.id_to_token(number)
            what = f"token {number}, {token!r}, is no special one" if token else f"it has no token {number}"
            raise UserError(f"{what}, but model.special.{name}", str(path), _choice(known, size))
    return Vocabulary(tokenizer, special)


def same_tokens(one: Path, other: Path) -> bool:
    """Whether two tokenizers read every text as the same numbers, each part of a document by itself: all but their
    special tokens is alike.

    Raises:
        UserError: see :func:`read_tokenizer`.
    """

    def reads(path: Path) -> list[Any]:
        parts = json.loads(read_tokenizer(path).to_str())
        words = parts["pre_tokenizer"]
        if words and words.get("prepend_scheme") == "first":
            words["prepend_scheme"] = "always"  # differ behind special tokens alone, of which a part has none
        plain = [token for token in parts["added_tokens"] if not token["special"]]
        return [plain, parts["model"], parts["normalizer"], words]

    return reads(one) == reads(other)


def _choice(known: dict[int, AddedToken], size: int) -> str:
    shown = [f"{number} {token.content}" for number, token in sorted(known.items())]
    more = f" … ({len(shown) - 8} more)" if len(shown) > 8 else ""
    return f"set it in the recipe to one of {', '.join(shown[:8])}{more}; image may also be {size}"


def _strange(parts: dict[str, Any]) -> Iterator[str]:
    """What in a tokenizer's file training does not read."""
    model = parts.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
        yield f"its model is a {model.get('type') if isinstance(model, dict) else model}, not a BPE"
        return
    yield from (f"its model.{name} is {model[name]!r}" for name in _PLAIN if model.get(name))
    yield from (f"its {name} is not absent" for name in _ABSENT if parts.get(name) is not None)
    found = {name: list(_flat(parts.get(name))) for name in _PARTS}
    for name, kinds in _PARTS.items():
        grows = 1
        for part in found[name]:
            if part.get("type") not in kinds:
                yield f"its {name} has a {part.get('type')}"
            put, pattern = part.get("prepend", part.get("content")), part.get("pattern")
            if name != "pre_tokenizer" and isinstance(put, str):
                grows *= max(1, len(put))
            expression = pattern.get("Regex") if isinstance(pattern, dict) else None
            if isinstance(expression, str) and _REPEATED_GROUP.search(expression):
                yield f"its {name} has a pattern that repeats a group: {expression}"
        if grows > _LONGEST:
            yield f"its {name} makes {grows} characters of one"
    bytewise = any(part.get("type") == "ByteLevel" for part in found["pre_tokenizer"])
    names = pre_tokenizers.ByteLevel.alphabet() if bytewise else [f"<0x{byte:02X}>" for byte in range(256)]
    if not bytewise and not model.get("byte_fallback"):
        yield "its pre_tokenizer has no ByteLevel, its model no byte_fallback: it cannot read every text"
    elif missing := sorted(set(names) - set(model.get("vocab", ()))):
        yield f"it cannot read every byte: {len(missing)} have no token, as {missing[0]!r}"


def _flat(part: Any, depth: int = 4) -> Iterator[dict[str, Any]]:
    """The members of a sequence, or a part by itself."""
    if not isinstance(part, dict):
        return
    if part.get("type") != "Sequence" or not depth:
        yield part
        return
    for members in (part.get("normalizers"), part.get("pretokenizers"), part.get("decoders")):
        for member in members if isinstance(members, list) else []:
            yield from _flat(member, depth - 1)


def tokenizer_hash(path: Path | str) -> str:
    """Identity of a tokenizer: SHA-256 of its file, hexadecimal, as data sets record it.

    Raises:
        UserError: it cannot be read, or is larger than any tokenizer.
    """
    try:
        return hashlib.sha256(reading.content(Path(path), LARGEST)).hexdigest()
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the tokenizer: {error}", str(path), "prepare the data again") from None
