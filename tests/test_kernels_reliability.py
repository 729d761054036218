"""Reliability bins, ordered sums and redrawn counts, compared with their NumPy twins."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from vitscore.errors import UsageError
from vitscore.kernels import add_reliability
from vitscore.kernels.reference import redraw_reference, reliability_reference
from vitscore.kernels.reliability import NUM_BINS, add_in_order
from vitscore.kernels.resample import redraw_totals


def empty_bins(num_bins: int = NUM_BINS) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return np.zeros(num_bins, np.int64), np.zeros(num_bins), np.zeros(num_bins, np.int64)


@settings(max_examples=60, deadline=None)
@given(hnp.arrays(np.float32, st.integers(0, 200), elements=st.floats(0, 1, width=32)), st.integers(1, 30))
def test_matches_the_numpy_twin(prob: np.ndarray, num_bins: int) -> None:
    is_correct = prob > np.float32(0.4)
    bins = empty_bins(num_bins)
    assert add_reliability(*bins, prob, is_correct) == len(prob)
    for got, wanted in zip(bins, reliability_reference(prob, is_correct, num_bins), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-12)


def test_certainty_is_in_the_last_bin_and_zero_in_the_first() -> None:
    counts, confidence, correct = empty_bins()
    add_reliability(counts, confidence, correct, [1.0, 0.0], [True, False])
    assert counts[14] == counts[0] == correct[14] == 1 and confidence[14] == 1


@pytest.mark.parametrize("prob", [np.nan, -0.1, 1.1])
def test_confidences_out_of_range_are_refused(prob: float) -> None:
    bins = empty_bins()
    with pytest.raises(UsageError, match="confidence out of range"):
        add_reliability(*bins, [0.5, prob], [True, True])
    assert not bins[0].any()


def test_sums_do_not_depend_on_where_rows_are_cut() -> None:
    values = np.random.default_rng(0).normal(size=10_000) * 1e6
    total = 0.0
    for piece in np.array_split(values, 77):
        total = add_in_order(total, piece)
    assert total == add_in_order(0.0, values)


def test_redrawn_counts_equal_the_twins() -> None:
    rng = np.random.default_rng(0)
    rows, cols = rng.integers(0, 9, 60), rng.integers(0, 10, 60)
    means = np.concatenate([rng.random(30), rng.integers(1, 400, 30)])
    for seed in range(20):
        got = redraw_totals(rows, cols, means, num_classes=9, seed=seed)
        wanted = redraw_reference(rows, cols, means, num_classes=9, seed=seed)
        assert all(np.array_equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("mean", [0.05, 1.0, 7.0, 31.0, 33.0, 5000.0])
def test_a_redrawn_cell_has_the_moments_of_a_poisson_count(mean: float) -> None:
    ids = np.arange(40_000)
    drawn, _, _ = redraw_totals(ids, ids, np.full(len(ids), mean), num_classes=len(ids), seed=1)
    assert drawn.mean() == pytest.approx(mean, abs=5 * (mean / len(ids)) ** 0.5)
    assert drawn.var() == pytest.approx(mean, rel=0.06 if mean > 0.5 else 0.15)
