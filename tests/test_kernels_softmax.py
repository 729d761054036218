"""The softmax kernel, compared with its NumPy twin."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitscore.errors import UsageError
from vitscore.kernels.cpu_bf16 import softmax_bfloat16
from vitscore.kernels.cpu_bf16.reference import softmax_reference


def softmax(scores_RN: torch.Tensor, scale: float) -> torch.Tensor:
    done = scores_RN.clone()
    softmax_bfloat16(done.view(torch.int16).numpy(), scale)
    return done


def scores(rows: int, width: int, *, gain: float = 4.0, seed: int = 0) -> torch.Tensor:
    return (gain * torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))).bfloat16()


@pytest.mark.parametrize("width", [1, 2, 16, 50, 197, 577, 4097])
@pytest.mark.parametrize("scale", [0.125, 1.0, 3.0])
def test_matches_the_numpy_twin(width: int, scale: float) -> None:
    given = scores(9, width)
    exact = softmax_reference(given.double().numpy(), scale)
    # Rounding to bfloat16's 8 bits is off by at most one part in 256, the sum of 4,097 numbers by one in 2,000.
    np.testing.assert_allclose(softmax(given, scale).double().numpy(), exact, rtol=2**-8 + width / 2**23, atol=2e-38)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(-300, 300, width=32), min_size=1, max_size=40), st.floats(0.01, 4))
def test_matches_the_numpy_twin_on_any_scores(row: list[float], scale: float) -> None:
    given = torch.tensor([row]).bfloat16()
    exact = softmax_reference(given.double().numpy(), scale)
    np.testing.assert_allclose(softmax(given, scale).double().numpy(), exact, rtol=2**-8, atol=2e-38)


def test_nearly_all_numbers_equal_torchs_rounded_ones() -> None:
    given = scores(400, 197)
    theirs = (given.float() * 0.125).softmax(-1).bfloat16()
    assert (softmax(given, 0.125) != theirs).float().mean() < 0.002


def test_rows_add_up_to_one() -> None:
    assert (softmax(scores(50, 1000), 0.5).double().sum(1) - 1).abs().max() < 0.01


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    given = scores(20, 33)
    whole = softmax(given, 0.25)
    for row in range(20):
        assert torch.equal(softmax(given[row : row + 1], 0.25)[0], whole[row])


@pytest.mark.parametrize("wrong", [torch.nan, -torch.nan, torch.inf])
def test_an_invalid_score_affects_only_its_row(wrong: float) -> None:
    given = scores(3, 21)
    clean = softmax(given, 1.0)
    given[1, 4] = wrong
    affected = softmax(given, 1.0)
    assert affected[1].isnan().all()
    assert torch.equal(affected[[0, 2]], clean[[0, 2]])


def test_minus_infinity_has_almost_no_probability() -> None:
    given = torch.tensor([[0.0, -torch.inf, 0.0]]).bfloat16()
    assert softmax(given, 1.0)[0].tolist() == [0.5, pytest.approx(0, abs=1e-37), 0.5]
    assert softmax(torch.full((1, 3), -torch.inf).bfloat16(), 1.0).isnan().all()


@pytest.mark.parametrize(
    "scores_RN",
    [np.zeros((2, 2), np.int32), np.zeros(4, np.int16), np.zeros((4, 4), np.int16)[:, ::2], np.zeros((2, 0), np.int16)],
)
def test_scores_that_do_not_fit_are_refused(scores_RN: np.ndarray) -> None:
    with pytest.raises(UsageError, match="expected int16 of shape"):
        softmax_bfloat16(scores_RN, 1.0)


def test_a_scale_of_zero_is_refused() -> None:
    with pytest.raises(UsageError, match="scale above 0"):
        softmax_bfloat16(np.zeros((1, 2), np.int16), 0.0)
