"""NumPy twins of the kernels in float64, slow but simple, as oracles for tests.

Axes: B rows, K classes, M bins, S cells of a confusion matrix, T the k of top-k.
"""

from __future__ import annotations

import math

import numpy as np

from vitscore.kernels.arrays import BoolArray, FloatArray, IntArray
from vitscore.kernels.rows import RowScores


def score_rows_reference(logits_BK: FloatArray, labels_B: IntArray, k: int = 5) -> RowScores:
    """Compute row scores with a stable sort for the ranks and a shifted softmax in float64."""
    logits_BK = np.asarray(logits_BK, np.float64)
    num_rows, num_classes = logits_BK.shape
    is_finite_B: BoolArray = np.asarray(np.isfinite(logits_BK).all(axis=1))
    z_BK = np.where(is_finite_B[:, None], logits_BK, 0.0)
    order_BK = np.argsort(-z_BK, axis=1, kind="stable")
    ranked_BK = np.take_along_axis(z_BK, order_BK, axis=1)
    shifted_BK = z_BK - ranked_BK[:, :1]
    log_total_B = np.log(np.exp(shifted_BK).sum(axis=1))
    logprob_BK = shifted_BK - log_total_B[:, None]
    prob_BK = np.exp(logprob_BK)
    topk_BT = order_BK[:, :k].astype(np.int32)
    topk_prob_BT = np.take_along_axis(prob_BK, order_BK, axis=1)[:, :k]
    label_logprob_B = np.where(labels_B >= 0, logprob_BK[np.arange(num_rows), np.maximum(labels_B, 0)], np.nan)
    margin_B = ranked_BK[:, 0] - ranked_BK[:, 1] if num_classes > 1 else np.zeros(num_rows)
    entropy_B = log_total_B - (prob_BK * shifted_BK).sum(axis=1)

    def flagged(values: FloatArray) -> FloatArray:
        kept = is_finite_B if values.ndim == 1 else is_finite_B[:, None]
        return np.where(kept, values, np.nan).astype(np.float32)

    topk_BT = np.where(is_finite_B[:, None], topk_BT, -1).astype(np.int32)
    return RowScores(
        pred=topk_BT[:, 0],
        prob=flagged(topk_prob_BT[:, 0]),
        topk=topk_BT,
        topk_prob=flagged(topk_prob_BT),
        label_logprob=flagged(label_logprob_B),
        sum_sq_prob=flagged((prob_BK**2).sum(axis=1)),
        log_sum_exp=flagged(ranked_BK[:, 0] + log_total_B),
        margin=flagged(margin_B),
        entropy=flagged(entropy_B),
        is_finite=is_finite_B,
    )


def count_reference(labels_B: IntArray, preds_B: IntArray, num_classes: int) -> IntArray:
    """Return the confusion matrix of a batch, with the truth as rows."""
    confusion_KK = np.zeros((num_classes, num_classes), np.int64)
    is_counted_B = labels_B >= 0
    np.add.at(confusion_KK, (labels_B[is_counted_B], preds_B[is_counted_B]), 1)
    return confusion_KK


def reliability_reference(
    prob_B: FloatArray, is_correct_B: IntArray, num_bins: int
) -> tuple[IntArray, FloatArray, IntArray]:
    """Return the samples, summed confidence and correct predictions of every bin."""
    places_B = np.minimum((prob_B.astype(np.float64) * num_bins).astype(int), num_bins - 1)
    counts_M = np.bincount(places_B, minlength=num_bins)
    confidence_M = np.bincount(places_B, weights=prob_B.astype(np.float64), minlength=num_bins)
    correct_M = np.bincount(places_B[is_correct_B.astype(bool)], minlength=num_bins)
    return counts_M, confidence_M, correct_M


def redraw_reference(
    rows_S: IntArray, cols_S: IntArray, means_S: FloatArray, *, num_classes: int, seed: int
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Draw one bootstrap replicate with Python's integers: SplitMix64, inversion, and the Box-Muller transform."""
    limit, step = 1 << 64, 0x9E3779B97F4A7C15
    state = (seed * 0x94D049BB133111EB + step) % limit

    def uniform() -> float:
        nonlocal state
        state = (state + step) % limit
        z = state
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % limit
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % limit
        return (((z ^ (z >> 31)) >> 11) + 0.5) / 2**53

    totals_3K = np.zeros((3, num_classes))
    for row, col, mean in zip(rows_S.tolist(), cols_S.tolist(), means_S.tolist(), strict=True):
        u, drawn = uniform(), 0
        if mean <= 32:
            chance = below = math.exp(-mean)
            while u > below and chance > 1e-18:
                drawn += 1
                chance *= mean / drawn
                below += chance
        else:
            normal = math.sqrt(-2 * math.log(u)) * math.cos(2 * math.pi * uniform())
            drawn = max(math.floor(mean + math.sqrt(mean) * normal + 0.5), 0)
        totals_3K[1, row] += drawn
        if col < num_classes:
            totals_3K[2, col] += drawn
            totals_3K[0, row] += drawn * (row == col)
    return totals_3K[0], totals_3K[1], totals_3K[2]
