"""Paired comparison of two models on the same samples: agreement, differences with intervals, significance.

The fold over the parts supplies the counts; the result is one entry of `comparisons` in metrics.json and one sentence.
The difference of accuracies has Tango's score interval for paired proportions (T. Tango, Statistics in Medicine 17,
1998), which stays sound with few or no disagreements. The test is McNemar's exact test with Holm's correction over all
pairs. `paired_f1` computes the difference of macro F1. Neither files nor tensors appear here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from vitscore.kernels.arrays import as_ids, check_same_length
from vitscore.metrics.intervals import LEVEL, Z
from vitscore.metrics.paired_f1 import PairedCells, macro_f1_difference

POWER = 0.8
"""Probability that the number of images that "would be needed" shows a difference of the observed size."""


@dataclass
class PairCounts:
    """Samples counted by which of two models is right; only samples with a label and both predictions."""

    both: int = 0
    only_a: int = 0
    only_b: int = 0
    neither: int = 0
    agreed: int = 0
    """Samples with the same prediction, right or wrong."""

    @property
    def samples(self) -> int:
        return self.both + self.only_a + self.only_b + self.neither

    def update(self, labels_B: Any, preds_a_B: Any, preds_b_B: Any) -> int:
        """Count a batch, skipping rows with an id of -1; return the number of rows counted."""
        labels_B, preds_a_B, preds_b_B = as_ids(labels_B), as_ids(preds_a_B), as_ids(preds_b_B)
        check_same_length(labels=labels_B, a=preds_a_B, b=preds_b_B)
        counted_B = (labels_B >= 0) & (preds_a_B >= 0) & (preds_b_B >= 0)
        a_B, b_B = (preds_a_B == labels_B)[counted_B], (preds_b_B == labels_B)[counted_B]
        both, only_a, only_b = int((a_B & b_B).sum()), int((a_B & ~b_B).sum()), int((~a_B & b_B).sum())
        self.both += both
        self.only_a += only_a
        self.only_b += only_b
        self.neither += len(a_B) - both - only_a - only_b
        self.agreed += int((preds_a_B == preds_b_B)[counted_B].sum())
        return len(a_B)

    def count_wrong(self, labels_B: Any) -> None:
        """Count labelled samples without any prediction as wrong answers of both models."""
        self.neither += int((as_ids(labels_B) >= 0).sum())

    def merge(self, other: PairCounts) -> None:
        """Add the counts of `other`, as if its samples had been counted here."""
        self.both += other.both
        self.only_a += other.only_a
        self.only_b += other.only_b
        self.neither += other.neither
        self.agreed += other.agreed


class Pair:
    """Counts of two models on the same samples."""

    def __init__(self, num_classes: int) -> None:
        self.counts = PairCounts()
        self.cells = PairedCells(num_classes)

    def update(self, labels_B: Any, preds_a_B: Any, preds_b_B: Any) -> None:
        """Count a batch, skipping rows with an id of -1; an id of K is an answer outside the classes."""
        self.counts.update(labels_B, preds_a_B, preds_b_B)
        self.cells.update(labels_B, preds_a_B, preds_b_B)

    def count_wrong(self, labels_B: Any) -> None:
        """Count labelled samples without any prediction as wrong answers of both models."""
        self.counts.count_wrong(labels_B)
        self.cells.count_wrong(labels_B)


def compare_pairs(pairs: Mapping[tuple[str, str], Pair]) -> list[dict[str, Any]]:
    """Return `comparisons` of metrics.json: an entry for every pair, its p-value corrected for the number of pairs."""
    entries = [compare(a, b, pair.counts, cells=pair.cells) for (a, b), pair in pairs.items()]
    tested = [entry for entry in entries if entry["mcnemar_p"] is not None]
    for entry, p in zip(tested, holm([entry["mcnemar_p"] for entry in tested]), strict=True):
        entry["mcnemar_p_holm"] = p
    return entries


def compare(a: str, b: str, counts: PairCounts, *, cells: PairedCells | None = None) -> dict[str, Any]:
    """Return one entry of `comparisons`, in the documented order; figures are None without common samples.

    Args:
        a: name of the first model; differences are a minus b.
        b: name of the second model.
        counts: counts by which model is right.
        cells: counts of the same samples by class; without them the difference of macro F1 is None.
    """
    n = counts.samples
    macro_f1 = macro_f1_difference(cells.compute(), cells.num_classes) if cells is not None else None
    return {
        "a": a,
        "b": b,
        "samples": n,
        "both": counts.both,
        "only_a": counts.only_a,
        "only_b": counts.only_b,
        "neither": counts.neither,
        "agreement": counts.agreed / n if n else None,
        "accuracy_difference": (counts.only_a - counts.only_b) / n if n else None,
        "accuracy_difference_ci": paired_interval(counts.only_a, counts.only_b, n) if n else None,
        "mcnemar_p": mcnemar_p(counts.only_a, counts.only_b) if n else None,
        "mcnemar_p_holm": None,
        "macro_f1_difference": macro_f1[0] if macro_f1 else None,
        "macro_f1_difference_ci": macro_f1[1] if macro_f1 else None,
    }


def conclusion(comparison: Mapping[str, Any]) -> str:
    """Return one sentence that the figures support; `comparison` is an entry of `comparisons`."""
    n, difference = comparison["samples"], comparison["accuracy_difference"]
    a, b = comparison["a"], comparison["b"]
    if not n:
        return f"{a} and {b} cannot be compared: no image has a label and both predictions"
    images = f"{n:,} image{'s' if n > 1 else ''}"
    low, high = comparison["accuracy_difference_ci"]
    p = deciding_p(comparison)
    if is_shown(comparison):
        first, second = (a, b) if difference > 0 else (b, a)
        ends = sorted((abs(low), abs(high)))
        gap = f"{_points(abs(difference))} points, {LEVEL:.0%} interval {_points(ends[0])} to {_points(ends[1])}"
        return f"{first} is ahead of {second} by {gap}, on {images}"
    these = "this image" if n == 1 else f"these {images}"
    text = f"no difference between {a} and {b} can be shown on {these}"
    corrected = "" if p == comparison["mcnemar_p"] else " after Holm's correction"
    test = f", but the exact test gives p = {p:.2g}{corrected}" if low > 0 or high < 0 else ""
    text += f" ({_points(difference)} points, {LEVEL:.0%} interval {_points(low)} to {_points(high)}{test})"
    needed = images_needed(comparison["only_a"], comparison["only_b"], n)
    return f"{text}: about {needed:,} would be needed" if needed is not None and needed > n else text


def deciding_p(comparison: Mapping[str, Any]) -> float:
    """Return the p-value that decides: the one corrected by Holm if several pairs were compared."""
    corrected = comparison.get("mcnemar_p_holm")
    return float(comparison["mcnemar_p"] if corrected is None else corrected)


def is_shown(comparison: Mapping[str, Any]) -> bool:
    """Return whether interval and test both show that one model is ahead."""
    if not comparison["samples"]:
        return False
    low, high = comparison["accuracy_difference_ci"]
    return (low > 0 or high < 0) and deciding_p(comparison) < 1 - LEVEL


def overall(comparisons: Sequence[Mapping[str, Any]]) -> str:
    """Return one sentence over all pairs: the best model, and the models it cannot be shown to beat."""
    if len(comparisons) == 1 or not all(entry["samples"] for entry in comparisons):
        return conclusion(comparisons[0])
    wins = {entry[side]: 0 for entry in comparisons for side in ("a", "b")}
    right = dict.fromkeys(wins, 0)
    for entry in comparisons:
        wins[entry["a" if entry["accuracy_difference"] > 0 else "b"]] += is_shown(entry)
        right[entry["a"]] = entry["both"] + entry["only_a"]
        right[entry["b"]] = entry["both"] + entry["only_b"]
    best = max(right, key=lambda name: (right[name], wins[name]))
    images = f"on {comparisons[0]['samples']:,} images"
    open_pairs = [entry for entry in comparisons if best in (entry["a"], entry["b"]) and not is_shown(entry)]
    if not open_pairs:
        return f"{best} is ahead of all {len(wins) - 1} others, {images}"
    rivals = [entry["b"] if entry["a"] == best else entry["a"] for entry in open_pairs]
    return f"{best} has the highest accuracy, but no difference from {' or '.join(rivals)} can be shown {images}"


def _points(fraction: float) -> str:
    text = f"{100 * fraction:.1f}"
    return "0.0" if text == "-0.0" else text


def images_needed(only_a: int, only_b: int, num_samples: int) -> int | None:
    """Return how many images would show a difference of the observed size, to two digits; None if there is none.

    Computed for McNemar's test at the 5% level with 80% power (R. J. Connor, Biometrics 43, 1987).
    """
    if only_a == only_b:
        return None
    apart, gap = (only_a + only_b) / num_samples, abs(only_a - only_b) / num_samples
    z_power = NormalDist().inv_cdf(POWER)
    needed = ((Z * math.sqrt(apart) + z_power * math.sqrt(max(apart - gap * gap, 0.0))) / gap) ** 2
    unit: int = 10 ** max(math.floor(math.log10(needed)) - 1, 0)
    return math.ceil(needed / unit) * unit


def paired_interval(only_a: int, only_b: int, num_samples: int) -> list[float]:
    """Return Tango's 95% score interval of the difference a - b of two rates on the same samples."""
    return [-_upper_end(only_b, only_a, num_samples), _upper_end(only_a, only_b, num_samples)]


