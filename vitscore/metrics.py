"""Counts to figures: everything metrics.json says about one model.

`ModelCounts` streams over predictions and merges; `model_metrics` turns its counts into the figures. Stands between the
parts (fold reads them) and the report. Knows no file and no tensor; `compute_metrics` lends the same figures to
transformers' Trainer. Axes: B rows, K classes, T the k of top-k, M reliability bins.

Definitions are scikit-learn's. An answer outside the classes (a bad sample that counts as wrong, a row of NaN logits)
is in its class' support and in no column. A figure that is not defined is None.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from vitscore.classes.groups import Groups
from vitscore.errors import LabelError, UsageError
from vitscore.intervals import LEVEL, bootstrap, wilson
from vitscore.kernels.arrays import as_array, as_ids, check_same_length
from vitscore.kernels.counts import ConfusionCounts
from vitscore.kernels.reliability import NUM_BINS, add_in_order, add_reliability

Array: TypeAlias = npt.NDArray[Any]
Cells: TypeAlias = tuple[Array, Array, Array]
TOP_K = (1, 5)
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


class ModelCounts:
    """What is counted of one model's predictions; the same for any cutting of the rows into batches."""

    def __init__(self, num_classes: int, *, top_k: Sequence[int] = TOP_K) -> None:
        self.num_classes = num_classes
        self.confusion = ConfusionCounts(num_classes)
        self.unanswered_K = np.zeros(num_classes, np.int64)
        self.topk_hits = {k: 0 for k in top_k if k <= num_classes}
        self.num_unlabelled = 0
        self.num_probabilities = 0
        self.num_unknown = 0
        """Samples of these whose label's probability is not known: then there is no NLL and no Brier score."""
        self.logprob_sum = 0.0
        self.brier_sum = 0.0
        self.bin_counts_M = np.zeros(NUM_BINS, np.int64)
        self.bin_confidence_M = np.zeros(NUM_BINS, np.float64)
        self.bin_correct_M = np.zeros(NUM_BINS, np.int64)

    @property
    def num_samples(self) -> int:
        """Labelled samples that count, answered or not."""
        return self.confusion.num_samples + int(self.unanswered_K.sum())

    def update(
        self,
        labels_B: Any,
        preds_B: Any,
        *,
        topk_BT: Any = None,
        prob_B: Any = None,
        label_logprob_B: Any = None,
        sum_sq_prob_B: Any = None,
    ) -> int:
        """Count a batch.

        Args:
            labels_B: class ids; -1 where there is none: counted as unlabelled, else left out.
            preds_B: class ids; -1 where the model gave no answer (its logits were not finite).
            topk_BT: best ids first; narrower than a wanted k: that k is not reported. Without it, top-1 only.
            prob_B: the prediction's probability; without it no NLL, Brier score and ECE.
            label_logprob_B: log of the label's probability; NaN where it is not known.
            sum_sq_prob_B: sum of squared probabilities.

        Returns:
            How many labelled samples were counted.
        """
        labels_B, preds_B = self._checked(labels_B), as_ids(preds_B, "predictions")
        check_same_length(labels=labels_B, predictions=preds_B)
        is_labelled_B = labels_B != -1
        is_answered_B = is_labelled_B & (preds_B != -1)
        self.confusion.update(preds_B[is_answered_B], labels_B[is_answered_B])
        self.num_unlabelled += int((~is_labelled_B).sum())
        self.count_wrong(labels_B[is_labelled_B & ~is_answered_B])
        self._count_topk(labels_B[is_answered_B], preds_B[is_answered_B], topk_BT, is_answered_B)
        if prob_B is not None and label_logprob_B is not None and sum_sq_prob_B is not None:
            self._count_probabilities(
                (labels_B == preds_B)[is_answered_B], as_array(prob_B)[is_answered_B],
                as_array(label_logprob_B)[is_answered_B], as_array(sum_sq_prob_B)[is_answered_B],
            )  # fmt: skip
        return int(is_labelled_B.sum())

    def count_wrong(self, labels_B: Any) -> None:
        """Count labelled samples as wrong answers: in their class' support, in no column; -1 is left out."""
        labels_B = self._checked(labels_B)
        self.unanswered_K += np.bincount(labels_B[labels_B != -1], minlength=self.num_classes)

    def _checked(self, values: Any) -> Array:
        labels_B = as_ids(values)
        outside_B = (labels_B < -1) | (labels_B >= self.num_classes)
        if outside_B.any():
            expected = f"0..{self.num_classes - 1}, or -1 for none"
            raise LabelError("label out of range", expected=expected, got=str(labels_B[outside_B][0]))
        return labels_B

    def _count_topk(self, labels_B: Array, preds_B: Array, topk_BT: Any, is_answered_B: Array) -> None:
        topk_BT = preds_B[:, None] if topk_BT is None else as_array(topk_BT)[is_answered_B]
        width = topk_BT.shape[1]
        if len(labels_B):
            self.topk_hits = {k: hits for k, hits in self.topk_hits.items() if k <= width}
        is_hit_BT = topk_BT == labels_B[:, None]
        for k in self.topk_hits:
            self.topk_hits[k] += int(is_hit_BT[:, :k].any(axis=1).sum())

    def _count_probabilities(self, is_right_B: Array, prob_B: Array, logprob_B: Array, sum_sq_B: Array) -> None:
        self.num_probabilities += len(prob_B)
        is_known_B = ~np.isnan(logprob_B)
        self.num_unknown += int((~is_known_B).sum())
        logprob_B, sum_sq_B = logprob_B[is_known_B].astype(np.float64), sum_sq_B[is_known_B]
        self.logprob_sum = add_in_order(self.logprob_sum, logprob_B)
        self.brier_sum = add_in_order(self.brier_sum, sum_sq_B.astype(np.float64) - 2 * np.exp(logprob_B) + 1)
        add_reliability(self.bin_counts_M, self.bin_confidence_M, self.bin_correct_M, prob_B, is_right_B)

    def merge(self, other: ModelCounts) -> None:
        """Add another's counts, as if its samples had been counted here."""
        self.confusion.merge(other.confusion)
        self.unanswered_K += other.unanswered_K
        self.topk_hits = {k: hits + other.topk_hits[k] for k, hits in self.topk_hits.items() if k in other.topk_hits}
        self.num_unlabelled += other.num_unlabelled
        self.num_probabilities += other.num_probabilities
        self.num_unknown += other.num_unknown
        self.logprob_sum += other.logprob_sum
        self.brier_sum += other.brier_sum
        self.bin_counts_M += other.bin_counts_M
        self.bin_confidence_M += other.bin_confidence_M
        self.bin_correct_M += other.bin_correct_M

    def totals(self) -> tuple[Array, Array, Array]:
        """For each class: right answers, support, predictions."""
        right_K, support_K, predicted_K = self.confusion.totals()
        return right_K, support_K + self.unanswered_K, predicted_K

    def cells(self) -> Cells:
        """Truth, answer and count of every cell that occurs; an answer outside the classes is column K."""
        rows, cols, counts, _ = self.confusion.pairs()
        missed = np.flatnonzero(self.unanswered_K)
        outside = np.full(len(missed), self.num_classes)
        return (
            np.concatenate([rows, missed]),
            np.concatenate([cols, outside]),
            np.concatenate([counts, self.unanswered_K[missed]]),
        )


