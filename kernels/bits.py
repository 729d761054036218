"""Convert between floats and their bits inside kernels, in registers; NumPy's views would go through memory."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped, unused-ignore]
from numba import types
from numba.extending import intrinsic, register_jitable

# All int32: one wider number in a loop halves the length of its vectors.
_BELOW_HALF, _LAST_BIT, _LOST_BITS = np.int32(0x7FFF), np.int32(1), np.int32(16)


@intrinsic  # type: ignore[untyped-decorator, unused-ignore]
def float_of_bits(typing_context: Any, bits: Any) -> Any:
    """Reinterpret the bits of an int32 as a float32."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.int32), generate


@intrinsic  # type: ignore[untyped-decorator, unused-ignore]
def bits_of_float(typing_context: Any, value: Any) -> Any:
    """Reinterpret the bits of a float32 as an int32."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.IntType(32))

    return types.int32(types.float32), generate


@register_jitable  # type: ignore[untyped-decorator, unused-ignore]
def bfloat16_of_float(value: Any) -> Any:
    """Round a float32 to bfloat16, ties to even, and return its bits as an int16; NaN is not supported."""
    bits = bits_of_float(value)
    bits = np.int32(bits + _BELOW_HALF + np.int32(np.int32(bits >> _LOST_BITS) & _LAST_BIT))
    return np.int16(bits >> _LOST_BITS)