def _upper_end(only_a: int, only_b: int, n: int) -> float:
    """Return the largest difference that the score test does not reject, found by bisection."""
    low, high = (only_a - only_b) / n, 1.0
    while True:
        middle = 0.5 * (low + high)
        if not low < middle < high:
            return middle
        if _score(only_a, only_b, n, middle) > -Z:
            low = middle
        else:
            high = middle


def _score(only_a: int, only_b: int, n: int, difference: float) -> float:
    """Return the score statistic at an assumed difference, with the maximum-likelihood rate of `only b` under it."""
    half_b = -only_a - only_b + (2 * n - only_a + only_b) * difference
    root = math.sqrt(max(half_b * half_b + 8 * n * only_b * difference * (1 - difference), 0.0))
    rate_b = (root - half_b) / (4 * n)
    variance = n * (2 * rate_b + difference * (1 - difference))
    excess = only_a - only_b - n * difference
    if variance <= 0:
        return math.copysign(math.inf, excess) if excess else 0.0
    return excess / math.sqrt(variance)


def mcnemar_p(only_a: int, only_b: int) -> float:
    """Return the p-value of McNemar's exact test: a two-sided binomial test of the disagreements at rate 1/2.

    The cost grows with the square root of the number of disagreements. Precision does not depend on it: the first term
    comes from the saddle-point form of the binomial, every other one from the ratio of successive terms.
    """
    n, few = only_a + only_b, min(only_a, only_b)
    if 2 * few == n:
        return 1.0
    # The tail relative to its largest term.
    ratio_sum, term, k = 1.0, 1.0, few
    while k > 0 and term > 1e-17 * ratio_sum:
        term *= k / (n - k + 1)
        ratio_sum += term
        k -= 1
    return min(1.0, 2.0 * math.exp(_log_fair_binomial(few, n)) * ratio_sum)