def model_metrics(
    counts: ModelCounts, classes: Sequence[str], *, only: Array | None = None, groups: Groups | None = None
) -> dict[str, Any]:
    """One model's entry in metrics.json, in the contract's order.

    Args:
        counts: what was counted.
        classes: K names.
        only: ids of the classes that are reported, as scikit-learn's `labels=`; all samples must be of them.
        groups: also score these superclasses.
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
    """The figures of superclasses: an answer is right where it is of the truth's group."""
    rows, cols, counts = cells
    num_groups = len(groups.names)
    group_of = np.append(groups.of_class, num_groups)
    found, places = np.unique(group_of[rows] * (num_groups + 1) + group_of[cols], return_inverse=True)
    grouped = (*np.divmod(found, num_groups + 1), np.bincount(places, weights=counts).astype(np.int64))
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
    """For each class, as float64: right answers, support, predictions."""
    rows, cols, counts = cells
    is_right = rows == cols
    return (
        np.bincount(rows[is_right], weights=counts[is_right], minlength=num_classes),
        np.bincount(rows, weights=counts, minlength=num_classes),
        np.bincount(cols, weights=counts, minlength=num_classes + 1)[:num_classes],
    )


def _averages_of(right_K: Array, support_K: Array, predicted_K: Array, *, classes: Sequence[str]) -> dict[str, Any]:
    """The report, and two averages that it has no place for: over the truth's classes alone, and over all answers."""
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
    """scikit-learn's report (all classes, zero_division=0) as a dict, from totals per class; always with accuracy."""
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
    """Names that can stand as keys of a report: a repeated one, or the name of an average, becomes `name [id]`."""
    seen = Counter(classes)
    names = [f"{name} [{i}]" if seen[name] > 1 or name in _AVERAGES else name for i, name in enumerate(classes)]
    return report_names(names) if len(set(names)) < len(names) else names


