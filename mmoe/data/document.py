"""A sample as tokens: what every branch sees, then the branches."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmoe.data.tokenizer import Vocabulary
from mmoe.recipe.model import Special


class BadSample(Exception):
    """A sample that cannot be used. It is counted and named, and the run goes on; the message says what is wrong."""


@dataclass(frozen=True, kw_only=True)
class Document:
    """A tokenised sample of n tokens; every array is ``[n]``."""

    key: str
    tokens: NDArray[np.int64]
    labels: NDArray[np.int64]
    """The token to predict at this place; 0 where ``loss_mask`` is 0."""
    loss_mask: NDArray[np.float32]
    """1 where the label is trained on: an answer's token, the ``<eos>`` after it, text marked ``"loss": true``."""
    position: NDArray[np.int64]
    """From 0; every branch goes on right after the prefix."""
    branch: NDArray[np.int32]
    """0 in the prefix, then 1, 2, …"""
    images: tuple[int, ...]
    """Which of the sample's images, in the order of their runs of ``<image>``."""

    def __len__(self) -> int:
        return len(self.tokens)

    def without_loss(self) -> "Document":
        """The same tokens, none of them trained on."""
        return replace(self, labels=np.zeros_like(self.labels), loss_mask=np.zeros_like(self.loss_mask))


def blank(key: str, length: int, special: Special) -> Document:
    """Holds the place of a sample that cannot even be read: ``<bos>`` and padding, nothing to learn, no images."""
    tokens = np.full(length, special.pad, np.int64)
    tokens[:1] = special.bos
    return Document(
        key=key,
        tokens=tokens,
        labels=np.zeros(length, np.int64),
        loss_mask=np.zeros(length, np.float32),
        position=np.arange(length),
        branch=np.zeros(length, np.int32),
        images=(),
    )


def with_system_prompt(record: dict[str, Any], text: str) -> dict[str, Any]:
    """A sample's JSON with ``text`` first in its prefix, without loss; as it is where either is missing."""
    prefix = record.get("prefix")
    return {**record, "prefix": [{"text": text}, *prefix]} if text and isinstance(prefix, list) else record


def _field(part: Any, name: str, kind: type, where: str) -> Any:
    value = part.get(name) if isinstance(part, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        raise BadSample(f"{where} has no {name!r}" if value is None else f"{where}: {name!r} is no {kind.__name__}")
    return value


def _encode(tokenizer: Vocabulary, text: str, where: str) -> list[int]:
    try:
        return tokenizer.encode(text)
    except (UnicodeError, TypeError):  # half of a surrogate pair, which JSON lets through
        raise BadSample(f"{where} is no Unicode text") from None
    except ValueError as error:
        raise BadSample(f"{where}: {error}") from None


def tokenize(sample: dict[str, Any], tokenizer: Vocabulary, image_tokens: int, *, key: str = "") -> Document:
    """Lays out ``<bos>``, the prefix (``image_tokens`` × ``<image>`` for an image), then for each branch its prompt,
    its answer and ``<eos>``.

    Trained on are the answers with their ``<eos>`` and the prefix's texts marked ``"loss": true``. The label of a
    branch's first token would stand on the prefix's last place, which all branches share: so no prompt may be empty.

    Args:
        sample: the sample's JSON, see ``data/FORMAT.md``.
        tokenizer: see :mod:`mmoe.data.tokenizer`.
        image_tokens: tokens an image takes; 0 gives the length that ``index.npz`` holds.
        key: the sample's name, for messages.

    Raises:
        BadSample: the sample does not have the form it should.
    """
    special = tokenizer.special
    tokens, loss, images = [special.bos], [0.0], []
    prefix, branches = _field(sample, "prefix", list, "sample"), sample.get("branches", [])
    if not isinstance(branches, list):
        raise BadSample("'branches' is no list")
    for i, part in enumerate(prefix):
        if isinstance(part, dict) and "image" in part:
            images.append(_field(part, "image", int, f"prefix[{i}]"))
            ids, learn = [special.image] * image_tokens, False
        else:
            ids = _encode(tokenizer, _field(part, "text", str, f"prefix[{i}]"), f"prefix[{i}]")
            learn = part.get("loss") is True
        tokens += ids
        loss += [float(learn)] * len(ids)
    start = len(tokens)
    position, branch = list(range(start)), [0] * start
    for i, part in enumerate(branches, 1):
        where = f"branches[{i - 1}]"
        prompt = _encode(tokenizer, _field(part, "prompt", str, where), where)
        answer = [*_encode(tokenizer, _field(part, "answer", str, where), where), special.eos]
        if not prompt:
            raise BadSample(f"{where} has an empty prompt")
        tokens += prompt + answer
        loss += [0.0] * len(prompt) + [1.0] * len(answer)
        position += range(start, start + len(prompt) + len(answer))
        branch += [i] * (len(prompt) + len(answer))

    # A token is predicted at the place before it; a branch's first token has no loss, so none crosses a branch.
    mask = np.array([*loss[1:], 0.0], np.float32)
    ids = np.array(tokens, np.int64)
    following = np.append(ids[1:], 0)
    return Document(
        key=key,
        tokens=ids,
        labels=np.where(mask > 0, following, 0),
        loss_mask=mask,
        position=np.array(position, np.int64),
        branch=np.array(branch, np.int32),
        images=tuple(images),
    )
