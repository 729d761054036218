"""A value of sixteen float32 lanes for use inside kernels, the contents of a vector register.

numba compiles long loops over numbers to vector instructions, but computes the numbers that do not fill a whole vector
step one by one, which takes half of the time for rows of 17 or 96 numbers. A kernel written with lanes controls the
contents of the registers itself. On a CPU with shorter registers, a value takes several of them.

    total = zero_lanes()
    for at in range(0, len(numbers), LANES):
        total = times_plus(load_lanes(numbers, at), load_lanes(weights, at), total)

Addresses are not checked: the caller must ensure that `LANES` numbers can be loaded or stored. The functions work only
inside compiled kernels.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import binding, ir  # type: ignore[import-untyped, unused-ignore]
from numba import types
from numba.core.datamodel import models
from numba.extending import intrinsic, overload, register_jitable, register_model

from vitscore.kernels.bits import bfloat16_of_float, float_of_bits

LANES = 16

_INT16, _INT32, _FLOAT = ir.IntType(16), ir.IntType(32), ir.FloatType()
_INT16S, _INT32S, _FLOATS = (ir.VectorType(number, LANES) for number in (_INT16, _INT32, _FLOAT))
_POWER = (0.00956051, 0.05591704, 0.24024981, 0.69312197, 0.99999919)
"""Polynomial of 2^r on [-1/2, 1/2], fitted on Chebyshev points by least squares of the relative error, which is at most
2.7e-6; rounding to bfloat16 costs 2e-3."""
_SMALLEST = -126.0
_TO_WHOLE = 1.5 * 2**23
"""Added to a float32 of up to 2^22, it leaves no bits for a fraction: the last bits are the nearest whole number."""
_TO_BFLOAT = np.int32(16)
_MAY_FUSE = ("contract",)
"""Allows the product and the sum to be rounded once, if the CPU has an instruction for both."""


class _BFloat(ir.Type):  # type: ignore[misc, unused-ignore]
    """LLVM's type `bfloat`, which llvmlite lacks."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


_BFLOATS = ir.VectorType(_BFloat(), LANES)
_ROUNDS_TO_BFLOAT = bool(binding.get_host_cpu_features().get("avx512bf16"))
"""Whether this CPU rounds lanes to bfloat16 by one instruction; without it, LLVM would round them one by one."""


class LanesType(types.Type):  # type: ignore[misc, unused-ignore]
    """The numba type of a value of lanes."""

    def __init__(self) -> None:
        super().__init__(name=f"float32x{LANES}")


LANES_TYPE = LanesType()


@register_model(LanesType)  # type: ignore[untyped-decorator, unused-ignore]
class _LanesModel(models.PrimitiveModel):  # type: ignore[misc, unused-ignore]
    def __init__(self, manager: Any, numba_type: Any) -> None:
        super().__init__(manager, numba_type, _FLOATS)


@intrinsic  # type: ignore[untyped-decorator, unused-ignore]
def zero_lanes(typing_context: Any) -> Any:
    """Return zero in every lane."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _constants(_FLOATS, 0.0)

    return LANES_TYPE(), generate


@intrinsic  # type: ignore[untyped-decorator, unused-ignore]
def spread(typing_context: Any, number: Any) -> Any:
    """Return a float32 in every lane."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _spread(builder, args[0], _FLOATS)

    return LANES_TYPE(types.float32), generate


@intrinsic  # type: ignore[untyped-decorator, unused-ignore]
def spread_from(typing_context: Any, numbers: Any, at: Any) -> Any:
    """Return the number at `at` of a flat float32 array in every lane."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _spread(builder, builder.load(_address(context, builder, signature, args)), _FLOATS)

    return LANES_TYPE(numbers, types.intp), generate


@intrinsic  # type: ignore[untyped-decorator, unused-ignore]
def load_lanes(typing_context: Any, numbers: Any, at: Any) -> Any:
    """Load the numbers of a flat float32 array from `at` on."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _load(builder, _address(context, builder, signature, args), _FLOATS, align=4)

    return LANES_TYPE(numbers, types.intp), generate


@intrinsic  # type: ignore[untyped-decorator, unused-ignore]
def store_lanes(typing_context: Any, numbers: Any, at: Any, value: Any) -> Any:
    """Store lanes in a flat float32 array from `at` on."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _store(builder, args[2], _address(context, builder, signature, args), align=4)
        return context.get_dummy_value()

    return types.void(numbers, types.intp, LANES_TYPE), generate


@intrinsic  # type: ignore[untyped-decorator, unused-ignore]
def load_bfloat16(typing_context: Any, bits: Any, at: Any) -> Any:
    """Load bfloat16 numbers from their bits in a flat int16 array from `at` on."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        short = _load(builder, _address(context, builder, signature, args), _INT16S, align=2)
        return builder.bitcast(builder.shl(builder.zext(short, _INT32S), _constants(_INT32S, 16)), _FLOATS)

    return LANES_TYPE(bits, types.intp), generate


