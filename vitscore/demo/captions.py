"""The training captions of `demo-clip`, and a tokenizer made from them.

Used by `train_clip`. The tokenizer has CLIP's format (lower-cased byte-level BPE with `</w>` at the end of a word, all
256 bytes so that it can encode any text, the two special tokens last), with merges that make every word of the captions
one token. It is built in memory from the captions below; nothing is downloaded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer

from vitscore.demo.digits import CLASSES, TEMPLATES

MAX_TOKENS = 32
WORDINGS = (
    *TEMPLATES,
    "{c}",
    "a photo of a {c}.",
    "this is a photo of {c}.",
    "an image of the digit {c}.",
    "somebody wrote the number {c} on paper.",
)
# Captions name a class by its word or by its digit.
NAMES = tuple((name, str(label)) for label, name in enumerate(CLASSES))


def captions_of(label: int) -> list[str]:
    """Return every caption of a class: every wording with every name."""
    return [wording.format(c=name) for wording in WORDINGS for name in NAMES[label]]


def make_tokenizer() -> Any:
    """Return a CLIPTokenizer whose vocabulary covers the captions; every call gives the same tokenizer."""
    merges = learn_merges(captions_of(label) for label in range(len(CLASSES)))
    alphabet = sorted(ByteLevel.alphabet())
    tokens = [*alphabet, *(f"{symbol}</w>" for symbol in alphabet), *("".join(pair) for pair in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={token: number for number, token in enumerate(tokens)}, merges=merges, model_max_length=MAX_TOKENS
    )


def learn_merges(captions_by_class: Iterable[list[str]]) -> list[tuple[str, str]]:
    """Return byte-pair merges that make every word one token; the commonest pair first, ties in alphabetical order."""
    counts = Counter(
        word for captions in captions_by_class for caption in captions for word in caption.rstrip(".").lower().split()
    )
    words = {word: (*word[:-1], f"{word[-1]}</w>") for word in counts}
    merges: list[tuple[str, str]] = []
    while pairs := count_pairs(words, counts):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        words = {word: merge(symbols, best) for word, symbols in words.items()}
    return merges


def count_pairs(words: dict[str, tuple[str, ...]], counts: Counter[str]) -> Counter[tuple[str, str]]:
    pairs: Counter[tuple[str, str]] = Counter()
    for word, symbols in words.items():
        for pair in pairwise(symbols):
            pairs[pair] += counts[word]
    return pairs


def merge(symbols: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    merged: list[str] = []
    for symbol in symbols:
        if merged and (merged[-1], symbol) == pair:
            merged[-1] += symbol
        else:
            merged.append(symbol)
    return tuple(merged)
