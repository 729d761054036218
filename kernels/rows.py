"""Compute predictions and scores from rows of logits in one pass.

Sits between a model's logits and the columns of a part. Axes: B rows (samples), K classes, T the k of top-k.

Rows are independent, and a row is summed from its first class to its last, so its outputs are the same bit for bit in
any batch, at any position and for any number of threads. Ties go to the lowest class id. A row with a NaN or an
infinite logit is flagged: its ids are -1 and its figures NaN; the caller decides how to treat it. The kernel runs in
the calling thread and releases the interpreter lock, so callers can split a batch among threads.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from vitscore.errors import LabelError, UsageError
from vitscore.kernels.arrays import BoolArray, FloatArray, IntArray, as_ids, as_logits, check_same_length
from vitscore.kernels.bits import float_of_bits
from vitscore.kernels.compiled import compiled


class RowScores(NamedTuple):
    """The outputs for each row; T = min(k, K)."""

    pred: IntArray
    """int32 (B): the class of the largest logit; ties go to the lowest id; -1 if the row is not finite."""
    prob: FloatArray
    """float32 (B): its softmax probability."""
    topk: IntArray
    """int32 (B, T): class ids in order of decreasing logits."""
    topk_prob: FloatArray
    """float32 (B, T): their probabilities."""
    label_logprob: FloatArray
    """float32 (B): natural log of the label's probability; NaN without a label."""
    sum_sq_prob: FloatArray
    """float32 (B): sum of squared probabilities over all classes, for the Brier score."""
    log_sum_exp: FloatArray
    """float32 (B): log of the sum of the exponentials of the logits."""
    margin: FloatArray
    """float32 (B): largest logit minus the second largest; 0 if there is one class."""
    entropy: FloatArray
    """float32 (B): entropy of the probabilities, in nats."""
    is_finite: BoolArray
    """bool (B): whether all logits of the row are finite."""


def score_rows(logits_BK: Any, labels_B: Any, k: int = 5) -> RowScores:
    """Score a batch of logits.

    Args:
        logits_BK: float32, C-contiguous (other arrays are converted); K at least 1.
        labels_B: class ids in [0, K), or -1 for a sample without a label.
        k: number of best classes to keep, at most K.

    Raises:
        LabelError: a label is outside [-1, K).
        UsageError: the arrays differ in length, the logits are not a matrix, or k is below 1.
    """
    logits_BK = as_logits(logits_BK)
    labels_B = as_ids(labels_B)
    check_same_length(logits=logits_BK, labels=labels_B)
    if k < 1:
        raise UsageError("invalid top-k", expected="k of at least 1", got=str(k))
    num_rows, num_classes = logits_BK.shape
    outside = (labels_B < -1) | (labels_B >= num_classes)
    if outside.any():
        expected = f"0..{num_classes - 1}, or -1 for none"
        raise LabelError("label out of range", expected=expected, got=str(labels_B[outside][0]))
    width = min(k, num_classes)
    ids_BT = np.empty((num_rows, width), np.int32)
    probs_BT = np.empty((num_rows, width), np.float32)
    figures_6B = np.empty((6, num_rows), np.float32)
    is_finite_B = np.empty(num_rows, np.bool_)
    _score_rows(logits_BK, labels_B.astype(np.int32, copy=False), ids_BT, probs_BT, figures_6B, is_finite_B)
    prob, label_logprob, sum_sq_prob, log_sum_exp, margin, entropy = figures_6B
    return RowScores(
        pred=np.ascontiguousarray(ids_BT[:, 0]),
        prob=prob,
        topk=ids_BT,
        topk_prob=probs_BT,
        label_logprob=label_logprob,
        sum_sq_prob=sum_sq_prob,
        log_sum_exp=log_sum_exp,
        margin=margin,
        entropy=entropy,
        is_finite=is_finite_B,
    )


# The exponential is written out: calls into the C library, one per class, would take most of the kernel's time, while
# this form compiles to vector instructions. It is 2^n times the Taylor polynomial of e^r on |r| <= ln(2)/2, whose first
# omitted term is 5e-9, below float32's rounding. Splitting ln(2) in two parts keeps r exact.
_LOG2_E = np.float32(1.4426950408889634)
_LN2_HIGH = np.float32(0.693359375)
_LN2_LOW = np.float32(-2.12194440e-4)
_SMALLEST = np.float32(-87.0)
_ZERO, _HALF, _ONE = np.float32(0), np.float32(0.5), np.float32(1)
_T2, _T3, _T4 = np.float32(1 / 2), np.float32(1 / 6), np.float32(1 / 24)
_T5, _T6, _T7 = np.float32(1 / 120), np.float32(1 / 720), np.float32(1 / 5040)
_LARGEST_FLOAT = float(np.finfo(np.float32).max)


