"""The row kernel compared with its NumPy twin, and the independence of a row from its batch and its neighbours."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from vitscore.errors import LabelError, UsageError
from vitscore.kernels import RowScores, score_rows
from vitscore.kernels.compiled import compiled
from vitscore.kernels.reference import score_rows_reference

FIELDS = RowScores._fields


def random_batch(num_rows: int, num_classes: int, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    logits = (rng.normal(size=(num_rows, num_classes)) * 5).astype(np.float32)
    return logits, rng.integers(-1, num_classes, num_rows).astype(np.int32)


def assert_close(scores: RowScores, expected: RowScores) -> None:
    for name in FIELDS:
        got, wanted = getattr(scores, name), getattr(expected, name)
        assert got.dtype == wanted.dtype and got.shape == wanted.shape, name
        np.testing.assert_allclose(got, wanted, rtol=3e-6, atol=3e-6, err_msg=name)


def assert_same_bits(scores: RowScores, expected: RowScores) -> None:
    for name in FIELDS:
        assert getattr(scores, name).tobytes() == getattr(expected, name).tobytes(), name


@pytest.mark.parametrize("num_classes", [1, 2, 3, 10, 1000, 21841])
@pytest.mark.parametrize("k", [1, 5, 2000])
def test_matches_the_numpy_twin(num_classes: int, k: int) -> None:
    logits, labels = random_batch(7, num_classes)
    assert_close(score_rows(logits, labels, k), score_rows_reference(logits, labels, k))


logit_rows = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=2, max_side=12),
    elements=st.one_of(
        st.sampled_from([0.0, -0.0, 1.0, 2.5, -100.0, 100.0, np.nan, np.inf, -np.inf]), st.floats(-50, 50, width=32)
    ),
)


@settings(max_examples=150, deadline=None)
@given(logit_rows, st.integers(1, 14), st.randoms(use_true_random=False))
def test_matches_the_numpy_twin_on_any_logits(logits: np.ndarray, k: int, random: object) -> None:
    labels = np.array([random.randint(-1, logits.shape[1] - 1) for _ in logits], np.int32)
    assert_close(score_rows(logits, labels, k), score_rows_reference(logits, labels, k))


def test_ties_go_to_the_lowest_id() -> None:
    scores = score_rows(np.array([[1, 3, 3, 1, 3]], np.float32), [1], 4)
    assert scores.pred[0] == 1
    assert scores.topk[0].tolist() == [1, 2, 4, 0]
    assert scores.margin[0] == 0


def test_a_row_does_not_depend_on_its_batch() -> None:
    logits, labels = random_batch(64, 1003)
    whole = score_rows(logits, labels, 5)
    for size in (1, 3, 17):
        pieces = [score_rows(logits[i : i + size], labels[i : i + size], 5) for i in range(0, 64, size)]
        assert_same_bits(RowScores(*(np.concatenate(columns) for columns in zip(*pieces, strict=True))), whole)


def test_a_row_does_not_depend_on_a_broken_neighbour() -> None:
    logits, labels = random_batch(8, 50)
    whole = score_rows(logits, labels, 5)
    logits[3, 7] = np.nan
    broken = score_rows(logits, labels, 5)
    rest = np.arange(8) != 3
    assert_same_bits(RowScores(*(c[rest] for c in broken)), RowScores(*(c[rest] for c in whole)))


def test_threads_give_the_same_bits() -> None:
    logits, labels = random_batch(32, 100)
    with ThreadPoolExecutor(4) as pool:
        runs = list(pool.map(lambda _: score_rows(logits, labels, 5), range(8)))
    for scores in runs:
        assert_same_bits(scores, runs[0])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_has_no_answer(value: float) -> None:
    scores = score_rows(np.array([[0, value, 1]], np.float32), [0], 2)
    assert not scores.is_finite[0]
    assert scores.pred[0] == -1 and scores.topk[0].tolist() == [-1, -1]
    assert np.isnan([scores.prob[0], scores.label_logprob[0], *scores.topk_prob[0]]).all()


def test_extreme_logits_give_finite_figures() -> None:
    scores = score_rows(np.array([[3e38, -3e38, 0], [-3e38, -3e38, -3e38]], np.float32), [1, 1], 3)
    assert all(np.isfinite(getattr(scores, name)).all() for name in FIELDS)
    assert scores.prob.tolist() == [1.0, pytest.approx(1 / 3)]


def test_one_class_is_certain() -> None:
    scores = score_rows(np.array([[2.0]], np.float32), [0], 5)
    assert scores.prob[0] == 1 and scores.entropy[0] == 0 and scores.label_logprob[0] == 0 and scores.margin[0] == 0


def test_an_empty_batch_is_empty() -> None:
    assert score_rows(np.zeros((0, 4), np.float32), np.zeros(0, np.int32), 2).topk.shape == (0, 2)


def test_a_sample_without_label_has_no_label_figure() -> None:
    assert np.isnan(score_rows(np.zeros((1, 4), np.float32), [-1], 2).label_logprob[0])


@pytest.mark.parametrize("label", [4, -2])
def test_a_label_outside_the_classes_is_refused(label: int) -> None:
    with pytest.raises(LabelError, match=f"expected 0..3, or -1 for none, got {label}"):
        score_rows(np.zeros((1, 4), np.float32), [label], 2)


@pytest.mark.parametrize("logits", [np.zeros(4), np.zeros((2, 0)), np.array([["a"]])])
def test_logits_that_are_not_a_matrix_are_refused(logits: np.ndarray) -> None:
    with pytest.raises(UsageError, match="logits are not a matrix"):
        score_rows(logits, [0], 1)


def test_arrays_of_different_lengths_are_refused() -> None:
    with pytest.raises(UsageError, match="logits 2, labels 3"):
        score_rows(np.zeros((2, 4), np.float32), [0, 0, 0], 1)


def test_tensors_and_other_layouts_give_the_same() -> None:
    logits, labels = random_batch(6, 10)
    expected = score_rows(logits, labels, 3)
    assert_same_bits(score_rows(torch.from_numpy(logits), torch.from_numpy(labels).long(), 3), expected)
    assert_same_bits(score_rows(np.asfortranarray(logits), labels.tolist(), 3), expected)


def test_top_k_agrees_with_torch() -> None:
    logits, labels = random_batch(40, 300, seed=1)
    probs, ids = torch.from_numpy(logits).softmax(1).topk(5)
    scores = score_rows(logits, labels, 5)
    assert scores.topk.tolist() == ids.tolist()
    np.testing.assert_allclose(scores.topk_prob, probs, rtol=1e-5)


def test_a_kernel_compiles_without_a_cache_folder() -> None:
    # numba finds no cache folder for a function without a source file.
    scope: dict[str, object] = {}
    exec(compile("def double(x):\n    return 2 * x\n", "<nowhere>", "exec"), scope)
    assert compiled(scope["double"])(4) == 8
