"""Pixels to predictions on a GPU: everything is put on one stream, and the host looks at results batches later.

    submit:   pixels ─► models ─► row kernel ─► copies into a slot of pinned memory ─► mark     (nothing waits)
    result:   wait for the mark ─► rows out of the slot; rows that were not finite once more in fp32

The twin of `forward.Forward`, with the same answers in the same shape. While the device computes a batch, the host
decodes, commits and puts the next ones on the stream: `depth` batches are under way, each with a slot of its own.

A slot holds its batch's pixels until its mark is reached. That keeps them for the rare rerun in fp32, and it means that
memory which a decoder owns goes back to it only when nothing on the device reads it any more.

The batch's shape is part of the run's identity, as it decides the last bits. So a batch for which memory lacks in the
middle of a run (a neighbour on the GPU took it) is computed again at the same shape when everything that can be has
been freed, and never in halves; when it lacks again, the run ends and can be gone on with.
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

TRY_AGAIN = "Free the GPU, and the same command goes on; or score anew with a smaller -b and --overwrite."


@dataclass
class Landing:
    """Where one model's outputs of one batch arrive on the host, in pinned memory."""

    scores: ScoreBuffer
    logits_BK: torch.Tensor | None
    embedding_BD: torch.Tensor | None


class Lane:
    """One model's way over the device: its forward, its row kernel, its landings.

    How the forward is launched is measured here (`launch`), on an idle device, just as it will be called.

    Args:
        model: loaded, on the device.
        device: the device.
        batch_size: rows of every forward.
        top_k: how many best classes to keep.
        save: which long outputs to keep.
        tta: the views that logits are averaged over.
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
        """Pinned memory for a batch."""
        ours, pinned = self._ranking.scores, self._device.pinned
        width, rows = ours.ids_BT.shape[1], self._batch_size
        return Landing(
            ScoreBuffer(pinned(tuple(ours.whole.shape), torch.uint8), max_rows=rows, width=width),
            pinned((rows, self.model.num_classes), torch.float32) if "logits" in self._save else None,
            pinned((rows, self.model.embedding_dim), torch.float32) if "embeddings" in self._save else None,
        )

    def compute(self, pixels: torch.Tensor, labels_B: torch.Tensor, landing: Landing) -> None:
        """Put a batch on the stream: forward, row kernel, copies to the host."""
        output, num_rows = self._run(pixels), len(labels_B)
        self._ranking.rank(output.logits[:num_rows], labels_B)
        self._device.copy(landing.scores.whole, self._ranking.scores.whole)
        if landing.logits_BK is not None:
            self._device.copy(landing.logits_BK[:num_rows], output.logits[:num_rows])
        if landing.embedding_BD is not None and output.embedding is not None:
            self._device.copy(landing.embedding_BD[:num_rows], output.embedding[:num_rows])

    def collect(self, landing: Landing, pixels: torch.Tensor, labels: Array, redo_if: Array) -> Ranked:
        """The predictions that have landed.

        Args:
            landing: reached.
            pixels: the batch, for a rerun.
            labels: int32 (B).
            redo_if: bool (B): which rows are computed again in fp32 where their logits are not finite.
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
    """One batch's pinned memory; `pending` is the batch that it belongs to until its results are taken."""

    labels_B: torch.Tensor
    landings: list[Landing]
    pending: Pending | None = None


class Pending:
    """A batch on the device; `result` waits for it, and may be called again."""

    def __init__(self, slot: Slot, mark: Mark, collect: Callable[[], Mapping[str, Ranked]]) -> None:
        self._slot: Slot | None = slot
        self._mark = mark
        self._collect: Callable[[], Mapping[str, Ranked]] | None = collect
        self._found: Mapping[str, Ranked] = {}
        slot.pending = self

    def result(self) -> Mapping[str, Ranked]:
        if self._collect is not None:
            self._mark.synchronize()
            self._found = self._collect()
            # With it go the pixels, and the slot is free for another batch.
            self._collect = None
            assert self._slot is not None
            self._slot.pending, self._slot = None, None
        return self._found


class CudaForward:
    """Runs all models on batches, on a GPU; called from one thread.

    Args:
        models: loaded, on the device and warmed up.
        device: the device.
        (the others: see `forward.Forward`)
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
        # One more than are left under way, for the batch that is being submitted.
        self._slots = [
            Slot(device.pinned((batch_size,), torch.int32), [lane.landing() for lane in self._lanes])
            for _ in range(self.depth + 1)
        ]
        self._num_submitted = 0

    @property
    def measured(self) -> Mapping[str, Measured]:
        return {lane.model.name: lane.launch for lane in self._lanes}

    def submit(self, decoded: Decoded, labels: Array) -> Pending:
        """Put a batch on the stream; `labels` int32 (B,), -1 where there is none.

        Raises:
            SetupError: the device has no memory for it, also after everything else was freed.
        """
        slot = self._slots[self._num_submitted % len(self._slots)]
        self._num_submitted += 1
        if slot.pending is not None:
            slot.pending.result()
        self._with_memory(partial(self._enqueue, slot, decoded, labels), free=self._free_memory)
        collect = partial(self._collect, slot, decoded, np.array(labels, np.int32))
        return Pending(slot, self._device.mark(), collect)

    def close(self) -> None:
        """Wait for the device, and drop what was not collected."""
        # Whatever is wrong with the device has been raised by then, where it was met.
        with contextlib.suppress(RuntimeError):
            self._device.free_memory()
        for slot in self._slots:
            slot.pending = None

    def _enqueue(self, slot: Slot, decoded: Decoded, labels: Array) -> None:
        """Put the whole batch on the stream; what was there of it already is done again."""
        num_rows = len(labels)
        labels_B = self._labels_B[:num_rows]
        with torch.inference_mode():
            slot.labels_B[:num_rows] = torch.from_numpy(np.asarray(labels, np.int32))
            self._device.copy(labels_B, slot.labels_B[:num_rows])
            for lane, landing in zip(self._lanes, slot.landings, strict=True):
                lane.compute(decoded.pixels[self.source[lane.model.name]], labels_B, landing)

    def _collect(self, slot: Slot, decoded: Decoded, labels: Array) -> Mapping[str, Ranked]:
        """The results of a batch whose mark is reached."""
        redo_if = np.full(len(labels), self._has_fp32_rerun)
        redo_if[list(decoded.faults)] = False
        found = {}
        with torch.inference_mode():
            for lane, landing in zip(self._lanes, slot.landings, strict=True):
                pixels = decoded.pixels[self.source[lane.model.name]]
                collect = partial(lane.collect, landing, pixels, labels, redo_if)
                found[lane.model.name] = self._with_memory(collect, free=self._device.free_memory)
        return found

    def _free_memory(self) -> None:
        """Take the results of all batches under way, whose pixels are let go, and give back what nothing holds."""
        for slot in self._slots:
            if slot.pending is not None:
                slot.pending.result()
        self._device.free_memory()

    def _with_memory(self, work: Callable[[], Result], *, free: Callable[[], None]) -> Result:
        """Do the work; where the device's memory is not enough for it, once more with what could be freed."""
        try:
            return work()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        # Outside the handler: the error holds its frames, and with them the tensors that took the memory.
        free()
        try:
            return work()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise out_of_memory(self._batch_size, next_step=TRY_AGAIN) from error
