"""Figures of one model, computed from its counts: its entry in metrics.json.

`fold` streams the parts into `ModelCounts`, `model_metrics` turns the counts into figures, and the report shows them.
`compute_metrics` offers the main figures to transformers' Trainer. Neither files nor tensors appear here. Axes: B rows,
K classes, T the k of top-k, M reliability bins.

Definitions are scikit-learn's. An answer outside the classes (a bad sample that counts as wrong, a row of NaN logits)
adds to the support of its class and to no column. An undefined figure is None.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from vitscore.classes.groups import Groups
from vitscore.errors import UsageError
from vitscore.kernels.arrays import Array, as_array
from vitscore.kernels.counts import ConfusionCounts
from vitscore.metrics.counts import Cells, ModelCounts
from vitscore.metrics.intervals import LEVEL, bootstrap, wilson

_AVERAGES = ("accuracy", "macro avg", "weighted avg")
_BOUNDS = {
    "macro_precision": (0.0, 1.0),
    "macro_recall": (0.0, 1.0),
    "macro_f1": (0.0, 1.0),
    "weighted_precision": (0.0, 1.0),
    "weighted_f1": (0.0, 1.0),
    "balanced_accuracy": (0.0, 1.0),
    "mcc": (-1.0, 1.0),
    "cohen_kappa": (-1.0, 1.0),
}


def model_metrics(
    counts: ModelCounts, classes: Sequence[str], *, only: Array | None = None, groups: Groups | None = None
) -> dict[str, Any]:
    """Return one model's entry in metrics.json, in the documented order.

    Args:
        counts: counts of the model's predictions.
        classes: K names.
        only: ids of the classes to report, like scikit-learn's `labels=`; every sample must belong to one of them.
        groups: superclasses to score as well.

    Raises:
        UsageError: the number of names is not K.
    """
    if len(classes) != counts.num_classes:
        got = f"{len(classes)} names"
        raise UsageError("class names do not fit the counts", expected=f"{counts.num_classes} names", got=got)
    cells = counts.cells()
    totals = totals_of(cells, counts.num_classes)
    figures = class_figures(*totals, only=only)
    shown = np.arange(counts.num_classes) if only is None else only
    n = counts.num_samples
    topk_ci = {str(k): wilson(hits, n) for k, hits in counts.topk_hits.items()}
    entry = {
        "samples": n,
        "num_classes_in_truth": int((totals[1] > 0).sum()),
        "accuracy": figures["accuracy"],
        "topk_accuracy": {str(k): hits / n if n else None for k, hits in counts.topk_hits.items()},
        **{name: figures[name] for name in ("balanced_accuracy", "mcc", "cohen_kappa")},
        **_probability_figures(counts),
        **_averages_of(*(total_K[shown] for total_K in totals), classes=[classes[index] for index in shown.tolist()]),
        "confidence_intervals": _intervals(cells, counts.num_classes, only=only, topk=topk_ci),
        "reliability": _reliability(counts),
    }
    return entry if groups is None else {**entry, "groups": group_metrics(cells, groups)}


def group_metrics(cells: Cells, groups: Groups) -> dict[str, Any]:
    """Return the figures of superclasses; an answer is right if its group is the label's."""
    rows, cols, counts = cells
    num_groups = len(groups.names)
    group_of = np.append(groups.of_class, num_groups)
    keys, places = np.unique(group_of[rows] * (num_groups + 1) + group_of[cols], return_inverse=True)
    grouped = (*np.divmod(keys, num_groups + 1), np.bincount(places, weights=counts).astype(np.int64))
    totals = totals_of(grouped, num_groups)
    figures = class_figures(*totals)
    return {
        "samples": int(counts.sum()),
        "classes": list(groups.names),
        "num_classes_in_truth": int((totals[1] > 0).sum()),
        **{name: figures[name] for name in ("accuracy", "balanced_accuracy", "mcc", "cohen_kappa")},
        **_averages_of(*totals, classes=groups.names),
        "confidence_intervals": _intervals(grouped, num_groups),
    }


