"""The kernels' twins on a GPU: predictions to counts and logits to predictions, without the host waiting for either.

They take anything with the CUDA array interface (torch and CuPy tensors, numba's own arrays) and run on the stream that
is given; nothing is copied and nothing is synchronised. So a bad id cannot raise at once: the batch that has one is not
counted, and `compute` raises. Results are device arrays; `torch.as_tensor(x)` lends them to torch.

Under NUMBA_ENABLE_CUDASIM=1, set before the import, the same code runs on NumPy arrays without a GPU. Axes: B rows, K
classes, T the k of top-k, S slots of a hash table.
"""

from __future__ import annotations

import functools
import math
import os
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numba import cuda

from vitscore.errors import LabelError, UsageError
from vitscore.kernels.arrays import FloatArray, IntArray
from vitscore.kernels.counts import LARGEST_SQUARE, Confusion, SparseConfusion

IS_SIMULATED = os.environ.get("NUMBA_ENABLE_CUDASIM") == "1"
THREADS = 8 if IS_SIMULATED else 128
"""Threads of a block; a simulated thread is a thread of Python."""
SLOTS = 1 << (10 if IS_SIMULATED else 25)
"""Slots of the table beyond 4,096 classes: 512 MB, for 16 million pairs at the least before it is full."""
_BAD_ID, _FULL = 1, 2
_LARGEST_FLOAT = float(np.finfo(np.float32).max)

# numba warns of every grid under 128 blocks: a batch of few rows is no mistake, and nobody waits for its kernel.
warnings.filterwarnings("ignore", message="Grid size .* low occupancy")

AnyFunction = TypeVar("AnyFunction", bound=Callable[..., Any])


def on_device(function: AnyFunction) -> Any:
    """A kernel, to be launched as `function[grid, block, stream](...)`; kept on disk where a folder allows it."""
    try:
        return cuda.jit(cache=True)(function)
    except RuntimeError:
        # numba found no folder to write to (a read-only install and a read-only home).
        return cuda.jit(function)


def on_device_inside(function: AnyFunction) -> AnyFunction:
    """A function that kernels call."""
    inlined: AnyFunction = cuda.jit(device=True)(function)
    return inlined


def lend(values: Any) -> Any:
    """A CUDA tensor as numba's device array, without a copy; a simulated device takes NumPy arrays as they are."""
    return values if IS_SIMULATED or isinstance(values, np.ndarray) else cuda.as_cuda_array(values, sync=False)


@functools.lru_cache
def as_stream(pointer: int) -> Any:
    """A stream by its pointer (`torch.cuda.current_stream().cuda_stream`); 0 is the default one.

    The same object each time, since numba keeps prepared launches by it.
    """
    return 0 if IS_SIMULATED or pointer == 0 else cuda.external_stream(pointer)


