"""Paired comparison: counts, the exact test against SciPy's, the interval against its definition and by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq, minimize_scalar
from scipy.stats import binomtest

from vitscore.metrics.intervals import Z
from vitscore.metrics.pairs import (
    PairCounts,
    compare,
    conclusion,
    holm,
    images_needed,
    mcnemar_p,
    paired_interval,
)

ids = st.lists(st.tuples(*[st.integers(-1, 4)] * 3), max_size=60)


def entry(*, both: int = 0, only_a: int = 0, only_b: int = 0, neither: int = 0) -> dict:
    return compare("vit", "clip", PairCounts(both, only_a, only_b, neither, agreed=both))


@given(ids)
def test_counts_are_those_of_the_definition(rows: list[tuple[int, int, int]]) -> None:
    counts = PairCounts()
    for start in range(0, len(rows), 7):
        counts.update(*np.array(rows[start : start + 7]).reshape(-1, 3).T)
    kept = [row for row in rows if min(row) >= 0]
    assert counts.samples == len(kept)
    assert counts.both == sum(label == a == b for label, a, b in kept)
    assert counts.only_a == sum(label == a != b for label, a, b in kept)
    assert counts.only_b == sum(label == b != a for label, a, b in kept)
    assert counts.agreed == sum(a == b for _, a, b in kept)


def test_merged_counts_add_up() -> None:
    counts = PairCounts(1, 2, 3, 4, 5)
    counts.merge(PairCounts(10, 20, 30, 40, 50))
    assert counts == PairCounts(11, 22, 33, 44, 55)


def test_an_entry_has_the_contracts_order() -> None:
    assert list(entry(both=3, only_a=1)) == [
        "a",
        "b",
        "samples",
        "both",
        "only_a",
        "only_b",
        "neither",
        "agreement",
        "accuracy_difference",
        "accuracy_difference_ci",
        "mcnemar_p",
        "mcnemar_p_holm",
        "macro_f1_difference",
        "macro_f1_difference_ci",
    ]


def test_without_common_samples_nothing_is_claimed() -> None:
    empty = entry()
    assert empty["samples"] == 0 and empty["agreement"] is empty["accuracy_difference_ci"] is empty["mcnemar_p"] is None
    assert "cannot be compared" in conclusion(empty)


# The exact test


@settings(deadline=None)
@given(st.integers(0, 3000), st.integers(0, 3000))
def test_mcnemar_is_scipys_binomial_test(only_a: int, only_b: int) -> None:
    wanted = binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
    # SciPy returns 0 for (10, 1065); the exact value is 2.7e-300.
    assert mcnemar_p(only_a, only_b) == pytest.approx(wanted, rel=1e-9, abs=1e-290)


@pytest.mark.parametrize(
    "only_a, only_b", [(500_000, 500_000), (499_000, 501_000), (499_999, 500_001), (495_000, 505_000), (1, 999_999)]
)
def test_mcnemar_is_exact_for_a_million_disagreements(only_a: int, only_b: int) -> None:
    wanted = binomtest(only_a, only_a + only_b).pvalue
    assert mcnemar_p(only_a, only_b) == mcnemar_p(only_b, only_a) == pytest.approx(wanted, rel=1e-8, abs=1e-300)


def test_mcnemar_without_disagreement_is_one() -> None:
    assert mcnemar_p(0, 0) == 1.0


# The interval


def score_by_likelihood(only_a: int, only_b: int, n: int, difference: float) -> float:
    """Return the score statistic, its nuisance rate found by maximising the likelihood numerically."""

    def loss(rate_b: float) -> float:
        rate_a = rate_b + difference
        same = 1 - rate_a - rate_b
        terms = ((only_a, rate_a), (only_b, rate_b), (n - only_a - only_b, same))
        return -sum(count * math.log(max(rate, 1e-300)) for count, rate in terms if count)

    low, high = max(0.0, -difference), (1 - difference) / 2
    rate_b = minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-13}).x
    return (only_a - only_b - n * difference) / math.sqrt(n * (2 * rate_b + difference - difference**2))


@pytest.mark.parametrize("only_a, only_b, n", [(12, 2, 56), (3, 9, 40), (30, 31, 200), (1, 0, 15), (150, 90, 1000)])
def test_the_interval_is_tangos(only_a: int, only_b: int, n: int) -> None:
    estimate = (only_a - only_b) / n
    low = brentq(lambda d: score_by_likelihood(only_a, only_b, n, d) - Z, -0.999, estimate - 1e-9)
    high = brentq(lambda d: score_by_likelihood(only_a, only_b, n, d) + Z, estimate + 1e-9, 0.999)
    assert paired_interval(only_a, only_b, n) == pytest.approx([low, high], abs=1e-5)


@given(st.integers(0, 200), st.integers(0, 200), st.integers(0, 500))
def test_the_interval_is_sound_everywhere(only_a: int, only_b: int, rest: int) -> None:
    n = only_a + only_b + rest
    if n == 0:
        return
    low, high = paired_interval(only_a, only_b, n)
    assert -1 <= low <= (only_a - only_b) / n <= high <= 1 and low < high
    assert paired_interval(only_b, only_a, n) == [-high, -low]


def test_agreement_on_few_images_is_not_equality() -> None:
    low, high = paired_interval(0, 0, 30)
    assert low == -high and high == pytest.approx(Z**2 / (30 + Z**2), abs=1e-9)


@pytest.mark.parametrize("n", [40, 100, 1000])
@pytest.mark.parametrize("rate_a, rate_b", [(0.12, 0.08), (0.05, 0.05), (0.3, 0.1)])
def test_the_interval_holds_the_truth_95_times_in_100(n: int, rate_a: float, rate_b: float) -> None:
    rng = np.random.default_rng(5)
    tables, times = np.unique(
        rng.multinomial(n, [rate_a, rate_b, 1 - rate_a - rate_b], 4000), axis=0, return_counts=True
    )
    ends = np.array([paired_interval(int(a), int(b), n) for a, b, _ in tables])
    held = (ends[:, 0] <= rate_a - rate_b) & (rate_a - rate_b <= ends[:, 1])
    assert 0.935 <= (held * times).sum() / 4000 <= 0.965


# Several pairs, and the conclusion


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_a_difference_that_can_be_shown_is_stated() -> None:
    text = conclusion(entry(both=440, only_a=30, only_b=10, neither=20))
    assert text == "vit is ahead of clip by 4.0 points, 95% interval 1.6 to 6.7, on 500 images"
    assert conclusion(entry(both=440, only_a=10, only_b=30, neither=20)).startswith(
        "clip is ahead of vit by 4.0 points"
    )


def test_a_difference_that_cannot_be_shown_is_not_claimed() -> None:
    text = conclusion(entry(both=470, only_a=12, only_b=9, neither=9))
    assert text.startswith(
        "no difference between vit and clip can be shown on these 500 images (0.6 points, 95% interval"
    )
    assert text.endswith(": about 9,200 would be needed")


def test_correction_for_several_pairs_can_take_a_claim_back() -> None:
    comparison = entry(both=440, only_a=25, only_b=10, neither=25)
    assert "is ahead" in conclusion(comparison)
    text = conclusion({**comparison, "mcnemar_p_holm": 0.06})
    assert "no difference" in text and "p = 0.06 after Holm's correction" in text


def test_equal_models_promise_nothing() -> None:
    text = conclusion(entry(both=490, only_a=5, only_b=5))
    assert "needed" not in text and "(0.0 points" in text


def test_the_needed_images_show_the_difference_four_times_in_five() -> None:
    needed = images_needed(12, 9, 500)
    assert needed is not None
    drawn = np.random.default_rng(0).multinomial(needed, [12 / 500, 9 / 500, 479 / 500], 2000)
    assert np.mean([mcnemar_p(int(a), int(b)) < 0.05 for a, b, _ in drawn]) == pytest.approx(0.8, abs=0.05)
