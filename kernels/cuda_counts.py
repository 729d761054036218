"""The CUDA version of the counting kernel: predictions to counts, while the host never waits (inputs: see `cuda`).

torch's streams and the default stream do not wait for each other, so the counts keep their own order across streams:
every operation on them records an event, and the next operation waits for it on its stream. A bad id cannot raise
immediately: its batch is not counted, and `compute` raises.

Axes: B rows, K classes, S slots of a hash table.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from vitscore.errors import LabelError, UsageError
from vitscore.kernels.arrays import IntArray
from vitscore.kernels.counts import LARGEST_SQUARE, Confusion, SparseConfusion
from vitscore.kernels.cuda import THREADS, as_stream, blocks, lend, on_device, on_device_inside
from vitscore.kernels.numba_cuda import IS_SIMULATED, cuda

SLOTS = 1 << (10 if IS_SIMULATED else 25)
"""Slots of the hash table that is used above 4,096 classes: 512 MB, enough for at least 16 million pairs."""
_BAD_ID, _FULL = 1, 2


class DeviceConfusionCounts:
    """`ConfusionCounts` on a GPU: a square matrix up to 4,096 classes, a hash table of fixed size above.

    Calls may use different streams, given by pointer (`torch.cuda.current_stream().cuda_stream`; 0 is the default).
    """

    def __init__(self, num_classes: int, *, stream: int = 0) -> None:
        if num_classes < 1:
            raise UsageError("no classes to count", expected="at least 1", got=str(num_classes))
        self.num_classes = num_classes
        self.is_square = num_classes <= LARGEST_SQUARE
        self._done = cuda.event()
        """The event recorded after the last operation on these counts."""
        self._flags = cuda.device_array(2, np.int32)
        """The error of all batches so far, and the error of the batch under way; 0 is none."""
        self._counts = cuda.device_array((num_classes, num_classes) if self.is_square else SLOTS, np.int64)
        self._keys_S = None if self.is_square else cuda.device_array(SLOTS, np.int64)
        self.reset(stream=stream)

    def reset(self, *, stream: int = 0) -> None:
        """Set all counts to zero, without waiting."""
        with _turn(stream, self) as on:
            _fill[1, THREADS, on](self._flags, 0)
            _fill[blocks(self._counts.size), THREADS, on](self._counts.ravel(), 0)
            if self._keys_S is not None:
                _fill[blocks(SLOTS), THREADS, on](self._keys_S, -1)

    def update(self, preds: Any, target: Any, *, stream: int = 0) -> None:
        """Count a batch, without waiting.

        Args:
            preds: int32 or int64 class ids (B) on the device.
            target: int32 or int64 class ids (B) on the device; rows with -1 are not counted.
            stream: the pointer of the stream that computes them.
        """
        preds_B, labels_B = lend(preds), lend(target)
        if len(preds_B.shape) != 1 or preds_B.shape != labels_B.shape:
            got = f"{preds_B.shape} and {labels_B.shape}"
            raise UsageError("arrays differ in length", expected="one id a sample in each", got=got)
        num_rows = labels_B.shape[0]
        if not num_rows:
            return
        grid = blocks(num_rows)
        with _turn(stream, self) as on:
            _start_batch[1, 1, on](self._flags)
            _check_ids[grid, THREADS, on](self._flags, labels_B, preds_B, self.num_classes)
            if self.is_square:
                _count_square[grid, THREADS, on](self._flags, self._counts, labels_B, preds_B)
            else:
                _count_table[grid, THREADS, on](
                    self._flags, self._keys_S, self._counts, labels_B, preds_B, self.num_classes
                )

    def merge(self, other: DeviceConfusionCounts, *, stream: int = 0) -> None:
        """Add the counts of another instance, as if its samples had been counted here, without waiting."""
        if other.num_classes != self.num_classes:
            got = f"{other.num_classes} classes"
            raise UsageError("counts cannot be merged", expected=f"{self.num_classes} classes", got=got)
        with _turn(stream, self, other) as on:
            if self.is_square:
                _merge_square[blocks(self.num_classes), THREADS, on](
                    self._flags, self._counts, other._flags, other._counts
                )
            else:
                _merge_table[blocks(SLOTS), THREADS, on](
                    self._flags, self._keys_S, self._counts, other._flags, other._keys_S, other._counts
                )

    def compute(self, *, stream: int = 0) -> Confusion:
        """Wait for all operations on the counts, on all streams, and return the counts on the host.

        Raises:
            LabelError: a batch had an id outside [0, K) and was not counted.
            UsageError: there were more pairs of classes than the table has slots.
        """
        with _turn(stream, self) as on:
            flags, counts = self._flags.copy_to_host(stream=on), self._counts.copy_to_host(stream=on)
            keys_S = None if self._keys_S is None else self._keys_S.copy_to_host(stream=on)
        self._done.synchronize()
        problem = int(flags[0])
        if problem == _BAD_ID:
            expected = f"0..{self.num_classes - 1}, or -1 for a missing label"
            raise LabelError("id out of range", where="a batch on the device", expected=expected)
        if problem == _FULL:
            raise UsageError("too many pairs of classes", expected=f"at most {SLOTS:,}", next_step="Count on the CPU.")
        if keys_S is None:
            return np.asarray(counts)
        slots = np.flatnonzero(keys_S >= 0)
        slots = slots[np.argsort(keys_S[slots])]
        rows, cols = np.divmod(keys_S[slots], self.num_classes)
        return SparseConfusion(rows, cols, counts[slots], (self.num_classes, self.num_classes))


@contextlib.contextmanager
def _turn(stream: int, *counts: DeviceConfusionCounts) -> Iterator[Any]:
    """Order operations on some counts: on `stream`, after all earlier and before all later operations on them."""
    on = as_stream(stream)
    for one in counts:
        one._done.wait(on)
    yield on
    for one in counts:
        one._done.record(on)


@on_device
def _fill(values: IntArray, value: int) -> None:
    i = cuda.grid(1)
    if i < values.shape[0]:
        values[i] = value


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
        previous = cuda.atomic.cas(keys_S, slot, np.int64(-1), key)
        if previous == -1 or previous == key:
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
