"""Floats as their bits and back, inside kernels: what vector instructions need where NumPy would go through memory."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped, unused-ignore]
from numba import types
from numba.extending import intrinsic, register_jitable

# int32 throughout: with one wider number in a loop its vectors are half as long.
_BELOW_HALF, _LAST_BIT, _LOST_BITS = np.int32(0x7FFF), np.int32(1), np.int32(16)


@intrinsic  # type: ignore[untyped-decorator, unused-ignore]
def float_of_bits(typing_context: Any, bits: Any) -> Any:
    """The float32 whose bits are those of an int32."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.int32), generate


@intrinsic  # type: ignore[untyped-decorator, unused-ignore]
def bits_of_float(typing_context: Any, value: Any) -> Any:
    """The bits of a float32, as an int32."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.IntType(32))

    return types.int32(types.float32), generate


@register_jitable  # type: ignore[untyped-decorator, unused-ignore]
def bfloat16_of_float(value: Any) -> Any:
    """The bits of the bfloat16 nearest to a float32, of two the even one, as an int16; not for NaN."""
    bits = bits_of_float(value)
    bits = np.int32(bits + _BELOW_HALF + np.int32(np.int32(bits >> _LOST_BITS) & _LAST_BIT))
    return np.int16(bits >> _LOST_BITS)