class DeviceConfusionCounts:
    """`ConfusionCounts` on a GPU: square up to 4,096 classes, a hash table of fixed size beyond."""

    def __init__(self, num_classes: int) -> None:
        if num_classes < 1:
            raise UsageError("no classes to count", expected="at least 1", got=str(num_classes))
        self.num_classes = num_classes
        self.is_square = num_classes <= LARGEST_SQUARE
        self.reset()

    def reset(self) -> None:
        """Forget every count."""
        self._flags = cuda.to_device(np.zeros(2, np.int32))
        """What went wrong so far, and what is wrong with the batch under way."""
        if self.is_square:
            self._counts = cuda.to_device(np.zeros((self.num_classes, self.num_classes), np.int64))
        else:
            self._keys_S = cuda.to_device(np.full(SLOTS, -1, np.int64))
            self._counts = cuda.to_device(np.zeros(SLOTS, np.int64))

    def update(self, preds: Any, target: Any, *, stream: int = 0) -> None:
        """Count a batch; returns at once.

        Args:
            preds: int32 or int64 class ids (B) on the device.
            target: int32 or int64 class ids (B) on the device; -1 is not counted.
            stream: the pointer of the stream that made them.
        """
        preds_B, labels_B = lend(preds), lend(target)
        if len(preds_B.shape) != 1 or preds_B.shape != labels_B.shape:
            got = f"{preds_B.shape} and {labels_B.shape}"
            raise UsageError("arrays differ in length", expected="one id a sample in each", got=got)
        num_rows = labels_B.shape[0]
        if not num_rows:
            return
        grid, on = (num_rows + THREADS - 1) // THREADS, as_stream(stream)
        _start_batch[1, 1, on](self._flags)
        _check_ids[grid, THREADS, on](self._flags, labels_B, preds_B, self.num_classes)
        if self.is_square:
            _count_square[grid, THREADS, on](self._flags, self._counts, labels_B, preds_B)
        else:
            _count_table[grid, THREADS, on](
                self._flags, self._keys_S, self._counts, labels_B, preds_B, self.num_classes
            )

    def merge(self, other: DeviceConfusionCounts, *, stream: int = 0) -> None:
        """Add another's counts, as if its samples had been counted here; returns at once."""
        if other.num_classes != self.num_classes:
            got = f"{other.num_classes} classes"
            raise UsageError("counts cannot be merged", expected=f"{self.num_classes} classes", got=got)
        on = as_stream(stream)
        if self.is_square:
            grid = (self.num_classes + THREADS - 1) // THREADS
            _merge_square[grid, THREADS, on](self._flags, self._counts, other._flags, other._counts)
        else:
            grid = SLOTS // THREADS
            _merge_table[grid, THREADS, on](
                self._flags, self._keys_S, self._counts, other._flags, other._keys_S, other._counts
            )

    def compute(self) -> Confusion:
        """The counts, on the host; waits for the device.

        Raises:
            LabelError: a batch had an id outside [0, K), and was not counted.
            UsageError: there were more pairs of classes than the table holds.
        """
        problem = int(self._flags.copy_to_host()[0])
        if problem == _BAD_ID:
            expected = f"0..{self.num_classes - 1}, or -1 for a missing label"
            raise LabelError("id out of range", where="a batch on the device", expected=expected)
        if problem == _FULL:
            raise UsageError("too many pairs of classes", expected=f"at most {SLOTS:,}", next_step="Count on the CPU.")
        counts = self._counts.copy_to_host()
        if self.is_square:
            return np.asarray(counts)
        keys_S = self._keys_S.copy_to_host()
        slots = np.flatnonzero(keys_S >= 0)
        slots = slots[np.argsort(keys_S[slots])]
        rows, cols = np.divmod(keys_S[slots], self.num_classes)
        return SparseConfusion(rows, cols, counts[slots], (self.num_classes, self.num_classes))


@on_device
def _start_batch(flags: IntArray) -> None:
    flags[1] = 0


@on_device
def _check_ids(flags: IntArray, labels_B: IntArray, preds_B: IntArray, num_classes: int) -> None:
    i = cuda.grid(1)
    if i < labels_B.shape[0]:
        label, pred = labels_B[i], preds_B[i]
        if label < -1 or label >= num_classes or (label != -1 and (pred < 0 or pred >= num_classes)):
            flags[1] = _BAD_ID  # every thread that writes here writes the same
            cuda.atomic.max(flags, 0, _BAD_ID)


@on_device
def _count_square(flags: IntArray, confusion_KK: IntArray, labels_B: IntArray, preds_B: IntArray) -> None:
    i = cuda.grid(1)
    if flags[1] == 0 and i < labels_B.shape[0] and labels_B[i] >= 0:
        cuda.atomic.add(confusion_KK, (labels_B[i], preds_B[i]), 1)


@on_device_inside
def _add_to_table(flags: IntArray, keys_S: IntArray, counts_S: IntArray, key: int, count: int) -> None:
    num_slots = keys_S.shape[0]
    slot = (key * 40503) & (num_slots - 1)
    for _ in range(num_slots):
        found = cuda.atomic.cas(keys_S, slot, np.int64(-1), key)
        if found == -1 or found == key:
            cuda.atomic.add(counts_S, slot, count)
            return
        slot = (slot + 1) & (num_slots - 1)
    cuda.atomic.max(flags, 0, _FULL)


@on_device
def _count_table(
    flags: IntArray, keys_S: IntArray, counts_S: IntArray, labels_B: IntArray, preds_B: IntArray, num_classes: int
) -> None:
    i = cuda.grid(1)
    if flags[1] == 0 and i < labels_B.shape[0] and labels_B[i] >= 0:
        _add_to_table(flags, keys_S, counts_S, np.int64(labels_B[i]) * num_classes + preds_B[i], 1)