@compiled
def _exponentials(logits_K: FloatArray, top: float, shifted_K: FloatArray, exp_K: FloatArray) -> None:
    """Write `logit - top` and its exponential for every class; exponentials below e^-87 become 0."""
    for j in range(logits_K.shape[0]):
        x = logits_K[j] - top
        is_gone = x < _SMALLEST
        x = _SMALLEST if is_gone else x
        power = np.int32(x * _LOG2_E - _HALF)
        whole = np.float32(power)
        r = x - whole * _LN2_HIGH
        r = r - whole * _LN2_LOW
        y = _T6 + r * _T7
        y = _T5 + r * y
        y = _T4 + r * y
        y = _T3 + r * y
        y = _T2 + r * y
        y = _ONE + r * y
        y = _ONE + r * y
        y = y * float_of_bits(np.int32((power + np.int32(127)) << np.int32(23)))
        shifted_K[j] = x
        exp_K[j] = _ZERO if is_gone else y


@compiled
def _rank(logits_K: FloatArray, best_T: FloatArray, ids_T: IntArray) -> None:
    """Insert the classes into the sorted best ones; only strictly larger logits move up, so ties keep the lowest id."""
    width = best_T.shape[0]
    filled = 0
    for j in range(logits_K.shape[0]):
        x = logits_K[j]
        if filled == width and not x > best_T[width - 1]:
            continue
        place = min(filled, width - 1)
        while place > 0 and x > best_T[place - 1]:
            best_T[place] = best_T[place - 1]
            ids_T[place] = ids_T[place - 1]
            place -= 1
        best_T[place] = x
        ids_T[place] = j
        filled = min(filled + 1, width)


@compiled
def _all_finite(logits_K: FloatArray) -> bool:
    num_bad = 0
    for j in range(logits_K.shape[0]):
        # The difference is NaN for NaN and infinities, and 0 for all other numbers.
        num_bad += int(not (logits_K[j] - logits_K[j] == _ZERO))
    return num_bad == 0


@compiled
def _score_rows(
    logits_BK: FloatArray,
    labels_B: IntArray,
    ids_BT: IntArray,
    probs_BT: FloatArray,
    figures_6B: FloatArray,
    is_finite_B: BoolArray,
) -> None:
    num_rows, num_classes = logits_BK.shape
    width = ids_BT.shape[1]
    kept = min(max(width, 2), num_classes)  # the margin needs the second best even if k is 1
    shifted_K = np.empty(num_classes, np.float32)
    exp_K = np.empty(num_classes, np.float32)
    best_T = np.empty(kept, np.float32)
    best_ids_T = np.empty(kept, np.int32)
    for i in range(num_rows):
        is_finite_B[i] = _all_finite(logits_BK[i])
        if not is_finite_B[i]:
            ids_BT[i, :] = -1
            probs_BT[i, :] = np.nan
            figures_6B[:, i] = np.nan
            continue
        _rank(logits_BK[i], best_T, best_ids_T)
        top = best_T[0]
        _exponentials(logits_BK[i], top, shifted_K, exp_K)
        total, squares, products = 0.0, 0.0, 0.0
        for j in range(num_classes):
            e = np.float64(exp_K[j])
            total += e
            squares += e * e
            products += e * shifted_K[j]
        log_total = math.log(total)
        for t in range(width):
            ids_BT[i, t] = best_ids_T[t]
            probs_BT[i, t] = exp_K[best_ids_T[t]] / total
        label = labels_B[i]
        label_logprob = np.nan
        if label >= 0:
            label_logprob = np.float64(logits_BK[i, label]) - np.float64(top) - log_total
            label_logprob = max(label_logprob, -_LARGEST_FLOAT)
        figures_6B[0, i] = exp_K[best_ids_T[0]] / total
        figures_6B[1, i] = label_logprob
        figures_6B[2, i] = squares / (total * total)
        figures_6B[3, i] = np.float64(top) + log_total
        figures_6B[4, i] = 0.0
        if num_classes > 1:
            margin = np.float64(top) - np.float64(best_T[1])
            figures_6B[4, i] = min(margin, _LARGEST_FLOAT)
        figures_6B[5, i] = max(log_total - products / total, 0.0)
