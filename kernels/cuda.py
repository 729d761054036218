"""The CUDA version of the row kernel, which turns logits into predictions, and the code that CUDA kernels share.

The CUDA kernels (the counting kernel is in `cuda_counts`) take any object with the CUDA array interface (torch and CuPy
tensors, numba arrays) and run on the given stream; they copy nothing, and the host never waits. Results are device
arrays; `torch.as_tensor(x)` shares them with torch.

Under NUMBA_ENABLE_CUDASIM=1, set before the import, the same code runs on NumPy arrays without a GPU. Axes: B rows, K
classes, T the k of top-k, H the threads of a block.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import numpy as np

from vitscore.errors import UsageError
from vitscore.kernels.arrays import FloatArray, IntArray
from vitscore.kernels.numba_cuda import IS_SIMULATED, cuda

THREADS = 8 if IS_SIMULATED else 128
"""Threads per block; every simulated thread is a Python thread."""
_LARGEST_FLOAT = float(np.finfo(np.float32).max)

# numba warns of every grid with fewer than 128 blocks, but small batches are normal and their kernels are short.
warnings.filterwarnings("ignore", message="Grid size .* low occupancy")

AnyFunction = TypeVar("AnyFunction", bound=Callable[..., Any])


def on_device(function: AnyFunction) -> Any:
    """Compile a kernel, to be launched as `function[grid, block, stream](...)`; cached on disk if possible."""
    try:
        return cuda.jit(cache=True)(function)
    except RuntimeError:
        # numba finds no writable folder (a read-only install and a read-only home).
        return cuda.jit(function)


def on_device_inside(function: AnyFunction) -> AnyFunction:
    """Compile a function that kernels call."""
    inlined: AnyFunction = cuda.jit(device=True)(function)
    return inlined


def lend(values: Any) -> Any:
    """Return a CUDA tensor as a numba device array, without a copy; the simulator takes NumPy arrays as they are."""
    return values if IS_SIMULATED or isinstance(values, np.ndarray) else cuda.as_cuda_array(values, sync=False)


@functools.lru_cache
def as_stream(pointer: int) -> Any:
    """Return the stream with this pointer (`torch.cuda.current_stream().cuda_stream`); 0 is the default stream.

    The same pointer gives the same object, because numba caches prepared launches by stream object.
    """
    return 0 if IS_SIMULATED or pointer == 0 else cuda.external_stream(pointer)


def blocks(num_items: int) -> int:
    """Return the number of blocks for a kernel with one thread per item."""
    return (num_items + THREADS - 1) // THREADS


class DeviceRowScores(NamedTuple):
    """The results of `score_rows` as device arrays; rows beyond the batch keep values of earlier batches."""

    ids_BT: Any
    """int32; column 0 is the prediction; -1 in rows that are not finite."""
    probs_BT: Any
    figures_5B: Any
    """float32: label log-probability, sum of squares, log-sum-exp, margin, entropy."""
    is_finite_B: Any
    """uint8."""


class DeviceRows:
    """`score_rows` on a GPU, into buffers that are reused: the scores of a batch are valid until the next batch.

    Args:
        max_rows: the largest batch.
        num_classes: K.
        k: the number of best classes to keep, at most K.
        scores: device arrays to write to, with the shapes and types of `DeviceRowScores`; by default new ones.
    """

    def __init__(self, max_rows: int, num_classes: int, *, k: int = 5, scores: DeviceRowScores | None = None) -> None:
        if k < 1 or num_classes < 1:
            raise UsageError("no classes to rank", expected="k and K of at least 1", got=f"{k} and {num_classes}")
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
        """Start scoring a batch, and return without waiting.

        Args:
            logits: float32 (B, K) on the device, contiguous.
            labels: int32 or int64 class ids (B) on the device; ids outside [0, K) mean that the row has no label.
            stream: the pointer of the stream that computes them.
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
    """Reduce to index 0 the largest value of all threads, with the lowest id among equals; id -1 is an empty entry."""
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
    """Reduce to index 0 the sum over all threads, always in the same order."""
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
    """Score one row per block; each thread takes every THREADS-th class, so a row's result depends on that row only."""
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

    # Find the best classes one by one: each pass takes the best class that ranks after the previous one.
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
