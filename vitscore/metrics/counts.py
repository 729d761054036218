"""Streaming counts of one model's predictions, from which its metrics are computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

from vitscore.errors import LabelError
from vitscore.kernels.arrays import Array, as_array, as_ids, check_same_length
from vitscore.kernels.counts import ConfusionCounts
from vitscore.kernels.reliability import NUM_BINS, add_in_order, add_reliability

Cells: TypeAlias = tuple[Array, Array, Array]
TOP_K = (1, 5)


class ModelCounts:
    """Counts of one model's predictions, independent of how the rows are split into batches."""

    def __init__(self, num_classes: int, *, top_k: Sequence[int] = TOP_K) -> None:
        self.num_classes = num_classes
        self.confusion = ConfusionCounts(num_classes)
        self.unanswered_K = np.zeros(num_classes, np.int64)
        self.topk_hits = {k: 0 for k in top_k if k <= num_classes}
        self.num_unlabelled = 0
        self.num_probabilities = 0
        self.num_unknown = 0
        """Samples whose label has an unknown probability; with any of them, NLL and Brier score are undefined."""
        self.logprob_sum = 0.0
        self.brier_sum = 0.0
        self.bin_counts_M = np.zeros(NUM_BINS, np.int64)
        self.bin_confidence_M = np.zeros(NUM_BINS, np.float64)
        self.bin_correct_M = np.zeros(NUM_BINS, np.int64)

    @property
    def num_samples(self) -> int:
        """Number of counted samples with a label, whether or not the model answered."""
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
            labels_B: class ids; -1 for a sample without a label, which adds to `num_unlabelled` and to nothing else.
            preds_B: class ids; -1 if the model gave no answer (its logits were not finite).
            topk_BT: the T most probable ids, best first; a k above T is not reported. By default, top-1 only.
            prob_B: probability of the prediction; NLL, Brier score and ECE need this and the next two.
            label_logprob_B: log-probability of the label; NaN if unknown.
            sum_sq_prob_B: sum of squared probabilities over the classes.

        Returns:
            The number of labelled samples in the batch.
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
                (labels_B == preds_B)[is_answered_B],
                as_array(prob_B)[is_answered_B],
                as_array(label_logprob_B)[is_answered_B],
                as_array(sum_sq_prob_B)[is_answered_B],
            )
        return int(is_labelled_B.sum())

    def count_wrong(self, labels_B: Any) -> None:
        """Count labelled samples as wrong answers, which add to their class's support and to no column; skip -1."""
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
        """Add the counts of `other`, as if its samples had been counted here."""
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
        """Return right answers, support and predictions of every class."""
        right_K, support_K, predicted_K = self.confusion.totals()
        return right_K, support_K + self.unanswered_K, predicted_K

    def cells(self) -> Cells:
        """Return truth, answer and count of the non-empty cells; answers outside the classes are column K."""
        rows, cols, counts, _ = self.confusion.pairs()
        missed = np.flatnonzero(self.unanswered_K)
        outside = np.full(len(missed), self.num_classes)
        return (
            np.concatenate([rows, missed]),
            np.concatenate([cols, outside]),
            np.concatenate([counts, self.unanswered_K[missed]]),
        )
