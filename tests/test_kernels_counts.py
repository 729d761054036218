"""Confusion counts compared with their NumPy twin and scikit-learn: streaming, merging, sparse, bad ids."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import confusion_matrix

from vitscore.errors import LabelError, UsageError
from vitscore.kernels import ConfusionCounts, SparseConfusion, add_counts
from vitscore.kernels.counts import LARGEST_SQUARE
from vitscore.kernels.reference import count_reference


def random_ids(num: int, num_classes: int, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.integers(-1, num_classes, num).astype(np.int32), rng.integers(0, num_classes, num).astype(np.int32)


def dense(confusion: SparseConfusion) -> np.ndarray:
    square = np.zeros(confusion.shape, np.int64)
    square[confusion.rows, confusion.cols] = confusion.counts
    return square


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(0, 300), st.integers(0, 2**32), st.sampled_from([np.int32, np.int64, np.int16]))
def test_matches_the_numpy_twin(num_classes: int, num: int, seed: int, dtype: type) -> None:
    labels, preds = random_ids(num, num_classes, seed=seed)
    confusion = np.zeros((num_classes, num_classes), np.int64)
    assert add_counts(confusion, labels.astype(dtype), preds.astype(dtype)) == (labels >= 0).sum()
    assert (confusion == count_reference(labels, preds, num_classes)).all()


def test_matches_scikit_learn() -> None:
    labels, preds = random_ids(2000, 30)
    counts = ConfusionCounts(30)
    counts.update(preds, labels)
    assert (counts.compute() == confusion_matrix(labels[labels >= 0], preds[labels >= 0], labels=range(30))).all()


@pytest.mark.parametrize("num_classes", [20, LARGEST_SQUARE, LARGEST_SQUARE + 1, 21841])
def test_streamed_merged_and_whole_are_the_same(num_classes: int) -> None:
    labels, preds = random_ids(5000, num_classes)
    whole, streamed, other = (ConfusionCounts(num_classes) for _ in range(3))
    whole.update(preds, labels)
    for start in range(0, 2000, 97):
        rows = slice(start, min(start + 97, 2000))
        streamed.update(preds[rows], labels[rows])
    other.update(preds[2000:], labels[2000:])
    streamed.merge(other)
    for a, b in zip(streamed.pairs(), whole.pairs(), strict=True):
        assert np.array_equal(a, b)
    assert streamed.num_samples == whole.num_samples == (labels >= 0).sum()


def test_sparse_counts_are_the_square_ones() -> None:
    num_classes = LARGEST_SQUARE + 4
    labels, preds = random_ids(200_000, num_classes)
    labels %= 50
    preds %= 60
    counts = ConfusionCounts(num_classes)
    counts.update(preds, labels)
    sparse = counts.compute()
    assert isinstance(sparse, SparseConfusion)
    square = count_reference(labels, preds, num_classes)
    assert (dense(sparse) == square).all()
    for got, wanted in zip(counts.totals(), (np.diagonal(square), square.sum(1), square.sum(0)), strict=True):
        assert (got == wanted).all()


def test_sparse_counts_stay_small() -> None:
    counts = ConfusionCounts(21841)
    labels, preds = random_ids(300_000, 21841)
    counts.update(preds, labels)
    assert counts._keys_S.nbytes + counts._counts_S.nbytes < 40e6


@pytest.mark.parametrize("num_classes", [5, 5000])
@pytest.mark.parametrize(
    "what, labels, preds", [("label", [0, 9999, 1], [0, 1, 1]), ("prediction", [0, 1, 1], [0, 1, -1])]
)
def test_a_bad_id_raises_before_anything_is_counted(num_classes: int, what: str, labels: list, preds: list) -> None:
    counts = ConfusionCounts(num_classes)
    with pytest.raises(LabelError, match=f"{what} out of range: row"):
        counts.update(np.array(preds), np.array(labels))
    assert counts.num_samples == 0 and len(counts.pairs().rows) == 0


def test_padding_rows_are_not_counted() -> None:
    confusion = np.zeros((3, 3), np.int64)
    assert add_counts(confusion, [0, -1, -1], [1, -1, 99]) == 1
    assert confusion.sum() == 1


def test_the_largest_score_is_the_prediction() -> None:
    counts = ConfusionCounts(3)
    counts.update(torch.tensor([[0.1, 0.7, 0.2], [0.5, 0.5, 0.0]]), torch.tensor([1, 2]))
    assert counts.compute().tolist() == [[0, 0, 0], [0, 1, 0], [1, 0, 0]]


def test_tensors_strided_arrays_and_lists_count_alike() -> None:
    labels, preds = random_ids(100, 7)
    expected = count_reference(labels, preds, 7)
    twice = np.repeat(labels, 2)
    for given_labels in (torch.from_numpy(labels), twice[::2], labels.tolist(), labels.astype(np.int64)):
        confusion = np.zeros((7, 7), np.int64)
        add_counts(confusion, given_labels, preds)
        assert (confusion == expected).all()


def test_reset_sets_all_counts_to_zero() -> None:
    counts = ConfusionCounts(4)
    counts.update([1, 2], [1, 1])
    counts.reset()
    assert counts.num_samples == 0 and not counts.compute().any()


def test_compute_returns_a_copy() -> None:
    counts = ConfusionCounts(2)
    counts.compute()[0, 0] = 7
    assert not counts.compute().any()


def test_ids_that_are_not_integers_are_refused() -> None:
    with pytest.raises(LabelError, match="labels are not class ids"):
        ConfusionCounts(3).update([0, 1], [0.5, 1.0])


@pytest.mark.parametrize("confusion", [np.zeros((2, 3), np.int64), np.zeros((2, 2)), np.zeros((4, 2), np.int64)[::2].T])
def test_a_matrix_that_cannot_be_counted_into_is_refused(confusion: np.ndarray) -> None:
    with pytest.raises(UsageError):
        add_counts(confusion, [0], [0])


def test_counts_of_different_classes_do_not_merge() -> None:
    with pytest.raises(UsageError, match="expected 3 classes"):
        ConfusionCounts(3).merge(ConfusionCounts(4))
