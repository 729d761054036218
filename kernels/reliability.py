"""Count confidence against correctness in reliability bins, with sums that do not depend on batch boundaries.

Used beside the confusion counts. Floating-point totals are accumulated row by row, so a million rows in one call give
the same bits as in a thousand calls, and metrics folded from parts of any size agree byte for byte.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from vitscore.errors import UsageError
from vitscore.kernels.arrays import FloatArray, IntArray, as_array, check_same_length
from vitscore.kernels.compiled import compiled

NUM_BINS = 15
"""Number of equal-width bins over [0, 1]; a bin includes its lower edge, and the last one also 1."""


def add_reliability(
    counts_M: IntArray, confidence_M: FloatArray, correct_M: IntArray, prob_B: Any, is_correct_B: Any
) -> int:
    """Add a batch to the reliability bins, in place.

    Args:
        counts_M: int64, samples in each of M equal bins of confidence.
        confidence_M: float64, sums of their confidences.
        correct_M: int64, numbers of correct predictions among them.
        prob_B: the confidence of each prediction, in [0, 1].
        is_correct_B: whether each prediction is correct.

    Returns:
        The number of rows added.

    Raises:
        UsageError: a confidence is outside [0, 1] or NaN; nothing was added.
    """
    prob_B = np.ascontiguousarray(as_array(prob_B), dtype=np.float32)
    is_correct_B = np.ascontiguousarray(as_array(is_correct_B), dtype=np.bool_)
    check_same_length(confidence=prob_B, correct=is_correct_B)
    check_same_length(counts=counts_M, confidence=confidence_M, correct=correct_M)
    # Rounding may put a probability slightly above 1; anything more is an error of the caller.
    outside = ~((prob_B >= 0.0) & (prob_B <= 1.0 + 1e-5))
    if outside.any():
        raise UsageError("confidence out of range", expected="0 to 1", got=str(prob_B[outside][0]))
    _add_reliability(counts_M, confidence_M, correct_M, prob_B, is_correct_B)
    return len(prob_B)


def add_in_order(total: float, values_B: Any) -> float:
    """Add values to a running float64 total, from first to last, and return the new total."""
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
