"""Paired comparison of two models by class: the difference of macro F1 with its interval, and every class's F1.

`pairs` counts only which model is right. `PairedCells` counts every combination of label and two answers: it streams,
merges, and takes 16 bytes for each (label, answer, answer) that occurs, so at most 16 bytes per sample. The difference
of macro F1 is a smooth function of these counts, so its variance follows from the influence of every sample (the delta
method, or infinitesimal jackknife); no random numbers are drawn.

Before that, half a sample that only the first model has right and half a sample that only the second has right are
distributed over the classes by support, as Agresti and Min do for the difference of paired rates: models that agree on
50 images need not be equal. Neither files nor tensors appear here. Axes: B rows, K classes, S non-empty cells.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from vitscore.kernels.arrays import Array, as_ids, check_same_length
from vitscore.metrics.intervals import Z

MOST_PENDING = 1 << 20


class Cells(NamedTuple):
    """Non-empty cells and their counts; an answer of K is outside the classes."""

    labels_S: Array
    a_S: Array
    b_S: Array
    counts_S: Array


class PairedCells:
    """Counts of (label, answer of a, answer of b), independent of how the rows are split into batches."""

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self._keys_S = np.zeros(0, np.int64)
        self._counts_S = np.zeros(0, np.int64)
        self._pending: list[Array] = []
        self._num_pending = 0

    def update(self, labels_B: Any, preds_a_B: Any, preds_b_B: Any) -> int:
        """Count a batch, skipping rows with an id of -1; return the number of rows counted."""
        labels_B, preds_a_B, preds_b_B = (as_ids(ids_B).astype(np.int64) for ids_B in (labels_B, preds_a_B, preds_b_B))
        check_same_length(labels=labels_B, a=preds_a_B, b=preds_b_B)
        counted_B = (labels_B >= 0) & (preds_a_B >= 0) & (preds_b_B >= 0)
        self._add(labels_B[counted_B], preds_a_B[counted_B], preds_b_B[counted_B])
        return int(counted_B.sum())

    def count_wrong(self, labels_B: Any) -> None:
        """Count labelled samples without any prediction: they add to their class's support and to no column."""
        labels_B = as_ids(labels_B).astype(np.int64)
        labels_B = labels_B[labels_B >= 0]
        outside_B = np.full(len(labels_B), self.num_classes)
        self._add(labels_B, outside_B, outside_B)

    def merge(self, other: PairedCells) -> None:
        """Add the counts of `other`, as if its samples had been counted here."""
        self._compact()
        other._compact()
        self._set(np.concatenate([self._keys_S, other._keys_S]), np.concatenate([self._counts_S, other._counts_S]))

    def compute(self) -> Cells:
        """Return the cells, sorted by label, then by answers."""
        self._compact()
        width = self.num_classes + 1
        labels_S, answers_S = np.divmod(self._keys_S, width * width)
        a_S, b_S = np.divmod(answers_S, width)
        return Cells(labels_S, a_S, b_S, self._counts_S)

    def _add(self, labels_B: Array, a_B: Array, b_B: Array) -> None:
        width = self.num_classes + 1
        self._pending.append((labels_B * width + a_B) * width + b_B)
        self._num_pending += len(labels_B)
        if self._num_pending > MOST_PENDING:
            self._compact()

    def _compact(self) -> None:
        if self._pending:
            keys = np.concatenate([self._keys_S, *self._pending])
            counts = np.concatenate([self._counts_S, np.ones(self._num_pending, np.int64)])
            self._pending, self._num_pending = [], 0
            self._set(keys, counts)

    def _set(self, keys: Array, counts: Array) -> None:
        order = np.argsort(keys, kind="stable")
        keys, counts = keys[order], counts[order]
        starts = np.flatnonzero(np.diff(keys, prepend=-1))
        self._keys_S = keys[starts]
        self._counts_S = np.add.reduceat(counts, starts) if len(starts) else counts


