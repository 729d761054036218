"""The batch size that fits a GPU's memory.

Before a run, the planned batch size (see `plan.choices`) is halved until it fits the memory that the models' forwards
need. `warm_up` measures that memory; this module does the arithmetic. The batch size is never raised: a GPU gains
nothing from larger batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vitscore.errors import SetupError
from vitscore.plan.choices import Choice

USABLE = 0.8
"""The share of free memory to plan with; fragmentation and the compiler's tuning need the rest."""
DECODER_BYTES = 3 << 30
"""Memory of the decoder: nvJPEG's workspaces and the buffers of its threads. 2 GiB for the pipeline that decodes
batches, and 1 GiB for the second pipeline, which decodes the halves of a batch with an undecodable image and has as
many threads but no queue. (Estimated, not measured.)"""
DECODER_BYTES_PER_IMAGE = 7 * (3 << 20) // 2
"""Decoded images of a million pixels each: three batches that the decoder may hold, and half a batch decoded again."""
_REFUSALS = ("out of memory", "alloc_failed")


@dataclass(frozen=True)
class Footprint:
    """A forward's memory as a linear function of its rows."""

    fixed: float
    per_row: float

    @classmethod
    def through(cls, few: tuple[int, int], many: tuple[int, int]) -> Footprint:
        """Fit the line through two measurements (rows, bytes); a negative slope becomes zero."""
        per_row = max(0.0, (many[1] - few[1]) / (many[0] - few[0]))
        return cls(max(0.0, many[1] - per_row * many[0]), per_row)

    def num_bytes(self, num_rows: int) -> float:
        return self.fixed + self.per_row * num_rows


def fitting(planned: Choice, footprints: Sequence[Footprint], *, free_bytes: int) -> Choice:
    """Return the planned batch size, halved until it fits.

    Models run one after the other and reuse the same memory, so the largest footprint decides.
    """
    size: int = planned.value
    room = USABLE * free_bytes - DECODER_BYTES
    while size > 1 and needed(size, footprints) > room:
        size //= 2
    if size == planned.value:
        return planned
    return Choice(size, f"{planned.value} would not fit {free_bytes / 2**30:.1f} GiB of free GPU memory")


def needed(size: int, footprints: Sequence[Footprint]) -> float:
    return DECODER_BYTES_PER_IMAGE * size + max((footprint.num_bytes(size) for footprint in footprints), default=0.0)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device ran out of memory: torch's own error, or a library's error with that message."""
    text = str(error).lower()
    is_refusal = isinstance(error, RuntimeError) and any(words in text for words in _REFUSALS)
    return isinstance(error, torch.OutOfMemoryError) or is_refusal


def out_of_memory(batch_size: int, *, next_step: str) -> SetupError:
    return SetupError("out of GPU memory", where=f"a batch of {batch_size}", next_step=next_step)
