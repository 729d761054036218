"""Pixels to predictions on a GPU: all work is queued on one stream, and the host reads results some batches later.

    submit:   pixels ─► models ─► row kernel ─► copies into a slot of pinned memory ─► mark     (nothing waits)
    result:   wait for the mark ─► copy rows from the slot; compute rows that are not finite again in fp32

`CudaForward` is the twin of `forward_cpu.Forward`, with the same results in the same form. While the device computes a
batch, the host decodes, commits parts and queues the next batches: `depth` batches are in flight, each in its own slot.

A slot holds its batch's pixels until its mark is reached. They are needed for the rare rerun in fp32, and memory that
the decoder owns must not return to it while the device still reads it.

The batch shape is part of the run's identity, because the last bits of the results depend on it. If memory runs out
during a run (another process on the GPU took it), the batch is therefore computed again in the same shape, never in
halves, after all unused memory has been freed. If memory runs out again, the run ends and can be resumed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from vitscore import kernels
from vitscore.decode.pixels import Decoded
from vitscore.engine.cuda_choices import captured, choose_launch
from vitscore.engine.cuda_device import Device, Mark
from vitscore.engine.cuda_memory import is_out_of_memory, out_of_memory
from vitscore.engine.ranked import Ranked, pad, share_geometries
from vitscore.engine.score_buffer import ScoreBuffer, copied
from vitscore.models.test_time_views import over_views
from vitscore.plan.choices import Measured
from vitscore.rundir.parts import Predictions

if TYPE_CHECKING:
    from vitscore.models.image_model import ImageModel, ModelOutput

Array = np.ndarray[Any, Any]
Result = TypeVar("Result")
# Axes: B rows of a batch, K classes, D width of an embedding.

TRY_AGAIN = "Free GPU memory and run the same command to resume, or start anew with a smaller -b and --overwrite."


@dataclass
class Landing:
    """Pinned host memory that receives one model's outputs for one batch."""

    scores: ScoreBuffer
    logits_BK: torch.Tensor | None
    embedding_BD: torch.Tensor | None


class Lane:
    """One model on the device: its forward, its row kernel and its landings.

    How the forward is launched is measured here (`launch`), on an idle device, just as it will be called.

    Args:
        model: a loaded model, on the device.
        device: the device.
        batch_size: rows of every forward.
        top_k: the number of best classes to keep.
        save: the long outputs to keep.
        tta: the test-time views that logits are averaged over.
    """

    def __init__(
        self, model: ImageModel, device: Device, *, batch_size: int, top_k: int, save: Sequence[str], tta: str
    ) -> None:
        self.model = model
        self._device = device
        self._batch_size = batch_size
        self._top_k = top_k
        self._save = save
        self._tta = tta
        self._ranking = device.ranking(batch_size, model.num_classes, top_k)
        forward = partial(over_views, model, tta=tta)

        def eager(pixels: torch.Tensor) -> ModelOutput:
            return forward(pad(pixels, batch_size))

        pixels = model.black_images(batch_size)
        graphed, self.launch = captured(device, forward, pixels, choose_launch(device, eager, pixels))
        self._run = graphed or eager

    def landing(self) -> Landing:
        """Allocate pinned memory for the outputs of a batch."""
        ours, pinned = self._ranking.scores, self._device.pinned
        width, rows = ours.ids_BT.shape[1], self._batch_size
        return Landing(
            ScoreBuffer(pinned(tuple(ours.whole.shape), torch.uint8), max_rows=rows, width=width),
            pinned((rows, self.model.num_classes), torch.float32) if "logits" in self._save else None,
            pinned((rows, self.model.embedding_dim), torch.float32) if "embeddings" in self._save else None,
        )

    def compute(self, pixels: torch.Tensor, labels_B: torch.Tensor, landing: Landing) -> None:
        """Queue a batch on the stream: forward, row kernel, copies to the host."""
        output, num_rows = self._run(pixels), len(labels_B)
        self._ranking.rank(output.logits[:num_rows], labels_B)
        self._device.copy(landing.scores.whole, self._ranking.scores.whole)
        if landing.logits_BK is not None:
            self._device.copy(landing.logits_BK[:num_rows], output.logits[:num_rows])
        if landing.embedding_BD is not None and output.embedding is not None:
            self._device.copy(landing.embedding_BD[:num_rows], output.embedding[:num_rows])

    def collect(self, landing: Landing, pixels: torch.Tensor, labels: Array, redo_if: Array) -> Ranked:
        """Return the predictions of a completed batch.

        Args:
            landing: the outputs, already copied to the host.
            pixels: the batch, for a rerun.
            labels: int32 (B,).
            redo_if: bool (B,): the rows to compute again in fp32 if their logits are not finite.
        """
        scores = landing.scores.read(len(labels))
        logits_BK = None if landing.logits_BK is None else copied(landing.logits_BK[: len(labels)])
        embedding_BD = None if landing.embedding_BD is None else copied(landing.embedding_BD[: len(labels)])
        redo = ~scores.is_finite & redo_if
        if redo.any():
            again = over_views(self.model.rerun_fp32, pad(pixels, self._batch_size), self._tta)
            again_BK = again.logits[: len(labels)].cpu().numpy()[redo]
            for column, mended in zip(scores, kernels.score_rows(again_BK, labels[redo], self._top_k), strict=True):
                column[redo] = mended
            if logits_BK is not None:
                logits_BK[redo] = again_BK
            if embedding_BD is not None and again.embedding is not None:
                embedding_BD[redo] = again.embedding[: len(labels)].cpu().numpy()[redo]
        predictions = Predictions.of(scores, logits=logits_BK, embedding=embedding_BD)
        return Ranked(predictions, scores.is_finite, int(redo.sum()))