def class_figures(
    right_K: Array, support_K: Array, predicted_K: Array, *, only: Array | None = None
) -> dict[str, float | None]:
    """Every figure that totals per class determine, averaged over the classes `only`; None where it is not defined."""
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
    """Matthews' and Cohen's coefficients; answers outside the classes are one class more, without truth."""
    n, num_right = float(support_K.sum()), float(right_K.sum())
    if n == 0:
        return {"mcc": None, "cohen_kappa": None}
    outside = n - float(predicted_K.sum())
    chance = float(support_K @ predicted_K)
    truth_spread = n * n - float(support_K @ support_K)
    answer_spread = n * n - float(predicted_K @ predicted_K) - outside * outside
    # scikit-learn's own convention for 0 / 0 here; kappa it calls undefined.
    both = math.sqrt(truth_spread) * math.sqrt(answer_spread)
    mcc = (num_right * n - chance) / both if both else 0.0
    return {"mcc": mcc, "cohen_kappa": _ratio(num_right * n - chance, n * n - chance)}


def _per_class(right_K: Array, support_K: Array, predicted_K: Array) -> tuple[Array, Array, Array]:
    """Precision, recall and F1, 0 where the denominator is 0."""
    precision_K = right_K / np.maximum(predicted_K, 1)
    recall_K = right_K / np.maximum(support_K, 1)
    both_K = support_K + predicted_K
    return precision_K, recall_K, 2 * right_K / np.where(both_K > 0, both_K, 1)


def _averages(right_K: Array, support_K: Array, predicted_K: Array, weights_K: Array) -> dict[str, float]:
    per_class = _per_class(right_K, support_K, predicted_K)
    averages = [math.fsum(figure_K * weights_K) for figure_K in per_class]
    return dict(zip(("precision", "recall", "f1-score"), averages, strict=True))


def _probability_figures(counts: ModelCounts) -> dict[str, float | None]:
    """Over the samples that have probabilities: negative log-likelihood, Brier score (0 to 2), calibration error."""
    n = counts.num_probabilities
    num_known = 0 if counts.num_unknown else n
    gaps_M = np.abs(counts.bin_correct_M - counts.bin_confidence_M)
    return {
        "nll": _ratio(-counts.logprob_sum, num_known),
        "brier": _ratio(counts.brier_sum, num_known),
        "ece": _ratio(math.fsum(gaps_M), n),
    }


def _reliability(counts: ModelCounts) -> dict[str, list[Any]]:
    """For each of the equal bins of confidence: samples, their mean confidence, their accuracy."""
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
    """Accuracy and macro precision, recall and F1 of an evaluation, as transformers' Trainer asks for them.

    Args:
        prediction: an `EvalPrediction`: `predictions` (logits (N, K), or a tuple that begins with them), `label_ids`.
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