def _log_fair_binomial(k: int, n: int) -> float:
    """Return the log-probability of k heads in n fair coin tosses, without cancellation (C. Loader, 2000)."""
    if k in (0, n):
        return -n * math.log(2)
    away = _stirling_error(n) - _stirling_error(k) - _stirling_error(n - k)
    away -= _deviance(k, n / 2) + _deviance(n - k, n / 2)
    return away + 0.5 * math.log(n / (2 * math.pi * k * (n - k)))


def _stirling_error(n: int) -> float:
    """Return log(n!) minus Stirling's approximation."""
    if n < 16:
        return math.lgamma(n + 1) - (n + 0.5) * math.log(n) + n - 0.5 * math.log(2 * math.pi)
    square = n * n
    return (1 / 12 - (1 / 360 - (1 / 1260 - (1 / 1680) / square) / square) / square) / n


def _deviance(x: float, mean: float) -> float:
    """Return x log(x / mean) + mean - x, by a series if x is near the mean."""
    gap = (x - mean) / (x + mean)
    if abs(gap) >= 0.1:
        return x * math.log(x / mean) + mean - x
    total, power, j = (x - mean) * gap, 2 * x * gap, 1
    while True:
        power *= gap * gap
        after = total + power / (2 * j + 1)
        if after == total:
            return total
        total, j = after, j + 1


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted by Holm's step-down correction for multiple tests, in the given order."""
    order = np.argsort(np.asarray(p_values, np.float64), kind="stable")
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted
