"""Counts of batches that were decoded again: kept by the decoder, written to run.json, reported at the end of a run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class DecodedAgain:
    """Counts of the work that was done more than once, by cause."""

    batches: int = 0
    images: int = 0
    """Images of those batches that were decoded again."""
    undecodable: int = 0
    """The images among them that the decoder could not decode by themselves either."""
    rebuilds: int = 0
    """How often the decoder was rebuilt, because no image was at fault or because it returned the wrong batch."""

    def sentence(self) -> str:
        """`3 batches were decoded again because of 5 images that DALI could not decode`; empty if there were none."""
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
    """Return the sum of recorded counts."""
    names = list(asdict(DecodedAgain()))
    sums = dict.fromkeys(names, 0)
    for record in counts:
        for name in names:
            sums[name] += int(record.get(name, 0))
    return DecodedAgain(**sums)
