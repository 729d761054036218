"""How often do the 95% intervals hold the truth?

Question: over simulated evaluations whose true figures are known, how often does each interval hold them: accuracy
          (Wilson), macro and weighted F1, balanced accuracy, MCC, kappa (bootstrap from counts), and of two models the
          differences of accuracy (Tango) and of macro F1 (delta method)?
Expected: 93 to 97 times in 100 from about ten samples a class on; with fewer, macro averages less often.
Command:  vitscore bench coverage
Method:   labels with uneven classes (each 0.9 or 0.7 times as frequent as the one before), answers right at a given
          rate, mistakes spread evenly; 1,000 evaluations of each kind, seeded. The truth is the figure of the
          distribution itself. 1,000 draws know a coverage of 95% to 1.4 points (two standard errors).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from vitscore.metrics.figures import class_figures, totals_of
from vitscore.metrics.intervals import bootstrap, wilson
from vitscore.metrics.paired_f1 import Cells, macro_f1_difference
from vitscore.metrics.pairs import paired_interval

DRAWS, QUICK_DRAWS = 1_000, 10
CASES = (
    (2, 0.7, 40),
    (2, 0.7, 400),
    (4, 0.7, 100),
    (10, 0.9, 200),
    (10, 0.9, 2_000),
    (50, 1.0, 1_000),
    (100, 1.0, 400),
)
"""Classes, how uneven they are, samples."""
RATES = (0.9, 0.8)
BOUNDS = {
    "macro_f1": (0.0, 1.0),
    "weighted_f1": (0.0, 1.0),
    "balanced_accuracy": (0.0, 1.0),
    "mcc": (-1.0, 1.0),
    "cohen_kappa": (-1.0, 1.0),
}

Array = np.ndarray[Any, Any]


def measure(*, quick: bool = False) -> dict[str, Any]:
    """The share of intervals that held the truth, by case and figure."""
    draws = QUICK_DRAWS if quick else DRAWS
    rows = []
    for num_classes, evenness, num_samples in CASES:
        joint = joint_distribution(num_classes, evenness)
        held = coverage(joint, num_samples, draws)
        rows.append({"classes": num_classes, "samples": num_samples, "held": held})
    return {"draws": draws, "cases": rows}


def joint_distribution(num_classes: int, evenness: float) -> Array:
    """The chance of each (truth, answer of a, answer of b); the models are right together more often than by chance."""
    share_K = evenness ** np.arange(num_classes)
    both = 0.5 * min(RATES) + 0.5 * RATES[0] * RATES[1]
    joint_KKK = np.zeros((num_classes,) * 3)
    for k in range(num_classes):
        wrong = np.delete(np.arange(num_classes), k)
        joint_KKK[k, k, k] = both
        joint_KKK[k, k, wrong] = (RATES[0] - both) / len(wrong)
        joint_KKK[k, wrong, k] = (RATES[1] - both) / len(wrong)
        joint_KKK[k][np.ix_(wrong, wrong)] = (1 - sum(RATES) + both) / len(wrong) ** 2
    joint_KKK *= share_K[:, None, None]
    scaled: Array = joint_KKK / joint_KKK.sum()
    return scaled


def coverage(joint_KKK: Array, num_samples: int, draws: int) -> dict[str, float]:
    num_classes = len(joint_KKK)
    labels_S, a_S, b_S = np.nonzero(joint_KKK)
    chance_S = joint_KKK[labels_S, a_S, b_S]
    truth = truths(Cells(labels_S, a_S, b_S, chance_S * 1e9), num_classes)
    held = dict.fromkeys(truth, 0)
    random = np.random.default_rng(num_classes * 100_003 + num_samples)
    for _ in range(draws):
        counts_S = random.multinomial(num_samples, chance_S)
        seen = counts_S > 0
        found = intervals_of(Cells(labels_S[seen], a_S[seen], b_S[seen], counts_S[seen]), num_classes)
        for name, interval in found.items():
            held[name] += interval is not None and interval[0] <= truth[name] <= interval[1]
    return {name: times / draws for name, times in held.items()}


def truths(cells: Cells, num_classes: int) -> dict[str, float]:
    """The figures of the distribution itself."""
    figures = class_figures(*totals_of((cells.labels_S, cells.a_S, cells.counts_S), num_classes))
    macro_f1 = macro_f1_difference(cells, num_classes)
    assert macro_f1 is not None
    single = {name: value for name in ("accuracy", *BOUNDS) if (value := figures[name]) is not None}
    return {**single, "accuracy difference": RATES[0] - RATES[1], "macro F1 difference": macro_f1[0]}


def intervals_of(cells: Cells, num_classes: int) -> dict[str, list[float] | None]:
    labels_S, a_S, b_S, counts_S = cells
    n = int(counts_S.sum())
    a_is_right_S, b_is_right_S = labels_S == a_S, labels_S == b_S
    only_a, only_b = (
        int(counts_S[mask_S].sum()) for mask_S in (a_is_right_S & ~b_is_right_S, b_is_right_S & ~a_is_right_S)
    )
    macro_f1 = macro_f1_difference(cells, num_classes)
    return {
        "accuracy": wilson(int(counts_S[a_is_right_S].sum()), n),
        **bootstrap((labels_S, a_S, counts_S), num_classes, class_figures, bounds=BOUNDS),
        "accuracy difference": paired_interval(only_a, only_b, n),
        "macro F1 difference": macro_f1[1] if macro_f1 else None,
    }


def table(result: dict[str, Any]) -> list[str]:
    names = list(result["cases"][0]["held"])
    lines = [f"95% intervals that held the truth, in percent of {result['draws']:,} draws"]
    lines.append(
        f"{'classes, samples':<22}" + "".join(f"{case['classes']:>4},{case['samples']:>5}" for case in result["cases"])
    )
    for name in names:
        lines.append(f"{name:<22}" + "".join(f"{100 * case['held'][name]:>10.1f}" for case in result["cases"]))
    return lines