@on_device
def _merge_square(flags: IntArray, counts_KK: IntArray, their_flags: IntArray, their_counts_KK: IntArray) -> None:
    i = cuda.grid(1)
    if i == 0:
        cuda.atomic.max(flags, 0, their_flags[0])
    if i < counts_KK.shape[0]:
        for j in range(counts_KK.shape[1]):
            counts_KK[i, j] += their_counts_KK[i, j]


@on_device
def _merge_table(
    flags: IntArray,
    keys_S: IntArray,
    counts_S: IntArray,
    their_flags: IntArray,
    their_keys_S: IntArray,
    their_counts_S: IntArray,
) -> None:
    i = cuda.grid(1)
    if i == 0:
        cuda.atomic.max(flags, 0, their_flags[0])
    if i < their_keys_S.shape[0] and their_keys_S[i] >= 0:
        _add_to_table(flags, keys_S, counts_S, their_keys_S[i], their_counts_S[i])


class DeviceRowScores(NamedTuple):
    """What `score_rows` gives, as device arrays; rows beyond the batch's are those of an earlier one."""

    ids_BT: Any
    """int32; column 0 is the prediction, -1 where the row is not finite."""
    probs_BT: Any
    figures_5B: Any
    """float32: label log-probability, sum of squares, log-sum-exp, margin, entropy."""
    is_finite_B: Any
    """uint8."""


class DeviceRows:
    """`score_rows` on a GPU, into buffers that are made once and used again: a batch's scores last until the next.

    Args:
        max_rows: the largest batch.
        num_classes: K.
        k: how many of the best classes to keep; K of them where k is larger.
        scores: where to write, instead of buffers made here: arrays of those shapes and types on the device.
    """

    def __init__(self, max_rows: int, num_classes: int, *, k: int = 5, scores: DeviceRowScores | None = None) -> None:
        if k < 1 or num_classes < 1:
            raise UsageError("nothing to rank", expected="k and K of at least 1", got=f"{k} and {num_classes}")
        self.num_classes = num_classes
        width = min(k, num_classes)
        if scores is None:
            scores = DeviceRowScores(
                cuda.device_array((max_rows, width), np.int32),
                cuda.device_array((max_rows, width), np.float32),
                cuda.device_array((5, max_rows), np.float32),
                cuda.device_array(max_rows, np.uint8),
            )
        self.scores = DeviceRowScores(*map(lend, scores))
        shapes = [tuple(array.shape) for array in self.scores]
        if shapes != [(max_rows, width), (max_rows, width), (5, max_rows), (max_rows,)]:
            raise UsageError("buffers do not fit", expected=f"{max_rows} rows, {width} classes", got=str(shapes))

    def score(self, logits: Any, labels: Any, *, stream: int = 0) -> DeviceRowScores:
        """Score a batch; returns at once.

        Args:
            logits: float32 (B, K) on the device, contiguous.
            labels: int32 or int64 class ids (B) on the device; anything outside [0, K) is taken as no label.
            stream: the pointer of the stream that made them.
        """
        logits_BK, labels_B = lend(logits), lend(labels)
        num_rows = logits_BK.shape[0]
        if logits_BK.shape[1] != self.num_classes or labels_B.shape[0] != num_rows:
            got = f"{logits_BK.shape} and {labels_B.shape}"
            raise UsageError("logits do not fit", expected=f"(B, {self.num_classes}) and (B,)", got=got)
        if num_rows > self.scores.ids_BT.shape[0]:
            expected = f"at most {self.scores.ids_BT.shape[0]} rows"
            raise UsageError("batch is too large", expected=expected, got=str(num_rows))
        if num_rows:
            _score_rows[num_rows, THREADS, as_stream(stream)](logits_BK, labels_B, *self.scores)
        return self.scores


@on_device_inside
def _reduce_best(values_H: FloatArray, ids_H: IntArray, thread: int) -> None:
    """Bring the best of all threads to place 0: the largest value, the lowest id among equals; -1 is nobody."""
    half = THREADS // 2
    while half > 0:
        cuda.syncthreads()
        if thread < half:
            other = ids_H[thread + half]
            is_better = other >= 0 and (
                ids_H[thread] < 0
                or values_H[thread + half] > values_H[thread]
                or (values_H[thread + half] == values_H[thread] and other < ids_H[thread])
            )
            if is_better:
                values_H[thread] = values_H[thread + half]
                ids_H[thread] = other
        half //= 2
    cuda.syncthreads()