def totals_of(cells: Cells, num_classes: int) -> tuple[Array, Array, Array]:
    """Return right answers, support and predictions of every class, as float64."""
    rows, cols, counts = cells
    is_right = rows == cols
    return (
        np.bincount(rows[is_right], weights=counts[is_right], minlength=num_classes),
        np.bincount(rows, weights=counts, minlength=num_classes),
        np.bincount(cols, weights=counts, minlength=num_classes + 1)[:num_classes],
    )


def _averages_of(right_K: Array, support_K: Array, predicted_K: Array, *, classes: Sequence[str]) -> dict[str, Any]:
    """Return the report, the macro average over the classes in the truth, and the micro average."""
    n, num_right, answered = (float(total_K.sum()) for total_K in (support_K, right_K, predicted_K))
    if not n:
        return {"report": None, "macro_in_truth": None, "micro": None}
    present_K = support_K > 0
    return {
        "report": classification_report(right_K, support_K, predicted_K, classes),
        "macro_in_truth": _averages(right_K, support_K, predicted_K, present_K / present_K.sum()),
        "micro": {
            "precision": _ratio(num_right, answered) or 0.0,
            "recall": num_right / n,
            "f1-score": 2 * num_right / (n + answered),
        },
    }


def classification_report(
    right_K: Array, support_K: Array, predicted_K: Array, classes: Sequence[str]
) -> dict[str, Any]:
    """Return scikit-learn's report (all classes, zero_division=0) as a dict that always has `accuracy`."""
    per_class = zip(*_per_class(right_K, support_K, predicted_K), support_K, strict=True)
    rows = zip(report_names(classes), per_class, strict=True)
    headers = ("precision", "recall", "f1-score", "support")
    report: dict[str, Any] = {
        name: dict(zip(headers, (float(figure) for figure in row), strict=True)) for name, row in rows
    }
    total = float(support_K.sum())
    report["accuracy"] = _ratio(float(right_K.sum()), total) or 0.0
    even_K = np.full(len(support_K), 1 / len(support_K))
    for name, weights_K in (("macro avg", even_K), ("weighted avg", support_K / max(total, 1.0))):
        report[name] = {**_averages(right_K, support_K, predicted_K, weights_K), "support": total}
    return report


def report_names(classes: Sequence[str]) -> list[str]:
    """Return unique keys for a report: a repeated name, or one that equals an average's, becomes `name [id]`."""
    seen = Counter(classes)
    names = [f"{name} [{i}]" if seen[name] > 1 or name in _AVERAGES else name for i, name in enumerate(classes)]
    return report_names(names) if len(set(names)) < len(names) else names


def class_figures(
    right_K: Array, support_K: Array, predicted_K: Array, *, only: Array | None = None
) -> dict[str, float | None]:
    """Return the figures that the totals per class determine, averaged over `only`; an undefined one is None."""
    n = float(support_K.sum())
    figures = _per_class(right_K, support_K, predicted_K)
    precision_K, recall_K, f1_K = figures if only is None else tuple(figure_K[only] for figure_K in figures)
    weights_K = support_K if only is None else support_K[only]
    num_classes, num_present = len(weights_K), int((weights_K > 0).sum())
    has_samples = n > 0
    return {
        "accuracy": _ratio(float(right_K.sum()), n),
        "macro_precision": math.fsum(precision_K) / num_classes if has_samples else None,
        "macro_recall": math.fsum(recall_K) / num_classes if has_samples else None,
        "macro_f1": math.fsum(f1_K) / num_classes if has_samples else None,
        "weighted_precision": _ratio(math.fsum(precision_K * weights_K), n),
        "weighted_f1": _ratio(math.fsum(f1_K * weights_K), n),
        "balanced_accuracy": _ratio(math.fsum(recall_K), float(num_present)),
        **_agreement(right_K, support_K, predicted_K),
    }


