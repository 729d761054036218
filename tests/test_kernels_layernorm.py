"""The layer normalisation kernel, compared with its NumPy twin."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitscore.errors import UsageError
from vitscore.kernels.cpu_bf16 import layer_norm_bfloat16
from vitscore.kernels.cpu_bf16.reference import layer_norm_reference

EPSILON = 1e-6


def bits(tensor: torch.Tensor) -> Any:
    return tensor.view(torch.int16).numpy()


def vectors(width: int) -> tuple[Any, Any]:
    random = np.random.default_rng(width)
    return random.normal(1, 0.5, width).astype(np.float32), random.normal(0, 1, width).astype(np.float32)


def normed(rows_RD: torch.Tensor, epsilon: float = EPSILON) -> torch.Tensor:
    out_RD = torch.empty_like(rows_RD)
    weight_D, bias_D = vectors(rows_RD.shape[1])
    layer_norm_bfloat16(bits(rows_RD), weight_D, bias_D, epsilon=epsilon, out_RD=bits(out_RD))
    return out_RD


def rows(num: int, width: int, *, gain: float = 1.0, centre: float = 0.0) -> torch.Tensor:
    return (centre + gain * torch.randn(num, width, generator=torch.Generator().manual_seed(width))).bfloat16()


@pytest.mark.parametrize("width", [1, 2, 24, 96, 192, 197, 768, 1280])
@pytest.mark.parametrize(("gain", "centre"), [(1.0, 0.0), (100.0, 3.0), (0.01, 2.0)])
def test_matches_the_numpy_twin(width: int, gain: float, centre: float) -> None:
    given = rows(33, width, gain=gain, centre=centre)
    exact = layer_norm_reference(given.double().numpy(), *vectors(width), EPSILON)
    # bfloat16 has 8 bits of precision; where numbers cancel, with the mean or the bias, fp32 rounding remains.
    atol = 2e-5 + 2**-22 * centre / gain
    np.testing.assert_allclose(normed(given).double().numpy(), exact, rtol=2**-8, atol=atol)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(-1000, 1000, width=32), min_size=1, max_size=70))
def test_matches_the_numpy_twin_on_any_row(row: list[float]) -> None:
    given = torch.tensor([row]).bfloat16()
    exact = layer_norm_reference(given.double().numpy(), *vectors(len(row)), 1e-3)
    np.testing.assert_allclose(normed(given, 1e-3).double().numpy(), exact, rtol=2**-8, atol=2e-3)


def test_nearly_all_numbers_equal_torchs_rounded_ones() -> None:
    given = rows(500, 192)
    weight_D, bias_D = map(torch.from_numpy, vectors(192))
    theirs = torch.nn.functional.layer_norm(given.float(), (192,), weight_D, bias_D, EPSILON).bfloat16()
    assert (normed(given) != theirs).float().mean() < 1e-3


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    given = rows(20, 100)
    whole = normed(given)
    for row in range(20):
        assert torch.equal(normed(given[row : row + 1])[0], whole[row])


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
def test_an_invalid_number_affects_only_its_row(wrong: float) -> None:
    given = rows(3, 40)
    clean = normed(given)
    given[1, 7] = wrong
    affected = normed(given)
    assert affected[1].isnan().all()
    assert torch.equal(affected[[0, 2]], clean[[0, 2]])


def test_a_row_of_huge_numbers_affects_no_other_row() -> None:
    given = rows(3, 40)
    clean = normed(given)
    given[1] = 3e37
    assert torch.equal(normed(given)[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("case", ["type", "shape", "weight", "epsilon", "strided", "empty"])
def test_other_arrays_are_refused(case: str) -> None:
    given, out = bits(rows(4, 8)), bits(rows(4, 8))
    (weight, bias), epsilon = vectors(8), EPSILON
    if case == "type":
        given = given.astype(np.int32)
    if case == "shape":
        out = out[:3]
    if case == "weight":
        weight = weight[:7]
    if case == "epsilon":
        epsilon = 0.0
    if case == "strided":
        given = np.asfortranarray(given)
    if case == "empty":
        given, out, weight, bias = given[:, :0], out[:, :0], weight[:0], bias[:0]
    with pytest.raises(UsageError, match="cannot normalise the rows"):
        layer_norm_bfloat16(given, weight, bias, epsilon=epsilon, out_RD=out)