@dataclass
class Slot:
    """Pinned memory for one batch; `pending` is the batch that occupies it until its results are taken."""

    labels_B: torch.Tensor
    landings: list[Landing]
    pending: Pending | None = None


class Pending:
    """A batch in flight on the device; `result` waits for it, and may be called repeatedly."""

    def __init__(self, slot: Slot, mark: Mark, collect: Callable[[], Mapping[str, Ranked]]) -> None:
        self._slot: Slot | None = slot
        self._mark = mark
        self._collect: Callable[[], Mapping[str, Ranked]] | None = collect
        self._result: Mapping[str, Ranked] = {}
        slot.pending = self

    def result(self) -> Mapping[str, Ranked]:
        if self._collect is not None:
            self._mark.synchronize()
            self._result = self._collect()
            # Drop the pixels that the closure holds, and free the slot for another batch.
            self._collect = None
            assert self._slot is not None
            self._slot.pending, self._slot = None, None
        return self._result


class CudaForward:
    """Runs all models on batches, on a GPU; called from one thread.

    Args:
        models: loaded and warmed-up models, on the device.
        device: the device.
        (for the other arguments, see `forward_cpu.Forward`)
    """

    depth = 3

    def __init__(
        self,
        models: Sequence[ImageModel],
        *,
        device: Device,
        batch_size: int,
        top_k: int,
        save: Sequence[str],
        has_fp32_rerun: bool,
        tta: str = "none",
    ) -> None:
        self.geometries, self.source = share_geometries(models)
        self._device = device
        self._batch_size = batch_size
        self._has_fp32_rerun = has_fp32_rerun
        self._lanes = [Lane(model, device, batch_size=batch_size, top_k=top_k, save=save, tta=tta) for model in models]
        self._labels_B = device.empty((batch_size,), torch.int32)
        # One more than `depth`, for the batch that is being submitted.
        self._slots = [
            Slot(device.pinned((batch_size,), torch.int32), [lane.landing() for lane in self._lanes])
            for _ in range(self.depth + 1)
        ]
        self._num_submitted = 0

    @property
    def measured(self) -> Mapping[str, Measured]:
        return {lane.model.name: lane.launch for lane in self._lanes}

    def submit(self, decoded: Decoded, labels: Array) -> Pending:
        """Queue a batch on the stream; `labels` is int32 (B,), -1 for no label.

        Raises:
            SetupError: the device has no memory for the batch, even after unused memory was freed.
        """
        slot = self._slots[self._num_submitted % len(self._slots)]
        self._num_submitted += 1
        if slot.pending is not None:
            slot.pending.result()
        self._with_memory(partial(self._enqueue, slot, decoded, labels), free=self._free_memory)
        collect = partial(self._collect, slot, decoded, np.array(labels, np.int32))
        return Pending(slot, self._device.mark(), collect)

    def close(self) -> None:
        """Wait for the device, and drop results that were not collected."""
        # A device error has already been raised where it occurred.
        with contextlib.suppress(RuntimeError):
            self._device.free_memory()
        for slot in self._slots:
            slot.pending = None

    def _enqueue(self, slot: Slot, decoded: Decoded, labels: Array) -> None:
        """Queue the whole batch on the stream; a second call repeats all of its work."""
        num_rows = len(labels)
        labels_B = self._labels_B[:num_rows]
        with torch.inference_mode():
            slot.labels_B[:num_rows] = torch.from_numpy(np.asarray(labels, np.int32))
            self._device.copy(labels_B, slot.labels_B[:num_rows])
            for lane, landing in zip(self._lanes, slot.landings, strict=True):
                lane.compute(decoded.pixels[self.source[lane.model.name]], labels_B, landing)

    def _collect(self, slot: Slot, decoded: Decoded, labels: Array) -> Mapping[str, Ranked]:
        """Return the results of a batch whose mark has been reached."""
        redo_if = np.full(len(labels), self._has_fp32_rerun)
        redo_if[list(decoded.faults)] = False
        results = {}
        with torch.inference_mode():
            for lane, landing in zip(self._lanes, slot.landings, strict=True):
                pixels = decoded.pixels[self.source[lane.model.name]]
                collect = partial(lane.collect, landing, pixels, labels, redo_if)
                results[lane.model.name] = self._with_memory(collect, free=self._device.free_memory)
        return results

    def _free_memory(self) -> None:
        """Take the results of all batches in flight, which releases their pixels, and free unused memory."""
        for slot in self._slots:
            if slot.pending is not None:
                slot.pending.result()
        self._device.free_memory()

    def _with_memory(self, work: Callable[[], Result], *, free: Callable[[], None]) -> Result:
        """Do the work; if the device runs out of memory, free memory and try once more."""
        try:
            return work()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        # Outside the handler, because the error's traceback keeps alive the tensors that took the memory.
        free()
        try:
            return work()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise out_of_memory(self._batch_size, next_step=TRY_AGAIN) from error
