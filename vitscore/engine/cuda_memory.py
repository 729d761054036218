"""How many images a GPU's memory holds at a time, and what is said where it holds fewer.

Before a run: the planned batch (see settings) is halved until it fits what one forward of each model was seen to need.
`warmup` measures; here is the arithmetic. A planned batch is never raised: past it a GPU gains nothing from more rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vitscore.errors import SetupError
from vitscore.plan.choices import Choice

USABLE = 0.8
"""The share of free memory that is counted on: what is allocated lies in pieces, and tuning needs room of its own."""
DECODER_BYTES = 3 << 30
"""The decoder's own: nvJPEG's workspaces and the buffers of each of its threads. 2 GiB for the pipeline that decodes
batches; 1 GiB for the one beside it, made with it, that decodes the halves of a batch with an undecodable image: as
many threads, but no queue. (Reckoned, not measured.)"""
DECODER_BYTES_PER_IMAGE = 7 * (3 << 20) // 2
"""Decoded images of a million pixels: of the three batches that the decoder may hold, and of half a batch once more."""
_REFUSALS = ("out of memory", "alloc_failed")


@dataclass(frozen=True)
class Footprint:
    """A forward's memory, as a straight line over its rows."""

    fixed: float
    per_row: float

    @classmethod
    def through(cls, few: tuple[int, int], many: tuple[int, int]) -> Footprint:
        """The line through two measurements, each (rows, bytes); a falling one is taken for a level one."""
        per_row = max(0.0, (many[1] - few[1]) / (many[0] - few[0]))
        return cls(max(0.0, many[1] - per_row * many[0]), per_row)

    def num_bytes(self, num_rows: int) -> float:
        return self.fixed + self.per_row * num_rows


def fitting(planned: Choice, footprints: Sequence[Footprint], *, free_bytes: int) -> Choice:
    """The planned batch size, halved until it fits.

    Models run one after the other and leave their memory to the next, so the largest of them decides.
    """
    size: int = planned.value
    room = USABLE * free_bytes - DECODER_BYTES
    while size > 1 and needed(size, footprints) > room:
        size //= 2
    if size == planned.value:
        return planned
    return Choice(size, f"{planned.value} would not fit {free_bytes / 2**30:.1f} GiB of free GPU memory")


def needed(size: int, footprints: Sequence[Footprint]) -> float:
    return DECODER_BYTES_PER_IMAGE * size + max((each.num_bytes(size) for each in footprints), default=0.0)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device had no memory left: torch's own error, or a library's that says so in words."""
    text = str(error).lower()
    is_refusal = isinstance(error, RuntimeError) and any(words in text for words in _REFUSALS)
    return isinstance(error, torch.OutOfMemoryError) or is_refusal


def out_of_memory(batch_size: int, *, next_step: str) -> SetupError:
    return SetupError("out of GPU memory", where=f"a batch of {batch_size}", next_step=next_step)
