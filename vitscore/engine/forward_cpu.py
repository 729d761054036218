"""Pixels to predictions on a CPU, with several batches in parallel.

Each batch is computed by one thread, with one thread inside torch. Small batches then stay in a core's cache, no thread
waits for another at the end of every layer (with DALI's threads on the same cores, those waits cost more than the
work), and the bits of a row cannot depend on the number of threads.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import torch

from vitscore import kernels
from vitscore.decode.pixels import Decoded
from vitscore.engine.ranked import Array, Ranked, pad, share_geometries
from vitscore.models.test_time_views import over_views
from vitscore.plan.choices import Measured
from vitscore.rundir.parts import Predictions

if TYPE_CHECKING:
    from vitscore.models.image_model import ImageModel


class Forward:
    """Runs all models on batches.

    Args:
        models: loaded models, on their device.
        batch_size: rows of every forward; shorter batches are padded, and the padding's rows dropped.
        top_k: the number of best classes to keep.
        save: the long outputs to keep: logits, embeddings.
        num_workers: batches computed in parallel; 0 computes them on the caller's thread.
        has_fp32_rerun: whether rows with non-finite logits are computed again in fp32 (pointless if the run is fp32).
        tta: the test-time views that logits are averaged over.
    """

    def __init__(
        self,
        models: Sequence[ImageModel],
        *,
        batch_size: int,
        top_k: int,
        save: Sequence[str],
        num_workers: int,
        has_fp32_rerun: bool,
        tta: str = "none",
    ) -> None:
        self.geometries, self.source = share_geometries(models)
        self._batch_size = batch_size
        self._top_k = top_k
        self._save = save
        self._has_fp32_rerun = has_fp32_rerun
        self._tta = tta
        self._first = {model.name: model for model in models}
        self._redo_lock = threading.Lock()
        self.depth = max(num_workers, 1)
        self._pool = ThreadPoolExecutor(num_workers, thread_name_prefix="forward") if num_workers else None
        # Modules hold state during a forward, so each thread has its own replica; the weights are shared.
        self._idle: queue.SimpleQueue[Sequence[ImageModel]] = queue.SimpleQueue()
        for worker in range(self.depth):
            self._idle.put(models if worker == 0 else [model.replica() for model in models])

    def submit(self, decoded: Decoded, labels: Array) -> Future[Mapping[str, Ranked]]:
        """Start computing a batch's predictions by model; `labels` is int32 (B,), -1 for no label."""
        if self._pool is not None:
            return self._pool.submit(self._compute, decoded, labels)
        done: Future[Mapping[str, Ranked]] = Future()
        done.set_result(self._compute(decoded, labels))
        return done

    @property
    def measured(self) -> Mapping[str, Measured]:
        return {}

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def _compute(self, decoded: Decoded, labels: Array) -> Mapping[str, Ranked]:
        models = self._idle.get()
        try:
            with torch.inference_mode():
                return {model.name: self._rank(model, decoded, labels) for model in models}
        finally:
            self._idle.put(models)

    def _rank(self, model: ImageModel, decoded: Decoded, labels: Array) -> Ranked:
        num_rows = len(labels)
        pixels = pad(decoded.pixels[self.source[model.name]], self._batch_size)
        output = over_views(model, pixels, self._tta)
        logits_BK = output.logits[:num_rows].cpu().numpy()
        scores = kernels.score_rows(logits_BK, labels, self._top_k)
        embedding_BD = None if output.embedding is None else output.embedding[:num_rows].cpu().numpy()
        redo = ~scores.is_finite & self._has_fp32_rerun
        redo[list(decoded.faults)] = False
        if redo.any():
            with self._redo_lock:
                again = over_views(self._first[model.name].rerun_fp32, pixels, self._tta)
            logits_BK = np.where(redo[:, None], again.logits[:num_rows].cpu().numpy(), logits_BK)
            scores = kernels.score_rows(logits_BK, labels, self._top_k)
            if embedding_BD is not None and again.embedding is not None:
                embedding_BD = np.where(redo[:, None], again.embedding[:num_rows].cpu().numpy(), embedding_BD)
        predictions = Predictions.of(
            scores,
            logits=logits_BK if "logits" in self._save else None,
            embedding=embedding_BD if "embeddings" in self._save else None,
        )
        return Ranked(predictions, scores.is_finite, int(redo.sum()))
