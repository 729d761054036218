"""Count predictions in confusion matrices: streaming, mergeable, square up to 4,096 classes and sparse beyond.

Sits between predictions and metrics. Rows are the truth, columns the prediction. For any number of images, memory is
K * K * 8 bytes if square; if sparse, 16 bytes per slot of a table of the pairs that occur, at least half empty. All ids
of a batch are checked before any of them is counted.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import numpy as np

from vitscore.errors import LabelError, UsageError
from vitscore.kernels.arrays import IntArray, as_array, as_ids, check_same_length
from vitscore.kernels.compiled import compiled

LARGEST_SQUARE = 4096
"""Largest number of classes with a square confusion matrix (128 MiB); beyond, only the pairs that occur are kept."""


class SparseConfusion(NamedTuple):
    """A confusion matrix as the pairs that occur, sorted by row, then column."""

    rows: IntArray
    cols: IntArray
    counts: IntArray
    shape: tuple[int, int]


Confusion: TypeAlias = "IntArray | SparseConfusion"


def add_counts(confusion_KK: IntArray, labels_B: Any, preds_B: Any) -> int:
    """Add one batch of predictions to a running confusion matrix, in place.

    Streaming keeps memory at K * K * 8 bytes for any number of images.

    Args:
        confusion_KK: int64, C-contiguous; rows are the truth, columns the prediction.
        labels_B: int32 or int64 class ids in [0, K), or -1 for a sample without a label; its prediction is ignored.
        preds_B: int32 or int64 class ids in [0, K), same length.

    Returns:
        The number of rows counted.

    Raises:
        LabelError: an id is outside [0, K); nothing was counted.
        UsageError: the arrays differ in length, or the counts are not a contiguous int64 matrix.
    """
    labels_B, preds_B = as_ids(labels_B), as_ids(preds_B, "predictions")
    if len(labels_B) != len(preds_B):
        check_same_length(labels=labels_B, predictions=preds_B)
    num_classes = len(confusion_KK)
    if confusion_KK.shape != (num_classes, num_classes) or confusion_KK.dtype.str != np.dtype(np.int64).str:
        got = f"{confusion_KK.dtype} of shape {confusion_KK.shape}"
        raise UsageError("counts are not a confusion matrix", expected="int64 of shape (K, K)", got=got)
    if not confusion_KK.flags.c_contiguous:
        raise UsageError("counts cannot be added in place", expected="a C-contiguous confusion matrix")
    num_counted = _add_counts(confusion_KK, labels_B, preds_B)
    if num_counted < 0:
        raise _out_of_range(labels_B, preds_B, num_classes)
    return int(num_counted)


class ConfusionCounts:
    """A confusion matrix that is filled batch by batch, with torchmetrics' argument order (predictions, target)."""

    def __init__(self, num_classes: int) -> None:
        if num_classes < 1:
            raise UsageError("no classes to count", expected="at least 1", got=str(num_classes))
        self.num_classes = num_classes
        self.is_square = num_classes <= LARGEST_SQUARE
        self.reset()

    def reset(self) -> None:
        """Set all counts to zero."""
        self.num_samples = 0
        size = self.num_classes if self.is_square else 0
        self._square_KK: IntArray = np.zeros((size, size), np.int64)
        self._keys_S: IntArray = np.full(0 if self.is_square else 1024, -1, np.int64)
        self._counts_S: IntArray = np.zeros(len(self._keys_S), np.int64)
        self._num_pairs = 0

    def update(self, preds: Any, target: Any) -> int:
        """Count a batch.

        Args:
            preds: class ids (B), or scores (B, K), whose largest is the prediction; ties go to the lowest id.
            target: class ids (B), or -1 for samples that are not counted.

        Returns:
            The number of samples counted.
        """
        preds = as_array(preds)
        if preds.ndim == 2:
            if preds.shape[1] != self.num_classes:
                expected = f"{self.num_classes} columns"
                raise LabelError("scores have the wrong shape", expected=expected, got=str(preds.shape[1]))
            preds = preds.argmax(axis=1)
        labels_B, preds_B = as_ids(target), as_ids(preds, "predictions")
        if self.is_square:
            num_counted = add_counts(self._square_KK, labels_B, preds_B)
        else:
            num_counted = self._add_pairs(labels_B, preds_B, np.ones(len(labels_B), np.int64))
        self.num_samples += num_counted
        return num_counted

    def merge(self, other: ConfusionCounts) -> None:
        """Add the counts of another object, as if its samples had been counted here."""
        if other.num_classes != self.num_classes:
            got = f"{other.num_classes} classes"
            raise UsageError("counts cannot be merged", expected=f"{self.num_classes} classes", got=got)
        if self.is_square:
            self._square_KK += other._square_KK
        else:
            rows, cols, counts, _ = other.pairs()
            self._add_pairs(rows, cols, counts)
        self.num_samples += other.num_samples

    def compute(self) -> Confusion:
        """Return the counts: int64 (K, K) with the truth as rows, or the pairs that occur beyond 4,096 classes."""
        return self._square_KK.copy() if self.is_square else self.pairs()

    def pairs(self) -> SparseConfusion:
        """Return the pairs that occur, for any number of classes."""
        shape = (self.num_classes, self.num_classes)
        if self.is_square:
            rows, cols = np.nonzero(self._square_KK)
            return SparseConfusion(rows.astype(np.int64), cols.astype(np.int64), self._square_KK[rows, cols], shape)
        slots = np.flatnonzero(self._keys_S >= 0)
        slots = slots[np.argsort(self._keys_S[slots])]
        keys = self._keys_S[slots]
        return SparseConfusion(keys // self.num_classes, keys % self.num_classes, self._counts_S[slots], shape)

    def totals(self) -> tuple[IntArray, IntArray, IntArray]:
        """Return the correct predictions, the samples and the predictions of every class."""
        if self.is_square:
            square_KK = self._square_KK
            return np.diagonal(square_KK).copy(), square_KK.sum(axis=1), square_KK.sum(axis=0)
        rows, cols, counts, _ = self.pairs()
        totals = np.zeros((3, self.num_classes), np.int64)
        is_right = rows == cols
        np.add.at(totals[0], rows[is_right], counts[is_right])
        np.add.at(totals[1], rows, counts)
        np.add.at(totals[2], cols, counts)
        return totals[0], totals[1], totals[2]

    def _add_pairs(self, labels_B: IntArray, preds_B: IntArray, counts_B: IntArray) -> int:
        check_same_length(labels=labels_B, predictions=preds_B)
        if not _are_in_range(labels_B, preds_B, self.num_classes):
            raise _out_of_range(labels_B, preds_B, self.num_classes)
        # Blocks limit the slots that are reserved for pairs that may not occur.
        num_counted, block = 0, 65536
        for start in range(0, len(labels_B), block):
            rows = slice(start, start + block)
            self._make_room(min(block, len(labels_B) - start))
            added, num_new = _add_to_table(
                self._keys_S, self._counts_S, labels_B[rows], preds_B[rows], counts_B[rows], self.num_classes
            )
            num_counted += added
            self._num_pairs += num_new
        return num_counted

    def _make_room(self, num_new: int) -> None:
        num_slots = len(self._keys_S)
        while 2 * (self._num_pairs + num_new) > num_slots:
            num_slots *= 2
        if num_slots > len(self._keys_S):
            rows, cols, counts, _ = self.pairs()
            self._keys_S, self._counts_S = np.full(num_slots, -1, np.int64), np.zeros(num_slots, np.int64)
            _add_to_table(self._keys_S, self._counts_S, rows, cols, counts, self.num_classes)


def _out_of_range(labels_B: IntArray, preds_B: IntArray, num_classes: int) -> LabelError:
    outside = (labels_B < -1) | (labels_B >= num_classes)
    if outside.any():
        row = int(np.argmax(outside))
        return LabelError(
            "label out of range",
            where=f"row {row}",
            expected=f"0..{num_classes - 1}, or -1 for none",
            got=str(labels_B[row]),
        )
    outside = ((preds_B < 0) | (preds_B >= num_classes)) & (labels_B != -1)
    row = int(np.argmax(outside))
    return LabelError(
        "prediction out of range", where=f"row {row}", expected=f"0..{num_classes - 1}", got=str(preds_B[row])
    )


@compiled
def _are_in_range(labels_B: IntArray, preds_B: IntArray, num_classes: int) -> bool:
    num_bad = 0
    for i in range(labels_B.shape[0]):
        label, pred = labels_B[i], preds_B[i]
        is_bad = (label < -1) | (label >= num_classes) | ((label != -1) & ((pred < 0) | (pred >= num_classes)))
        num_bad += int(is_bad)
    return num_bad == 0


@compiled
def _add_counts(confusion_KK: IntArray, labels_B: IntArray, preds_B: IntArray) -> int:
    """Count a batch, or return -1 and count nothing if an id is out of range."""
    if not _are_in_range(labels_B, preds_B, confusion_KK.shape[0]):
        return -1
    num_counted = 0
    for i in range(labels_B.shape[0]):
        if labels_B[i] >= 0:
            confusion_KK[labels_B[i], preds_B[i]] += 1
            num_counted += 1
    return num_counted


@compiled
def _add_to_table(
    keys_S: IntArray, counts_S: IntArray, labels_B: IntArray, preds_B: IntArray, weights_B: IntArray, num_classes: int
) -> tuple[int, int]:
    """Add to an open-addressing table whose size is a power of two; return the samples counted and the slots taken."""
    mask = keys_S.shape[0] - 1
    num_counted, num_new = 0, 0
    for i in range(labels_B.shape[0]):
        if labels_B[i] < 0:
            continue
        key = np.int64(labels_B[i]) * num_classes + preds_B[i]
        mixed = np.uint64(key) * np.uint64(0x9E3779B97F4A7C15)
        slot = np.int64(mixed >> np.uint64(20)) & mask
        while keys_S[slot] != key and keys_S[slot] >= 0:
            slot = (slot + 1) & mask
        if keys_S[slot] < 0:
            keys_S[slot] = key
            num_new += 1
        counts_S[slot] += weights_B[i]
        num_counted += weights_B[i]
    return num_counted, num_new
