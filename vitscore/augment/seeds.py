"""Random bits of a sample, from hash(seed, shard, key): the same on any rank, in any batch, after any restart.

The two 32-bit words of a sample are a hash of its names. The random number for a value of its picture is computed from
these words, the operator and the value's place, by an integer mixer that gives the same bits in NumPy and in DALI.
"""

from __future__ import annotations

import hashlib
import re
import zlib
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint32]

# The steps of a full-period mixer of 32 bits with very low bias (C. Wellons, "Prospecting for Hash Functions", 2018).
MULTIPLIERS = (0x7FEB352D, 0x846CA68B)
SHIFTS = (16, 15, 16)
SECOND = 0x9E3779B9
"""XORed with the first random number of a value, and mixed, it gives the second."""


def sample_words(seed: int, samples: Iterable[tuple[str, str]]) -> Words:
    """Return uint32 (B, 2) for samples given as (shard, key); only the shard's base name counts, so shards may move."""
    rows = [_words(seed, shard, key) for shard, key in samples]
    return np.array(rows, np.uint32).reshape(-1, 2)


def _words(seed: int, shard: str, key: str) -> Words:
    base = re.split(r"[/\\]", shard)[-1]
    text = f"{seed}\0{base}\0{key}".encode("utf-8", "surrogateescape")
    return np.frombuffer(hashlib.blake2b(text, digest_size=8).digest(), "<u4")


def salt(operator: str, position: int) -> int:
    """Return a number that makes the random bits of an operator at a place in a chain independent of all others."""
    return zlib.crc32(f"{operator}/{position}".encode())


def mix(words: Any) -> Any:
    """Scramble uint32 values; a bijection."""
    for multiplier, shift in zip(MULTIPLIERS, SHIFTS, strict=False):
        words = (words ^ (words >> np.uint32(shift))) * np.uint32(multiplier)
    return words ^ (words >> np.uint32(SHIFTS[2]))


def random_words(sample: Words, count: int, *, salt: int) -> Words:
    """Return `count` random uint32 of one sample; `mix(x ^ SECOND)` derives a second number from a number x."""
    places = np.arange(count, dtype=np.uint32)
    words: Words = mix(mix(places ^ sample[0]) ^ sample[1] ^ np.uint32(salt))
    return words
