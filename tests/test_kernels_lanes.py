"""Operations of kernels on sixteen numbers at a time, compared with NumPy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import pytest
import torch

from vitscore.kernels.cpu_bf16 import lanes
from vitscore.kernels.cpu_bf16.lanes import LANES

SMALLEST, SIGN = np.float32(2.0**-126), np.int16(-0x8000)
"""Below this magnitude, a CPU may round numbers to zero."""
SOME = np.linspace(-4, 5, 3 * LANES).astype(np.float32)
OTHER = np.cos(np.arange(3 * LANES)).astype(np.float32)


def computed(change: Callable[[Any, Any, Any], Any]) -> np.ndarray:
    """Compile a function of three values of lanes, and return its result on numbers of `SOME` and `OTHER`."""
    function = numba.njit(change)

    @numba.njit
    def compute(some: Any, other: Any, out: Any) -> None:
        value = function(lanes.load_lanes(some, 3), lanes.load_lanes(other, 5), lanes.load_lanes(some, 20))
        lanes.store_lanes(out, 1, value)

    out = np.full(LANES + 2, 99, np.float32)
    compute(SOME, OTHER, out)
    assert out[0] == out[-1] == 99
    return out[1:-1]


A, B, C = SOME[3 : 3 + LANES], OTHER[5 : 5 + LANES], SOME[20 : 20 + LANES]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda a, b, c: a + b, A + B),
        (lambda a, b, c: a - b, A - B),
        (lambda a, b, c: a * b, A * B),
        (lambda a, b, c: a / b, A / B),
        (lambda a, b, c: lanes.larger(a, b), np.maximum(A, B)),
        (lambda a, b, c: lanes.zero_lanes(), 0 * A),
        (lambda a, b, c: lanes.spread(np.float32(2.5)), 0 * A + 2.5),
        (lambda a, b, c: lanes.first_of(a, 5, b), np.where(np.arange(LANES) < 5, A, B)),
        (lambda a, b, c: lanes.first_of(a, 0, b), B),
        (lambda a, b, c: lanes.first_of(a, LANES, b), A),
        (lambda a, b, c: lanes.first_of(a, -3, b), B),
        (lambda a, b, c: lanes.first_of(a, 40, b), A),
        (lambda a, b, c: lanes.spread(lanes.largest_of(b)), 0 * A + B.max()),
    ],
)
def test_results_equal_numpys(change: Callable[[Any, Any, Any], Any], expected: np.ndarray) -> None:
    np.testing.assert_array_equal(computed(change), expected)


def test_product_and_sum_are_rounded_once_or_twice() -> None:
    result = computed(lambda a, b, c: lanes.times_plus(a, b, c))
    exact = A.astype(np.float64) * B + C
    np.testing.assert_allclose(result, exact, rtol=1e-6, atol=1e-6)


def test_the_sum_of_all_lanes() -> None:
    result = computed(lambda a, b, c: lanes.spread(lanes.sum_of(a)))
    np.testing.assert_allclose(result, A.sum(dtype=np.float64), rtol=1e-6)
    assert len(set(result.tolist())) == 1


def powers(exponents: np.ndarray) -> np.ndarray:
    @numba.njit
    def compute(exponents: Any, out: Any) -> None:
        for at in range(0, exponents.size, LANES):
            lanes.store_lanes(out, at, lanes.power_of_two(lanes.load_lanes(exponents, at)))

    out = np.zeros_like(exponents)
    compute(exponents, out)
    return out


def test_powers_of_two() -> None:
    exponents = np.linspace(-126, 0, 16_000).astype(np.float32)
    np.testing.assert_allclose(powers(exponents), np.exp2(exponents.astype(np.float64)), rtol=3e-6)


def test_powers_of_two_out_of_range() -> None:
    given = np.array([-np.inf, -1e30, -127, np.nan] * 4, np.float32)
    np.testing.assert_allclose(powers(given), [2.0**-126, 2.0**-126, 2.0**-126, np.nan] * 4, rtol=3e-6)


def test_bfloat16_is_loaded_and_stored_unchanged() -> None:
    @numba.njit
    def copy(bits: Any, wide: Any, back: Any) -> None:
        for at in range(0, bits.size, LANES):
            value = lanes.load_bfloat16(bits, at)
            lanes.store_lanes(wide, at, value)
            lanes.store_bfloat16(back, at, value)

    bits = np.arange(1 << 16).astype(np.uint16).view(np.int16)
    wide, back = np.zeros(bits.size, np.float32), np.zeros(bits.size, np.int16)
    copy(bits, wide, back)
    np.testing.assert_array_equal(wide, torch.from_numpy(bits).view(torch.bfloat16).float().numpy())
    is_number, is_tiny = ~np.isnan(wide), np.abs(wide) < SMALLEST
    np.testing.assert_array_equal(back[is_number & ~is_tiny], bits[is_number & ~is_tiny])
    assert ((back == bits) | (back == (bits & SIGN)))[is_tiny].all()
    assert torch.from_numpy(back[~is_number]).view(torch.bfloat16).isnan().all()


def test_bfloat16_is_rounded_as_torch_rounds_it() -> None:
    @numba.njit
    def narrow(numbers: Any, bits: Any) -> None:
        for at in range(0, numbers.size, LANES):
            lanes.store_bfloat16(bits, at, lanes.load_lanes(numbers, at))

    random = np.random.default_rng(0).integers(0, 1 << 32, 160_000, dtype=np.uint32).view(np.float32)
    ties = ((np.arange(16_000, dtype=np.uint32) << 16) | 0x8000).view(np.float32)
    for numbers in (random[np.isfinite(random)][:150_000], ties, np.full(16, np.inf, np.float32)):
        numbers = numbers[: len(numbers) // LANES * LANES]
        bits = np.zeros(numbers.size, np.int16)
        narrow(numbers, bits)
        expected, is_tiny = torch.from_numpy(numbers).bfloat16().view(torch.int16).numpy(), np.abs(numbers) < SMALLEST
        np.testing.assert_array_equal(bits[~is_tiny], expected[~is_tiny])
        assert ((bits == expected) | (bits == (expected & SIGN)))[is_tiny].all()


def test_single_numbers_are_read_and_written() -> None:
    @numba.njit
    def turn(numbers: Any, out: Any) -> None:
        for at in range(numbers.size):
            lanes.put(out, numbers.size - 1 - at, lanes.get(numbers, at))

    out = np.zeros(5, np.int16)
    turn(np.arange(5, dtype=np.int16), out)
    assert out.tolist() == [4, 3, 2, 1, 0]


def test_a_number_of_an_array_in_every_lane() -> None:
    @numba.njit
    def compute(numbers: Any, out: Any) -> None:
        lanes.store_lanes(out, 0, lanes.spread_from(numbers, 7))

    out = np.zeros(LANES, np.float32)
    compute(SOME, out)
    np.testing.assert_array_equal(out, np.full(LANES, SOME[7]))


@pytest.mark.parametrize("wrong", [np.zeros((4, 16), np.float32), np.zeros(64, np.float32)[::2]])
def test_only_flat_contiguous_arrays_are_taken(wrong: np.ndarray) -> None:
    @numba.njit
    def compute(numbers: Any) -> Any:
        return lanes.sum_of(lanes.load_lanes(numbers, 0))

    with pytest.raises(TypeError, match="flat, contiguous"):
        compute(wrong)
