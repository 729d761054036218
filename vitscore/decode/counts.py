"""How often a decoder had to decode a batch again: counted by the decoder, kept in run.json, said at the end."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class DecodedAgain:
    """What was decoded more than once, and why."""

    batches: int = 0
    images: int = 0
    """Of those batches, given to the decoder once more."""
    undecodable: int = 0
    """Images of them that the decoder could not decode by themselves either."""
    rebuilds: int = 0
    """How often the decoder was made anew: no image was at fault, or it lost its place."""

    def sentence(self) -> str:
        """`3 batches were decoded again because of 5 images that DALI could not decode`; empty where none was."""
        parts = []
        if self.batches:
            batches = f"{self.batches:,} batch was" if self.batches == 1 else f"{self.batches:,} batches were"
            images = f"{self.undecodable:,} image{'' if self.undecodable == 1 else 's'}"
            reason = f"because of {images} that DALI could not decode" if self.undecodable else "with no image at fault"
            parts.append(f"{batches} decoded again {reason}")
        if self.rebuilds:
            parts.append(f"the decoder was rebuilt {self.rebuilds:,} time{'' if self.rebuilds == 1 else 's'}")
        return "; ".join(parts)


def total(counts: Iterable[Mapping[str, Any]]) -> DecodedAgain:
    """The sum of recorded counts."""
    names = list(asdict(DecodedAgain()))
    sums = dict.fromkeys(names, 0)
    for each in counts:
        for name in names:
            sums[name] += int(each.get(name, 0))
    return DecodedAgain(**sums)
