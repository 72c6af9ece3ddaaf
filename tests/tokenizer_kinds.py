"""Tokenizers of the kinds that published language models have, small: special tokens elsewhere than in ours."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from mmoe.recipe.model import Special

TEXTS = ["how many zebras ?", " three pigs", "what is left of the frog ?", " 12 stamps", "yes", "no", "where is it ?"]
PATTERN = "|".join(
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
"""Llama 3's."""


def sentencepiece(path: Path) -> Special:
    """Llama 2's, Vicuna's and Yi's kind: a blank before the text, bytes for what has no token. It has no token for a
    picture, and pads with ``<unk>``."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    learned.train_from_iterator(TEXTS * 9, trainers.BpeTrainer(vocab_size=120, show_progress=False))
    pieces = sorted(learned.get_vocab(), key=learned.get_vocab().__getitem__)
    vocab = {name: number for number, name in enumerate([*names, *pieces])}
    model = models.BPE(vocab, merges(learned), unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    made = Tokenizer(model)
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(parts)
    made.add_special_tokens([AddedToken(name, normalized=False) for name in names[:3]])
    begin = [("<s>", 1)]
    made.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", begin)
    made.save(str(path))
    return Special(pad=0, bos=1, eos=2, image=made.get_vocab_size())


def metaspace(path: Path) -> Special:
    """The same as transformers saves it: a blank before the first word alone, none behind a special token."""
    special = sentencepiece(path)
    made = Tokenizer.from_file(str(path))
    made.normalizer = None
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    made.save(str(path))
    return special


def unknown(path: Path) -> Special:
    """The same, and ``<unk>``, which no text is read as, stands for pictures: no row is added to the vocabulary."""
    return replace(sentencepiece(path), pad=2, image=0)


def tiktoken(path: Path) -> Special:
    """Llama 3's kind: words by a pattern, bytes, special tokens last; a reserved one stands for pictures."""
    made = Tokenizer(models.BPE(ignore_merges=True))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(TEXTS * 9, trainer)
    first = made.get_vocab_size()
    made.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>", "<|reserved_0|>", "<|reserved_1|>"])
    begin = ("<|begin_of_text|>", first)
    made.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(single=f"{begin[0]} $A", pair=f"{begin[0]} $A $B", special_tokens=[begin]),
        ]
    )
    made.save(str(path))
    return Special(pad=first + 1, bos=first, eos=first + 1, image=first + 3)


def merges(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    return [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]


KINDS: dict[str, Callable[[Path], Special]] = {
    "sentencepiece": sentencepiece,
    "metaspace": metaspace,
    "unknown": unknown,
    "tiktoken": tiktoken,
}
