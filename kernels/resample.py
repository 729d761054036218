"""Redraw a confusion matrix: one bootstrap replicate from the counts.

Used for confidence intervals. Every cell is redrawn from a Poisson distribution whose mean is the cell's count, and
only the totals that figures need are kept: correct predictions, support and predictions of every class. The random
numbers come from SplitMix64, implemented here, so a seed gives the same replicate with all versions of NumPy and numba.
"""

from __future__ import annotations

import math

import numpy as np

from vitscore.kernels.arrays import FloatArray, IntArray
from vitscore.kernels.compiled import compiled

SMALL_MEAN = 32.0
"""Up to this mean a Poisson count is drawn exactly, by inversion; beyond, as a rounded normal."""


def redraw_totals(
    rows_S: IntArray, cols_S: IntArray, means_S: FloatArray, *, num_classes: int, seed: int
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Redraw every cell of a confusion matrix and return the totals per class.

    Args:
        rows_S: int64, the truth of each cell, in [0, K).
        cols_S: int64, the prediction of each cell; K or more is a prediction outside the classes.
        means_S: float64, the mean of each cell.
        num_classes: K.
        seed: the seed of the replicate.

    Returns:
        Correct predictions, support and predictions of each class, float64.
    """
    totals_3K = np.zeros((3, num_classes), np.float64)
    _redraw_totals(rows_S, cols_S, means_S, np.uint64(seed), totals_3K)
    return totals_3K[0], totals_3K[1], totals_3K[2]


_STEP = np.uint64(0x9E3779B97F4A7C15)
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_S30, _S27, _S31, _S11 = np.uint64(30), np.uint64(27), np.uint64(31), np.uint64(11)


@compiled
def _uniform(state: np.uint64) -> float:
    """Return SplitMix64's output for a 64-bit state as a number in (0, 1)."""
    z = (state ^ (state >> _S30)) * _MIX_1
    z = (z ^ (z >> _S27)) * _MIX_2
    z = z ^ (z >> _S31)
    return (float(z >> _S11) + 0.5) / 9007199254740992.0


@compiled
def _redraw_totals(
    rows_S: IntArray, cols_S: IntArray, means_S: FloatArray, seed: np.uint64, totals_3K: FloatArray
) -> None:
    num_classes = totals_3K.shape[1]
    state = np.uint64(seed) * _MIX_2 + _STEP
    for s in range(means_S.shape[0]):
        mean = means_S[s]
        state += _STEP
        u = _uniform(state)
        drawn = 0.0
        if mean <= SMALL_MEAN:
            chance = math.exp(-mean)
            below = chance
            while u > below and chance > 1e-18:
                drawn += 1.0
                chance *= mean / drawn
                below += chance
        else:
            state += _STEP
            normal = math.sqrt(-2.0 * math.log(u)) * math.cos(2.0 * math.pi * _uniform(state))
            drawn = max(math.floor(mean + math.sqrt(mean) * normal + 0.5), 0.0)
        row, col = rows_S[s], cols_S[s]
        totals_3K[1, row] += drawn
        if col < num_classes:
            totals_3K[2, col] += drawn
            if row == col:
                totals_3K[0, row] += drawn
