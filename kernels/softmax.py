"""Softmax over rows of bfloat16 attention scores, in place.

Between the two matrix products of attention on a CPU (see `vitscore.attention`). torch's own takes 1.4 ms for the 48 x
197 rows of a ViT-Tiny batch of 16, and 3.7 MB of new memory each time; this takes 0.7 ms and none. The arithmetic is
fp32 from the scores to the probabilities, which are rounded to bfloat16 once. A row's bits depend on that row alone.
"""

from __future__ import annotations

import math

import numpy as np

from vitscore.errors import UsageError
from vitscore.kernels.arrays import IntArray
from vitscore.kernels.bits import bfloat16_of_float, bits_of_float, float_of_bits
from vitscore.kernels.compiled import compiled

# Axes: R rows, N scores of a row.

_LOG2_E = math.log2(math.e)
# 2^r on [-1/2, 1/2], least squares in relative error on Chebyshev points: off by 2.7e-6, where bfloat16 rounds by 2e-3.
_C0, _C1, _C2 = np.float32(0.99999919), np.float32(0.69312197), np.float32(0.24024981)
_C3, _C4 = np.float32(0.05591704), np.float32(0.00956051)
_HALF, _SMALLEST = np.float32(0.5), np.float32(-126)
# int32 throughout: with one wider number in a loop its vectors are half as long.
_REST = np.int32(0x7FFF)
_SIGN, _TO_BFLOAT, _TO_EXPONENT = np.int32(15), np.int32(16), np.int32(23)
_INFINITY, _MINUS_INFINITY = np.int32(0x7F80), np.int32(-0x7F81)
_NAN = np.int16(0x7FC0)
MOST_SCORES = 1 << 14
"""Of a row: with more, their sum would lose bits that bfloat16 has."""


def softmax_bfloat16(scores_RN: IntArray, scale: float) -> None:
    """Replace each row of scores by softmax(scale * row).

    Args:
        scores_RN: the bits of bfloat16 numbers as int16, C-contiguous, N up to `MOST_SCORES`; overwritten.
        scale: above 0. A row with a NaN, with +inf, or with nothing but -inf becomes NaN, as in torch; a score that is
            87 / scale or more below the largest has the probability 2^-126, where torch has 0.

    Raises:
        UsageError: another type, shape or scale.
    """
    is_table = scores_RN.ndim == 2 and scores_RN.dtype == np.int16 and scores_RN.flags.c_contiguous
    if not is_table or not 0 < scores_RN.shape[1] <= MOST_SCORES or not scale > 0:
        got = f"{scores_RN.dtype} of shape {scores_RN.shape}, scale {scale}"
        raise UsageError("scores are not a table", expected="int16 of shape (R, N), contiguous, scale above 0", got=got)
    # The sum of N numbers up to 1 is added up as integers: any order gives the same sum, so that it can be vectorised.
    unit = 1 << (30 - scores_RN.shape[1].bit_length())
    _softmax(scores_RN, np.float32(scale * _LOG2_E), np.float32(unit))


@compiled
def _softmax(scores_RN: IntArray, scale: np.float32, unit: np.float32) -> None:
    num_rows, width = scores_RN.shape
    exp_N = np.empty(width, np.float32)
    for i in range(num_rows):
        row_N = scores_RN[i]
        # As integers of sign and magnitude, floats sort like numbers once the magnitude of negative ones is flipped.
        top, largest_magnitude = np.int32(-32768), np.int32(0)
        for j in range(width):
            bits = np.int32(row_N[j])
            order = np.int32(bits ^ np.int32(np.int32(bits >> _SIGN) & _REST))
            top = order if order > top else top
            magnitude = np.int32(bits & _REST)
            largest_magnitude = magnitude if magnitude > largest_magnitude else largest_magnitude
        if largest_magnitude > _INFINITY or top == _INFINITY or top == _MINUS_INFINITY:
            row_N[:] = _NAN
            continue
        top_bits = np.int32(top ^ np.int32(np.int32(top >> _SIGN) & _REST))
        largest = float_of_bits(np.int32(top_bits << _TO_BFLOAT))
        for j in range(width):
            x = float_of_bits(np.int32(np.int32(row_N[j]) << _TO_BFLOAT))
            t = (x - largest) * scale
            t = _SMALLEST if t < _SMALLEST else t
            power = np.int32(t - _HALF)
            r = t - np.float32(power)
            y = _C3 + r * _C4
            y = _C2 + r * y
            y = _C1 + r * y
            y = _C0 + r * y
            exp_N[j] = float_of_bits(np.int32(bits_of_float(y) + np.int32(power << _TO_EXPONENT)))
        total = np.int32(0)
        for j in range(width):
            total = np.int32(total + np.int32(exp_N[j] * unit + _HALF))
        factor = np.float32(unit / np.float64(total))
        for j in range(width):
            row_N[j] = bfloat16_of_float(np.float32(exp_N[j] * factor))