@on_device_inside
def _reduce_sum(sums_H: FloatArray, thread: int) -> None:
    """Add all threads up at place 0, always in the same order."""
    half = THREADS // 2
    while half > 0:
        cuda.syncthreads()
        if thread < half:
            sums_H[thread] += sums_H[thread + half]
        half //= 2
    cuda.syncthreads()


@on_device
def _score_rows(
    logits_BK: FloatArray,
    labels_B: IntArray,
    ids_BT: IntArray,
    probs_BT: FloatArray,
    figures_5B: FloatArray,
    is_finite_B: IntArray,
) -> None:
    """A block a row; every thread takes every THREADS-th class, so a row's result does not depend on its neighbours."""
    values_H = cuda.shared.array(THREADS, np.float32)
    ids_H = cuda.shared.array(THREADS, np.int32)
    sums_H = cuda.shared.array(THREADS, np.float64)
    i, thread = cuda.blockIdx.x, cuda.threadIdx.x
    num_classes, width = logits_BK.shape[1], ids_BT.shape[1]

    num_bad = 0.0
    for j in range(thread, num_classes, THREADS):
        x = logits_BK[i, j]
        if math.isnan(x) or math.isinf(x):
            num_bad += 1.0
    sums_H[thread] = num_bad
    _reduce_sum(sums_H, thread)
    is_finite = sums_H[0] == 0.0
    cuda.syncthreads()
    if not is_finite:
        if thread == 0:
            is_finite_B[i] = 0
            for t in range(width):
                ids_BT[i, t] = -1
                probs_BT[i, t] = math.nan
            for f in range(5):
                figures_5B[f, i] = math.nan
        return

    # The best classes one after the other: each time the best of those that come after the last one found.
    top, last, last_id, margin = 0.0, 0.0, -1, 0.0
    for t in range(min(max(width, 2), num_classes)):
        values_H[thread] = 0.0
        ids_H[thread] = -1
        for j in range(thread, num_classes, THREADS):
            x = logits_BK[i, j]
            is_after = t == 0 or x < last or (x == last and j > last_id)
            if is_after and (ids_H[thread] < 0 or x > values_H[thread]):
                values_H[thread] = x
                ids_H[thread] = j
        _reduce_best(values_H, ids_H, thread)
        last, last_id = values_H[0], ids_H[0]
        cuda.syncthreads()
        if t == 0:
            top = last
        if t == 1:
            margin = np.float64(top) - np.float64(last)
        if thread == 0 and t < width:
            ids_BT[i, t] = last_id

    total = squares = products = 0.0
    for j in range(thread, num_classes, THREADS):
        shifted = np.float64(logits_BK[i, j]) - np.float64(top)
        e = math.exp(shifted)
        total += e
        squares += e * e
        products += e * shifted
    sums_H[thread] = total
    _reduce_sum(sums_H, thread)
    total = sums_H[0]
    cuda.syncthreads()
    sums_H[thread] = squares
    _reduce_sum(sums_H, thread)
    squares = sums_H[0]
    cuda.syncthreads()
    sums_H[thread] = products
    _reduce_sum(sums_H, thread)
    products = sums_H[0]
    if thread == 0:
        is_finite_B[i] = 1
        log_total = math.log(total)
        for t in range(width):
            probs_BT[i, t] = math.exp(np.float64(logits_BK[i, ids_BT[i, t]]) - np.float64(top)) / total
        label = labels_B[i]
        figures_5B[0, i] = math.nan
        if label >= 0 and label < num_classes:
            figures_5B[0, i] = max(np.float64(logits_BK[i, label]) - np.float64(top) - log_total, -_LARGEST_FLOAT)
        figures_5B[1, i] = squares / (total * total)
        figures_5B[2, i] = np.float64(top) + log_total
        figures_5B[3, i] = min(margin, _LARGEST_FLOAT)
        figures_5B[4, i] = max(log_total - products / total, 0.0)
