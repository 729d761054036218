"""A `Device` on the CPU that runs its work as late as the interface allows.

Copies and the row kernel are queued, and run only when a mark is waited for. So code that reads a result too early, or
reuses a buffer too soon, reads or writes wrong numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from vitscore import kernels
from vitscore.engine.cuda_device import Times
from vitscore.engine.score_buffer import ScoreBuffer
from vitscore.models.image_model import ModelOutput

FILLING = 0x7F


class Late:
    """A `Device` on the CPU.

    Args:
        has_graphs: whether forwards can be captured.
        clock: what a forward takes; by default Python and the device as long.
    """

    def __init__(
        self, *, has_graphs: bool = False, clock: Callable[[Any, torch.Tensor], Times] = lambda *_: Times(1e-3, 1e-3)
    ) -> None:
        self.has_graphs = has_graphs
        self.times = clock
        self.queue: list[Callable[[], Any]] = []
        self.num_freed = 0

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        whole = torch.empty(shape, dtype=dtype)
        whole.view(torch.uint8).fill_(FILLING)
        return whole

    empty = pinned

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        assert target.shape == source.shape and target.dtype == source.dtype
        self.queue.append(lambda: target.copy_(source))

    def mark(self) -> Reached:
        return Reached(self, list(self.queue))

    def ranking(self, max_rows: int, num_classes: int, top_k: int) -> LateRanking:
        return LateRanking(self, max_rows, num_classes, top_k)

    def graphed(self, forward: Callable[[torch.Tensor], ModelOutput], pixels: torch.Tensor) -> Any:
        return LateGraph(self, forward, pixels) if self.has_graphs else None

    def free_memory(self) -> None:
        self.num_freed += 1
        self.do(list(self.queue))

    def do(self, work: list[Callable[[], Any]]) -> None:
        """Run the part of the work that is not done yet, in order."""
        with torch.inference_mode():
            while self.queue and any(self.queue[0] is call for call in work):
                self.queue.pop(0)()


class Reached:
    """A mark in the queue, like a CUDA event."""

    def __init__(self, device: Late, work: list[Callable[[], Any]]) -> None:
        self._device = device
        self._work = work

    def synchronize(self) -> None:
        self._device.do(self._work)


class LateRanking:
    """The row kernel on the CPU, queued."""

    def __init__(self, device: Late, max_rows: int, num_classes: int, top_k: int) -> None:
        width = min(top_k, num_classes)
        whole = device.empty((ScoreBuffer.num_bytes(max_rows, width),), torch.uint8)
        self.scores = ScoreBuffer(whole, max_rows=max_rows, width=width)
        self._device = device

    def rank(self, logits_BK: torch.Tensor, labels_B: torch.Tensor) -> None:
        assert logits_BK.is_contiguous() and logits_BK.dtype == torch.float32
        self._device.queue.append(lambda: self._rank(logits_BK, labels_B))

    def _rank(self, logits_BK: torch.Tensor, labels_B: torch.Tensor) -> None:
        ours, num_rows = self.scores, len(labels_B)
        scores = kernels.score_rows(logits_BK.numpy(), labels_B.numpy(), ours.ids_BT.shape[1])
        ours.ids_BT.numpy()[:num_rows] = scores.topk
        ours.probs_BT.numpy()[:num_rows] = scores.topk_prob
        figures = (scores.label_logprob, scores.sum_sq_prob, scores.log_sum_exp, scores.margin, scores.entropy)
        for row, figure in zip(ours.figures_5B.numpy(), figures, strict=True):
            row[:num_rows] = figure
        ours.is_finite_B.numpy()[:num_rows] = scores.is_finite


class LateGraph:
    """A forward between fixed buffers, queued as a whole; every replay overwrites the results of the last one."""

    def __init__(self, device: Late, forward: Callable[[torch.Tensor], ModelOutput], pixels: torch.Tensor) -> None:
        self._device = device
        self._forward = forward
        self._pixels = pixels.clone()
        self._output = forward(self._pixels)

    def __call__(self, pixels: torch.Tensor) -> ModelOutput:
        self._device.queue.append(lambda: self._replay(pixels))
        return self._output

    def _replay(self, pixels: torch.Tensor) -> None:
        self._pixels.zero_()
        self._pixels[: len(pixels)] = pixels
        output = self._forward(self._pixels)
        self._output.logits.copy_(output.logits)
        if self._output.embedding is not None and output.embedding is not None:
            self._output.embedding.copy_(output.embedding)