def macro_f1_difference(cells: Cells, num_classes: int) -> tuple[float, list[float]] | None:
    """Return macro F1 of a minus that of b, and its 95% interval; None without samples.

    In simulations with 2 to 100 classes the interval covers the truth 93 to 97 times in 100 from about ten samples per
    class on, more often if the models hardly ever differ, and 80 to 92 times with two to six samples per class.
    """
    if not cells.counts_S.sum():
        return None
    difference = _macro_f1(cells, "a", num_classes) - _macro_f1(cells, "b", num_classes)
    smoothed = _smoothed(cells, num_classes)
    share_S = _influence(smoothed, "a", num_classes) - _influence(smoothed, "b", num_classes)
    half = Z * math.sqrt(math.fsum(smoothed.counts_S * share_S * share_S))
    centre = _macro_f1(smoothed, "a", num_classes) - _macro_f1(smoothed, "b", num_classes)
    low, high = min(centre - half, difference), max(centre + half, difference)
    return difference, [max(low, -1.0), min(high, 1.0)]


def _answers(cells: Cells, model: str) -> Array:
    return cells.a_S if model == "a" else cells.b_S


def _f1(cells: Cells, model: str, num_classes: int) -> tuple[Array, Array]:
    """Return F1 of every class, and its denominator: support plus predictions."""
    answers_S, counts_S = _answers(cells, model), cells.counts_S
    is_right_S = answers_S == cells.labels_S
    right_K = np.bincount(cells.labels_S[is_right_S], weights=counts_S[is_right_S], minlength=num_classes)
    support_K = np.bincount(cells.labels_S, weights=counts_S, minlength=num_classes)
    both_K = support_K + np.bincount(answers_S, weights=counts_S, minlength=num_classes + 1)[:num_classes]
    return 2 * right_K / np.where(both_K > 0, both_K, 1), both_K


def _macro_f1(cells: Cells, model: str, num_classes: int) -> float:
    return math.fsum(_f1(cells, model, num_classes)[0]) / num_classes


def _influence(cells: Cells, model: str, num_classes: int) -> Array:
    """Return the change of macro F1 per additional sample in each cell."""
    f1_K, both_K = _f1(cells, model, num_classes)
    one_K = np.divide(1.0, both_K, out=np.zeros(num_classes), where=both_K > 0)
    loss_K = np.append(f1_K * one_K, 0.0)  # an answer outside the classes lowers no class's precision
    answers_S = _answers(cells, model)
    gain_S = np.where(answers_S == cells.labels_S, 2 * one_K[cells.labels_S], 0.0)
    return np.asarray((gain_S - loss_K[cells.labels_S] - loss_K[answers_S]) / num_classes)


def _smoothed(cells: Cells, num_classes: int) -> Cells:
    """Add half a sample right in a only and half right in b only, by support; a wrong answer names the next class."""
    support_K = np.bincount(cells.labels_S, weights=cells.counts_S, minlength=num_classes)
    present = np.flatnonzero(support_K)
    share = 0.5 * support_K[present] / support_K.sum()
    following = np.roll(present, -1) if len(present) > 1 else np.full(1, num_classes)
    return Cells(
        np.concatenate([cells.labels_S, present, present]),
        np.concatenate([cells.a_S, present, following]),
        np.concatenate([cells.b_S, following, present]),
        np.concatenate([cells.counts_S.astype(np.float64), share, share]),
    )


def class_differences(cells: Cells, num_classes: int) -> dict[str, Array]:
    """Return for every class: support, F1 of a and of b, and the numbers of samples that only a or only b has right."""
    a_is_right_S, b_is_right_S = cells.a_S == cells.labels_S, cells.b_S == cells.labels_S

    def total(is_wanted_S: Array) -> Array:
        wanted = cells.counts_S * is_wanted_S
        return np.bincount(cells.labels_S, weights=wanted, minlength=num_classes).astype(np.int64)

    return {
        "support": total(np.ones(len(cells.labels_S), bool)),
        "f1_a": _f1(cells, "a", num_classes)[0],
        "f1_b": _f1(cells, "b", num_classes)[0],
        "only_a": total(a_is_right_S & ~b_is_right_S),
        "only_b": total(b_is_right_S & ~a_is_right_S),
    }
