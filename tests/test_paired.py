"""Differences of macro F1 and of classes against scikit-learn, a bootstrap of the samples, and simulation."""

from __future__ import annotations

import numpy as np
import pytest
import sklearn.metrics as sk
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import bootstrap

from vitscore.metrics.paired_f1 import Cells, PairedCells, class_differences, macro_f1_difference
from vitscore.metrics.pairs import Pair, compare, compare_pairs, holm, overall

IDS = np.ndarray
ids = st.lists(st.tuples(*[st.integers(-1, 4)] * 3), max_size=60)


def draw(num: int, num_classes: int, *, seed: int = 0, skew: float = 1.0, rates: tuple = (0.85, 0.75)) -> list[IDS]:
    """Return labels and two models' answers."""
    rng = np.random.default_rng(seed)
    share = skew ** np.arange(num_classes)
    labels = rng.choice(num_classes, num, p=share / share.sum())
    answers = [np.where(rng.random(num) < rate, labels, rng.integers(0, num_classes, num)) for rate in rates]
    return [labels, *answers]


def count(labels: IDS, a: IDS, b: IDS, num_classes: int, *, rows_at_once: int = 10**9) -> PairedCells:
    cells = PairedCells(num_classes)
    for start in range(0, len(labels), rows_at_once):
        rows = slice(start, start + rows_at_once)
        cells.update(labels[rows], a[rows], b[rows])
    return cells


def macro_f1(labels: IDS, answers: IDS, num_classes: int) -> float:
    return sk.f1_score(labels, answers, labels=range(num_classes), average="macro", zero_division=0)


@given(ids)
def test_cells_are_those_of_the_definition_for_any_batches(rows: list[tuple[int, int, int]]) -> None:
    columns = [np.array([row[i] for row in rows], np.int64) for i in range(3)]
    kept = [row for row in rows if min(row) >= 0]
    for size in (7, 100):
        cells = count(*columns, 5, rows_at_once=size).compute()
        assert dict(zip(zip(*(c.tolist() for c in cells[:3]), strict=True), cells.counts_S.tolist(), strict=True)) == {
            row: kept.count(row) for row in kept
        }


def test_merged_cells_are_the_whole() -> None:
    labels, a, b = draw(500, 6)
    first, second = count(labels[:200], a[:200], b[:200], 6), count(labels[200:], a[200:], b[200:], 6)
    first.merge(second)
    for merged, whole in zip(first.compute(), count(labels, a, b, 6).compute(), strict=True):
        assert (merged == whole).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 200), st.integers(1, 9), st.integers(0, 10**6))
def test_the_difference_is_scikit_learns(num: int, num_classes: int, seed: int) -> None:
    labels, a, b = draw(num, num_classes, seed=seed, skew=0.7)
    difference, (low, high) = macro_f1_difference(count(labels, a, b, num_classes).compute(), num_classes)
    wanted = macro_f1(labels, a, num_classes) - macro_f1(labels, b, num_classes)
    assert difference == pytest.approx(wanted, abs=1e-12)
    assert -1 <= low <= difference <= high <= 1 and low < high


def test_samples_without_any_answer_are_in_the_support() -> None:
    labels, a, b = draw(300, 5)
    cells = count(labels[:250], a[:250], b[:250], 5)
    cells.count_wrong(np.append(labels[250:], -1))
    a[250:] = b[250:] = -1
    difference, _ = macro_f1_difference(cells.compute(), 5)
    assert difference == pytest.approx(macro_f1(labels, a, 5) - macro_f1(labels, b, 5), abs=1e-12)


@pytest.mark.parametrize("num, num_classes, skew", [(400, 4, 0.8), (3000, 20, 0.9), (1000, 2, 0.3)])
def test_the_interval_is_as_wide_as_a_bootstrap_of_the_samples(num: int, num_classes: int, skew: float) -> None:
    labels, a, b = draw(num, num_classes, skew=skew)

    def difference(rows: IDS) -> float:
        rows = rows.astype(int)
        drawn = count(labels[rows], a[rows], b[rows], num_classes).compute()
        return macro_f1_difference(drawn, num_classes)[0]

    wanted = bootstrap(
        (np.arange(num),), difference, n_resamples=600, method="percentile", vectorized=False, random_state=1
    ).confidence_interval
    _, (low, high) = macro_f1_difference(count(labels, a, b, num_classes).compute(), num_classes)
    assert high - low == pytest.approx(wanted.high - wanted.low, rel=0.12)