def _agreement(right_K: Array, support_K: Array, predicted_K: Array) -> dict[str, float | None]:
    """Return Matthews' and Cohen's coefficients; answers outside the classes form an extra class without samples."""
    n, num_right = float(support_K.sum()), float(right_K.sum())
    if n == 0:
        return {"mcc": None, "cohen_kappa": None}
    outside = n - float(predicted_K.sum())
    chance = float(support_K @ predicted_K)
    truth_spread = n * n - float(support_K @ support_K)
    answer_spread = n * n - float(predicted_K @ predicted_K) - outside * outside
    # As in scikit-learn: MCC is 0 for 0 / 0, kappa is undefined.
    both = math.sqrt(truth_spread) * math.sqrt(answer_spread)
    mcc = (num_right * n - chance) / both if both else 0.0
    return {"mcc": mcc, "cohen_kappa": _ratio(num_right * n - chance, n * n - chance)}


def _per_class(right_K: Array, support_K: Array, predicted_K: Array) -> tuple[Array, Array, Array]:
    """Return precision, recall and F1 of every class, 0 if the denominator is 0."""
    precision_K = right_K / np.maximum(predicted_K, 1)
    recall_K = right_K / np.maximum(support_K, 1)
    both_K = support_K + predicted_K
    return precision_K, recall_K, 2 * right_K / np.where(both_K > 0, both_K, 1)


def _averages(right_K: Array, support_K: Array, predicted_K: Array, weights_K: Array) -> dict[str, float]:
    per_class = _per_class(right_K, support_K, predicted_K)
    averages = [math.fsum(figure_K * weights_K) for figure_K in per_class]
    return dict(zip(("precision", "recall", "f1-score"), averages, strict=True))


def _probability_figures(counts: ModelCounts) -> dict[str, float | None]:
    """Return negative log-likelihood, Brier score (0 to 2) and ECE over the samples that have probabilities."""
    n = counts.num_probabilities
    num_known = 0 if counts.num_unknown else n
    gaps_M = np.abs(counts.bin_correct_M - counts.bin_confidence_M)
    return {
        "nll": _ratio(-counts.logprob_sum, num_known),
        "brier": _ratio(counts.brier_sum, num_known),
        "ece": _ratio(math.fsum(gaps_M), n),
    }


def _reliability(counts: ModelCounts) -> dict[str, list[Any]]:
    """Return number of samples, mean confidence and accuracy of each confidence bin; the bins are equally wide."""
    bins = [int(n) for n in counts.bin_counts_M]
    return {
        "samples": bins,
        "confidence": [_ratio(float(c), n) for c, n in zip(counts.bin_confidence_M, bins, strict=True)],
        "accuracy": [_ratio(float(c), n) for c, n in zip(counts.bin_correct_M, bins, strict=True)],
    }


def _intervals(
    cells: Cells, num_classes: int, *, only: Array | None = None, topk: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    rows, cols, counts = cells
    n = int(counts.sum())
    intervals: dict[str, Any] = {"level": LEVEL, "accuracy": wilson(int(counts[rows == cols].sum()), n)}
    if topk is not None:
        intervals["topk_accuracy"] = topk
    if not n:
        return intervals | dict.fromkeys(_BOUNDS)
    return intervals | bootstrap(cells, num_classes, partial(class_figures, only=only), bounds=_BOUNDS)


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def compute_metrics(prediction: Any) -> dict[str, float]:
    """Return accuracy and macro precision, recall and F1; pass it to transformers' Trainer as `compute_metrics`.

    Args:
        prediction: an `EvalPrediction`: `predictions` (logits (N, K), or a tuple that begins with them), `label_ids`.

    Raises:
        UsageError: the logits do not have two axes.
    """
    logits, labels = prediction.predictions, prediction.label_ids
    logits_NK = as_array(logits[0] if isinstance(logits, tuple | list) else logits)
    if logits_NK.ndim != 2:
        raise UsageError("logits are not a table", expected="shape (N, K)", got=str(logits_NK.shape))
    labels_N = as_array(labels[0] if isinstance(labels, tuple) else labels).reshape(-1)
    confusion = ConfusionCounts(logits_NK.shape[1])
    confusion.update(logits_NK, labels_N)
    figures = class_figures(*(total_K.astype(np.float64) for total_K in confusion.totals()))
    names = {"accuracy": "accuracy", "precision": "macro_precision", "recall": "macro_recall", "f1": "macro_f1"}
    return {name: figures[source] or 0.0 for name, source in names.items()}
