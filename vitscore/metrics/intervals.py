"""Confidence intervals of the figures: Wilson's for rates, a seeded bootstrap for the rest.

Intervals are computed from counts, so their cost does not depend on the number of images. The bootstrap redraws every
cell of the confusion matrix as a Poisson count. This is the multinomial bootstrap with a free sample size, which does
not matter to the figures because they are ratios. Spread and bias of the redrawn figures are applied to the estimate on
the log-odds scale, which keeps intervals inside [0, 1] and compensates for rare classes that a redrawn sample lacks.

Before that, half a right and half a wrong answer are added, distributed over the classes by support, as Anscombe does
for log-odds: no mistake on 50 images does not prove a model perfect. In simulations with 2 to 100 classes and 30 to
1,000 samples the intervals cover the truth 92 to 98 times in 100; those of the macro averages about 88 times with a
handful of samples per class and very uneven classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from statistics import NormalDist
from typing import TypeAlias

import numpy as np

from vitscore.kernels.arrays import Array
from vitscore.kernels.resample import redraw_totals

LEVEL = 0.95
SEED = 20_240_229
Z = NormalDist().inv_cdf(0.5 + LEVEL / 2)
MOST_REPLICATES, FEWEST_REPLICATES = 500, 100
CELLS_TO_DRAW = 20_000_000
"""Limit on Poisson draws over all replicates; 1,000 classes with a mistake in every cell then take a few seconds."""

Interval: TypeAlias = list[float]
Figures: TypeAlias = Callable[[Array, Array, Array], Mapping[str, float | None]]


def wilson(num_right: int, num_samples: int) -> Interval | None:
    """Return Wilson's score interval of a rate; None without samples."""
    if num_samples == 0:
        return None
    low, high = wilson_of_rate(num_right / num_samples, num_samples)
    return [0.0 if num_right == 0 else low, 1.0 if num_right == num_samples else high]


def wilson_of_rate(rate: float, n: float) -> Interval:
    """Return Wilson's score interval of a rate over `n` answers, which need not be an integer."""
    shrink = 1 + Z * Z / n
    centre = (rate + Z * Z / (2 * n)) / shrink
    half = Z / shrink * math.sqrt(rate * (1 - rate) / n + Z * Z / (4 * n * n))
    return [max(centre - half, 0.0), min(centre + half, 1.0)]


def bootstrap(
    cells: tuple[Array, Array, Array],
    num_classes: int,
    figures: Figures,
    *,
    bounds: Mapping[str, tuple[float, float]],
) -> dict[str, Interval | None]:
    """Return intervals of figures that depend on right answers, support and predictions of every class.

    Args:
        cells: rows, columns and counts of a confusion matrix; a column of K or more is an answer outside the classes.
        num_classes: K.
        figures: computes the named figures from (right, support, predicted), three arrays of length K.
        bounds: lowest and highest value of every figure.

    Returns:
        An interval for every name in `bounds`; None if the figure is undefined.
    """
    rows, cols, counts = cells
    estimate = figures(*_totals(rows, cols, counts.astype(np.float64), num_classes))
    rows, cols, means = _smoothed(rows, cols, counts, num_classes)
    centre = figures(*_totals(rows, cols, means, num_classes))
    replicates = max(FEWEST_REPLICATES, min(MOST_REPLICATES, CELLS_TO_DRAW // len(means)))
    drawn: dict[str, list[float]] = {name: [] for name in bounds}
    for replicate in range(replicates):
        redrawn = figures(*redraw_totals(rows, cols, means, num_classes=num_classes, seed=SEED + replicate))
        for name, values in drawn.items():
            value = redrawn[name]
            if value is not None:
                values.append(value)
    return {name: _around(estimate[name], centre[name], np.array(drawn[name]), *bounds[name]) for name in bounds}


def _totals(rows: Array, cols: Array, counts: Array, num_classes: int) -> tuple[Array, Array, Array]:
    is_right = rows == cols
    right = np.bincount(rows[is_right], weights=counts[is_right], minlength=num_classes)
    support = np.bincount(rows, weights=counts, minlength=num_classes)
    predicted = np.bincount(cols, weights=counts, minlength=num_classes)[:num_classes]
    return right, support, predicted


def _smoothed(rows: Array, cols: Array, counts: Array, num_classes: int) -> tuple[Array, Array, Array]:
    """Add half a right and half a wrong answer, distributed by support; wrong answers name the next class."""
    support = np.bincount(rows, weights=counts, minlength=num_classes)
    present = np.flatnonzero(support)
    share = 0.5 * support[present] / support.sum()
    following = np.roll(present, -1) if len(present) > 1 else (present + 1)
    rows = np.concatenate([rows, present, present])
    cols = np.concatenate([cols, present, following])
    return rows, cols, np.concatenate([counts.astype(np.float64), share, share])


def _around(estimate: float | None, centre: float | None, drawn: Array, low: float, high: float) -> Interval | None:
    """Return the interval around the bias-corrected centre, on the log-odds scale; it always includes the estimate."""
    if estimate is None or centre is None or len(drawn) < FEWEST_REPLICATES // 2:
        return None
    width = high - low
    place = (centre - low) / width
    if not 0 < place < 1:
        return [round(estimate, 6), round(estimate, 6)]
    spread = float(drawn.std()) / width / (place * (1 - place))
    corrected = place - (float(drawn.mean()) - centre) / width
    odds = _log_odds(corrected if 0 < corrected < 1 else place)
    ends = [low + width / (1 + math.exp(-(odds + side * Z * spread))) for side in (-1, 1)]
    # The bootstrap's noise is far above the sixth digit, and the last bits depend on the machine.
    return [round(min(ends[0], estimate), 6), round(max(ends[1], estimate), 6)]


def _log_odds(place: float) -> float:
    return math.log(place / (1 - place))