def test_models_that_never_differed_are_not_known_to_be_equal() -> None:
    labels = np.arange(50) % 5
    difference, (low, high) = macro_f1_difference(count(labels, labels, labels, 5).compute(), 5)
    assert difference == 0 and -0.08 < low < -0.01 and 0.01 < high < 0.08


def test_without_samples_there_is_no_difference() -> None:
    assert macro_f1_difference(PairedCells(3).compute(), 3) is None


@pytest.mark.parametrize(
    "num, num_classes, rates",
    [(200, 4, (0.9, 0.8)), (1000, 4, (0.9, 0.9)), (600, 10, (0.8, 0.7)), (2000, 2, (0.6, 0.6))],
)
def test_the_interval_holds_the_truth_95_times_in_100(num: int, num_classes: int, rates: tuple[float, float]) -> None:
    """The models' mistakes are uniform over the classes, and both are right together more often than independently."""
    rng = np.random.default_rng(11)
    both = 0.5 * min(rates) + 0.5 * rates[0] * rates[1]
    joint = np.zeros((num_classes,) * 3)
    for k in range(num_classes):
        wrong = [other for other in range(num_classes) if other != k]
        joint[k, k, k] = both
        joint[k, k, wrong] = (rates[0] - both) / len(wrong)
        joint[k, wrong, k] = (rates[1] - both) / len(wrong)
        joint[k][np.ix_(wrong, wrong)] = (1 - sum(rates) + both) / len(wrong) ** 2
    joint /= joint.sum()
    cells = np.nonzero(joint)
    truth, _ = macro_f1_difference(Cells(*cells, joint[cells] * 1e9), num_classes)
    held = 0
    for drawn in rng.multinomial(num, joint[cells], 1000):
        seen = drawn > 0
        _, (low, high) = macro_f1_difference(Cells(*(axis[seen] for axis in cells), drawn[seen]), num_classes)
        held += low <= truth <= high
    assert 0.93 <= held / 1000 <= 0.97


def test_classes_are_scikit_learns() -> None:
    labels, a, b = draw(400, 6, skew=0.6)
    classes = class_differences(count(labels, a, b, 6).compute(), 6)
    for name, answers in (("f1_a", a), ("f1_b", b)):
        wanted = sk.f1_score(labels, answers, labels=range(6), average=None, zero_division=0)
        assert classes[name] == pytest.approx(wanted, abs=1e-12)
    for k in range(6):
        own = labels == k
        assert classes["support"][k] == own.sum()
        assert classes["only_a"][k] == (own & (a == k) & (b != k)).sum()
        assert classes["only_b"][k] == (own & (b == k) & (a != k)).sum()


# Several pairs


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_is_statsmodels(p_values: list[float]) -> None:
    from statsmodels.stats.multitest import multipletests

    assert holm(p_values) == pytest.approx(multipletests(p_values, method="holm")[1], abs=1e-12)


@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 40))
def test_mcnemar_is_statsmodels(both: int, only_a: int, only_b: int) -> None:
    from statsmodels.stats.contingency_tables import mcnemar

    pair = Pair(2)
    pair.update(
        [0] * (both + only_a + only_b),
        [0] * both + [0] * only_a + [1] * only_b,
        [0] * both + [1] * only_a + [0] * only_b,
    )
    p = compare("a", "b", pair.counts)["mcnemar_p"]
    if only_a + only_b == 0:
        assert p is None if both == 0 else p == 1
    else:
        assert p == pytest.approx(mcnemar([[both, only_a], [only_b, 3]], exact=True).pvalue, rel=1e-9)


def three_models(rates: tuple[float, float, float], num: int = 2000) -> list[dict]:
    labels, *answers = draw(num, 5, rates=rates)
    pairs = {}
    for a, b in ((0, 1), (0, 2), (1, 2)):
        pairs["xyz"[a], "xyz"[b]] = pair = Pair(5)
        pair.update(labels, answers[a], answers[b])
    return compare_pairs(pairs)


def test_every_pair_is_corrected_for_their_number() -> None:
    entries = three_models((0.8, 0.78, 0.77))
    assert [entry["mcnemar_p_holm"] for entry in entries] == holm([entry["mcnemar_p"] for entry in entries])


def test_the_best_of_three_is_named_only_where_it_is_shown() -> None:
    assert overall(three_models((0.9, 0.7, 0.5))) == "x is ahead of all 2 others, on 2,000 images"
    assert overall(three_models((0.5, 0.8, 0.8))).startswith(("y has the highest", "z has the highest"))
