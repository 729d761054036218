"""A `Studio` on a DALI pipeline: takes pixels in place, on CPU or GPU, and returns them through DLPack."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import pipeline_def
from torch.utils.dlpack import from_dlpack

from vitscore.augment.conditions import Recipe
from vitscore.augment.graph import graph

MOST_THREADS = 8
"""A grid has a dozen pipelines, of which only one works at a time."""
AT_ONCE = 224 * 224
"""Pixels per thread that go through a pipeline at once: DALI keeps a hundred intermediate copies of each picture."""
AT_ONCE_ON_GPU = 64 * AT_ONCE


class DaliStudio:
    """A `Studio` that applies recipes to batches of 1 to `batch_size` pictures of one size."""

    def __init__(
        self,
        recipes: Sequence[Recipe],
        size: tuple[int, int],
        *,
        batch_size: int,
        num_threads: int,
        device_id: int | None = None,
    ) -> None:
        self._device = None if device_id is None else torch.device("cuda", device_id)
        threads = min(num_threads, MOST_THREADS)
        at_once = threads * AT_ONCE if device_id is None else AT_ONCE_ON_GPU
        self._rows = max(1, min(batch_size, at_once // (size[0] * size[1])))
        make = pipeline_def(
            graph,
            batch_size=self._rows,
            num_threads=threads,
            device_id=device_id,
            prefetch_queue_depth=1,
            # The dynamic executor gives up its outputs: they stay valid as long as torch holds them.
            exec_dynamic=True,
        )
        # DALI removes inputs that no operator reads.
        self._is_random = any(step.operator.is_random for recipe in recipes for step in recipe)
        self._pipe = make(recipes, height=size[0], width=size[1], is_gpu=device_id is not None)
        self._pipe.build()

    def apply(self, pixels_BHWC: torch.Tensor, words: NDArray[np.uint32]) -> Sequence[torch.Tensor]:
        starts = range(0, len(pixels_BHWC), self._rows)
        pieces = [self._run(pixels_BHWC[at : at + self._rows], words[at : at + self._rows]) for at in starts]
        return pieces[0] if len(pieces) == 1 else [torch.cat(parts) for parts in zip(*pieces, strict=True)]

    def _run(self, pixels_BHWC: torch.Tensor, words: NDArray[np.uint32]) -> Sequence[torch.Tensor]:
        # On a GPU, inputs and outputs are ordered on torch's stream, and the host waits for neither.
        stream = None if self._device is None else torch.cuda.current_stream(self._device)
        if self._is_random:
            self._pipe.feed_input("words", words)
        if stream is None:
            self._pipe.feed_input("pixels", pixels_BHWC.contiguous().numpy())
        else:
            self._pipe.feed_input("pixels", pixels_BHWC.contiguous(), cuda_stream=stream)
        outputs = self._pipe.run(stream)
        return [from_dlpack(batch.as_tensor()) for batch in outputs]

    def close(self) -> None:
        self.__dict__.pop("_pipe", None)  # DALI's threads end with its last reference
