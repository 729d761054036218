"""Damage encoded pictures and tars in random ways, from a seed."""

import random
from collections.abc import Callable


def flip(content: bytearray, chance: random.Random) -> int:
    at = chance.randrange(len(content))
    content[at] ^= 1 << chance.randrange(8)
    return at


def overwrite(content: bytearray, chance: random.Random) -> int:
    at = chance.randrange(len(content))
    length = min(chance.choice((1, 2, 4, 16, 200, 1000)), len(content) - at)
    kind = chance.randrange(3)
    new = (bytes(length), b"\xff" * length, chance.randbytes(length))[kind]
    content[at : at + length] = new
    return at


def overwrite_start(content: bytearray, chance: random.Random) -> int:
    """Overwrite a byte near the start: in headers, numbers are sizes."""
    at = chance.randrange(min(len(content), 64))
    content[at] = chance.randrange(256)
    return at


def cut(content: bytearray, chance: random.Random) -> int:
    at = chance.randrange(len(content))
    del content[at:]
    return at


def delete(content: bytearray, chance: random.Random) -> int:
    at = chance.randrange(len(content))
    del content[at : at + chance.choice((1, 3, 50, 700))]
    return at


def insert(content: bytearray, chance: random.Random) -> int:
    at = chance.randrange(len(content))
    content[at:at] = chance.randbytes(chance.choice((1, 3, 50, 700)))
    return at


def repeat(content: bytearray, chance: random.Random) -> int:
    """Insert a copy of a piece of the content at another position."""
    start, at = chance.randrange(len(content)), chance.randrange(len(content))
    content[at:at] = content[start : start + chance.choice((10, 300, 3000))]
    return at


KINDS: tuple[Callable[[bytearray, random.Random], int], ...] = (
    flip,
    overwrite,
    overwrite_start,
    cut,
    delete,
    insert,
    repeat,
)


def mutate(content: bytes, chance: random.Random) -> tuple[bytes, int]:
    """Damage `content` one to four times; return it, and the position of the first byte that may differ."""
    damaged, first = bytearray(content), len(content)
    for _ in range(chance.randint(1, 4)):
        if damaged:
            first = min(first, chance.choice(KINDS)(damaged, chance))
    return bytes(damaged), first