@intrinsic  # type: ignore[untyped-decorator, unused-ignore]
def store_bfloat16(typing_context: Any, bits: Any, at: Any, value: Any) -> Any:
    """Round lanes to bfloat16, ties to even, and store the bits in a flat int16 array from `at` on.

    A NaN stays NaN if its lower 16 bits are zero, as in every NaN that comes from bfloat16 numbers or from an invalid
    operation. CPUs with an instruction for rounding replace numbers below 2^-126 by zero.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if _ROUNDS_TO_BFLOAT:
            short = builder.bitcast(builder.fptrunc(args[2], _BFLOATS), _INT16S)
        else:
            wide = builder.bitcast(args[2], _INT32S)
            last = builder.and_(builder.lshr(wide, _constants(_INT32S, 16)), _constants(_INT32S, 1))
            rounded = builder.add(builder.add(wide, _constants(_INT32S, 0x7FFF)), last)
            short = builder.trunc(builder.lshr(rounded, _constants(_INT32S, 16)), _INT16S)
        _store(builder, short, _address(context, builder, signature, args), align=2)
        return context.get_dummy_value()

    return types.void(bits, types.intp, LANES_TYPE), generate


@intrinsic  # type: ignore[untyped-decorator, unused-ignore]
def get(typing_context: Any, numbers: Any, at: Any) -> Any:
    """Load a number of a flat array, without support for negative indices, which doubles the cost of a load."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(_address(context, builder, signature, args))

    return numbers.dtype(numbers, types.intp), generate


@intrinsic  # type: ignore[untyped-decorator, unused-ignore]
def put(typing_context: Any, numbers: Any, at: Any, number: Any) -> Any:
    """Store a number in a flat array, without support for negative indices."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(args[2], _address(context, builder, signature, args))
        return context.get_dummy_value()

    return types.void(numbers, types.intp, numbers.dtype), generate


@intrinsic  # type: ignore[untyped-decorator, unused-ignore]
def times_plus(typing_context: Any, factor: Any, other: Any, term: Any) -> Any:
    """Return factor * other + term."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _times_plus(builder, *args)

    return LANES_TYPE(LANES_TYPE, LANES_TYPE, LANES_TYPE), generate


@intrinsic  # type: ignore[untyped-decorator, unused-ignore]
def larger(typing_context: Any, value: Any, other: Any) -> Any:
    """Return the larger number of each pair; if one of them is NaN, that of `other`."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.select(builder.fcmp_ordered(">", args[0], args[1]), args[0], args[1])

    return LANES_TYPE(LANES_TYPE, LANES_TYPE), generate


@intrinsic  # type: ignore[untyped-decorator, unused-ignore]
def first_of(typing_context: Any, value: Any, count: Any, rest: Any) -> Any:
    """Return the first `count` lanes of a value (all if `count` is `LANES` or more), and the others of `rest`."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        lane = ir.Constant(_INT32S, list(range(LANES)))
        count = _spread(builder, builder.trunc(args[1], _INT32), _INT32S)
        return builder.select(builder.icmp_signed("<", lane, count), args[0], args[2])

    return LANES_TYPE(LANES_TYPE, types.intp, LANES_TYPE), generate


@intrinsic  # type: ignore[untyped-decorator, unused-ignore]
def sum_of(typing_context: Any, value: Any) -> Any:
    """Return the sum of all lanes as a float32, by adding halves, then halves of the result."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _folded(builder, args[0], builder.fadd)

    return types.float32(LANES_TYPE), generate


@intrinsic  # type: ignore[untyped-decorator, unused-ignore]
def largest_of(typing_context: Any, value: Any) -> Any:
    """Return the largest lane as a float32; undefined if a lane is NaN."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        def larger(left: Any, right: Any) -> Any:
            return builder.select(builder.fcmp_ordered(">", left, right), left, right)

        return _folded(builder, args[0], larger)

    return types.float32(LANES_TYPE), generate


