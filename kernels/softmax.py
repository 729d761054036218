"""Softmax over rows of bfloat16 attention scores, in place.

Between the two matrix products of attention on a CPU (see `vitscore.attention`). torch's own takes 1.4 ms for the 48 x
197 rows of a ViT-Tiny batch of 16, and 3.7 MB of new memory each time; this takes 0.9 ms and none. The arithmetic is
fp32 from the scores to the probabilities, which are rounded to bfloat16 once. A row's bits depend on that row alone.
"""

from __future__ import annotations

import math

import numpy as np

from vitscore.errors import UsageError
from vitscore.kernels.arrays import IntArray
from vitscore.kernels.bits import bits_of_float, float_of_bits
from vitscore.kernels.compiled import compiled

# Axes: R rows, N scores of a row.

_LOG2_E = math.log2(math.e)
# 2^r on [-1/2, 1/2], least squares in relative error on Chebyshev points: off by 2.7e-6, where bfloat16 rounds by 2e-3.
_C0, _C1, _C2 = np.float32(0.99999919), np.float32(0.69312197), np.float32(0.24024981)
_C3, _C4 = np.float32(0.05591704), np.float32(0.00956051)
_HALF, _SMALLEST = np.float32(0.5), np.float32(-126)
_SIGN_AND_REST = np.int32(0x7FFF)
_TO_BFLOAT = np.int32(16)
_NAN = np.int16(0x7FC0)
_UNIT = np.float32(1 << 30)


def softmax_bfloat16(scores_RN: IntArray, scale: float) -> None:
    """Replace each row of scores by softmax(scale * row).

    Args:
        scores_RN: the bits of bfloat16 numbers as int16, C-contiguous; overwritten.
        scale: above 0. A row with a NaN, with +inf, or with nothing but -inf becomes NaN, as in torch; a score that is
            87 / scale or more below the largest has the probability 2^-126, where torch has 0.

    Raises:
        UsageError: another type, shape or scale.
    """
    is_table = scores_RN.ndim == 2 and scores_RN.dtype == np.int16 and scores_RN.flags.c_contiguous
    if not is_table or not scores_RN.shape[1] or not scale > 0:
        got = f"{scores_RN.dtype} of shape {scores_RN.shape}, scale {scale}"
        raise UsageError("scores are not a table", expected="int16 of shape (R, N), contiguous, scale above 0", got=got)
    _softmax(scores_RN, np.float32(scale * _LOG2_E))


@compiled
def _softmax(scores_RN: IntArray, scale: np.float32) -> None:
    num_rows, width = scores_RN.shape
    exp_N = np.empty(width, np.float32)
    for i in range(num_rows):
        row_N = scores_RN[i]
        # As integers of sign and magnitude, floats sort like numbers once the magnitude of negative ones is flipped.
        top = np.int32(-32768)
        for j in range(width):
            bits = np.int32(row_N[j])
            order = np.int32(bits ^ ((bits >> np.int32(15)) & _SIGN_AND_REST))
            top = order if order > top else top
        top_bits = np.int32(top ^ ((top >> np.int32(15)) & _SIGN_AND_REST))
        largest = float_of_bits(np.int32(top_bits << _TO_BFLOAT))
        # Up to 1 each, added up as integers: any order gives the same sum, so that it can be vectorised.
        total, num_wrong = np.int64(0), np.int32(0)
        for j in range(width):
            x = float_of_bits(np.int32(np.int32(row_N[j]) << _TO_BFLOAT))
            t = (x - largest) * scale
            num_wrong += np.int32(not (t == t))
            t = _SMALLEST if t < _SMALLEST else t
            power = np.int32(t - _HALF)
            r = t - np.float32(power)
            y = _C3 + r * _C4
            y = _C2 + r * y
            y = _C1 + r * y
            y = _C0 + r * y
            y = float_of_bits(np.int32(bits_of_float(y) + np.int32(power << np.int32(23))))
            exp_N[j] = y
            total += np.int64(np.int32(y * _UNIT))
        if num_wrong:
            row_N[:] = _NAN
            continue
        factor = np.float32(_UNIT / np.float64(total))
        for j in range(width):
            bits = bits_of_float(np.float32(exp_N[j] * factor))
            # Round to nearest, ties to even.
            bits = np.int32(bits + _SIGN_AND_REST + ((bits >> _TO_BFLOAT) & np.int32(1)))
            row_N[j] = np.int16(bits >> _TO_BFLOAT)
