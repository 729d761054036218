"""Confidence against correctness: reliability bins, and sums whose value does not depend on how rows were cut.

Stands beside the confusion counts. Floating-point totals are carried through a batch row by row, so a million rows in
one call and the same rows in a thousand calls give the same bits: metrics folded from parts of any size agree byte
for byte.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from vitscore.errors import UsageError
from vitscore.kernels.arrays import FloatArray, IntArray, as_array, check_same_length
from vitscore.kernels.compiled import compiled

NUM_BINS = 15
"""Equal-width bins over [0, 1]; a bin holds its lower edge, the last one also 1."""


def add_reliability(
    counts_M: IntArray, confidence_M: FloatArray, correct_M: IntArray, prob_B: Any, is_correct_B: Any
) -> int:
    """Add a batch to the reliability bins, in place.

    Args:
        counts_M: int64, samples in each of M equal bins of confidence.
        confidence_M: float64, sum of their confidence.
        correct_M: int64, how many of them are right.
        prob_B: the confidence of each prediction, in [0, 1].
        is_correct_B: whether it is right.

    Returns:
        How many rows were added.

    Raises:
        UsageError: a confidence is outside [0, 1] or NaN; nothing was added.
    """
    prob_B = np.ascontiguousarray(as_array(prob_B), dtype=np.float32)
    is_correct_B = np.ascontiguousarray(as_array(is_correct_B), dtype=np.bool_)
    check_same_length(confidence=prob_B, correct=is_correct_B)
    check_same_length(counts=counts_M, confidence=confidence_M, correct=correct_M)
    # Rounding may leave a probability a hair above 1; anything more is a mistake of the caller.
    outside = ~((prob_B >= 0.0) & (prob_B <= 1.0 + 1e-5))
    if outside.any():
        raise UsageError("confidence out of range", expected="0 to 1", got=str(prob_B[outside][0]))
    _add_reliability(counts_M, confidence_M, correct_M, prob_B, is_correct_B)
    return len(prob_B)


def add_in_order(total: float, values_B: Any) -> float:
    """Add values to a running float64 total from the first to the last."""
    return float(_add_in_order(float(total), np.ascontiguousarray(as_array(values_B), dtype=np.float64)))


@compiled
def _add_reliability(
    counts_M: IntArray, confidence_M: FloatArray, correct_M: IntArray, prob_B: FloatArray, is_correct_B: Any
) -> None:
    num_bins = counts_M.shape[0]
    for i in range(prob_B.shape[0]):
        prob = np.float64(prob_B[i])
        place = min(int(prob * num_bins), num_bins - 1)
        counts_M[place] += 1
        confidence_M[place] += prob
        correct_M[place] += int(is_correct_B[i])


@compiled
def _add_in_order(total: float, values_B: FloatArray) -> float:
    for i in range(values_B.shape[0]):
        total += values_B[i]
    return total