@intrinsic  # type: ignore[untyped-decorator, unused-ignore]
def power_of_two(typing_context: Any, exponent: Any) -> Any:
    """Return 2^exponent for exponents up to 0, within one part in 370,000; 2^-126 for -126 and below, NaN for NaN."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        smallest, to_whole = _constants(_FLOATS, _SMALLEST), _constants(_FLOATS, _TO_WHOLE)
        exponent = builder.select(builder.fcmp_ordered("<", args[0], smallest), smallest, args[0])
        moved = builder.fadd(exponent, to_whole)
        rest = builder.fsub(exponent, builder.fsub(moved, to_whole))
        power = _constants(_FLOATS, _POWER[0])
        for coefficient in _POWER[1:]:
            power = _times_plus(builder, rest, power, _constants(_FLOATS, coefficient))
        # The shift discards the bits of the added constant.
        whole = builder.shl(builder.bitcast(moved, _INT32S), _constants(_INT32S, 23))
        bits = builder.add(builder.bitcast(power, _INT32S), whole)
        return builder.bitcast(bits, _FLOATS)

    return LANES_TYPE(LANES_TYPE), generate


@register_jitable(inline="always")  # type: ignore[untyped-decorator, unused-ignore]
def widen(bits: Any, at: int, count: int, numbers: Any) -> None:
    """Convert `count` bfloat16 numbers, by their bits from `at` on, to the first numbers of a flat float32 array."""
    whole = count // LANES * LANES
    for i in range(0, whole, LANES):
        store_lanes(numbers, i, load_bfloat16(bits, at + i))
    for i in range(whole, count):
        put(numbers, i, float_of_bits(np.int32(np.int32(get(bits, at + i)) << _TO_BFLOAT)))


@register_jitable(inline="always")  # type: ignore[untyped-decorator, unused-ignore]
def narrow(numbers: Any, at: int, count: int, bits: Any, to: int) -> None:
    """Round `count` float32 numbers from `at` on to bfloat16, and store their bits from `to` on.

    NaN is treated as in `store_bfloat16`.
    """
    whole = count // LANES * LANES
    for i in range(0, whole, LANES):
        store_bfloat16(bits, to + i, load_lanes(numbers, at + i))
    for i in range(whole, count):
        put(bits, to + i, bfloat16_of_float(get(numbers, at + i)))


def _register(python_operator: Callable[..., Any], name: str) -> None:
    """Define a Python operator for lanes."""

    @intrinsic  # type: ignore[untyped-decorator, unused-ignore]
    def compute(typing_context: Any, left: Any, right: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return getattr(builder, name)(*args)

        return LANES_TYPE(LANES_TYPE, LANES_TYPE), generate

    @overload(python_operator, strict=False)  # type: ignore[untyped-decorator, unused-ignore]
    def choose(left: Any, right: Any) -> Any:
        if isinstance(left, LanesType) and isinstance(right, LanesType):
            return lambda left, right: compute(left, right)
        return None


_register(operator.add, "fadd")
_register(operator.sub, "fsub")
_register(operator.mul, "fmul")
_register(operator.truediv, "fdiv")


def _constants(vector: Any, number: float) -> Any:
    """Return a constant in every lane."""
    return ir.Constant(vector, [float(np.float32(number)) if vector is _FLOATS else number] * LANES)


def _spread(builder: Any, number: Any, vector: Any) -> Any:
    undefined = ir.Constant(vector, ir.Undefined)
    first = builder.insert_element(undefined, number, ir.Constant(_INT32, 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(_INT32S, [0] * LANES))


def _folded(builder: Any, lanes: Any, join: Callable[[Any, Any], Any]) -> Any:
    """Reduce lanes to one number, half by half: the order is the same for every row and machine."""
    width = LANES
    while width > 1:
        width //= 2
        undefined = ir.Constant(lanes.type, ir.Undefined)
        index = ir.VectorType(_INT32, width)
        halves = [
            builder.shuffle_vector(lanes, undefined, ir.Constant(index, list(range(start, start + width))))
            for start in (0, width)
        ]
        lanes = join(*halves)
    return builder.extract_element(lanes, ir.Constant(_INT32, 0))


def _times_plus(builder: Any, factor: Any, other: Any, term: Any) -> Any:
    return builder.fadd(builder.fmul(factor, other, flags=_MAY_FUSE), term, flags=_MAY_FUSE)


def _address(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    """Return the address of a number in a flat array; array and index are the first two arguments."""
    array = signature.args[0]
    if not isinstance(array, types.Array) or array.ndim != 1 or array.layout != "C":
        raise TypeError(f"lanes need a flat, contiguous array, got {array}")
    return builder.gep(context.make_array(array)(context, builder, args[0]).data, [args[1]])


def _load(builder: Any, address: Any, vector: Any, *, align: int) -> Any:
    loaded = builder.load(builder.bitcast(address, vector.as_pointer()))
    loaded.align = align
    return loaded


def _store(builder: Any, value: Any, address: Any, *, align: int) -> None:
    stored = builder.store(value, builder.bitcast(address, value.type.as_pointer()))
    stored.align = align
