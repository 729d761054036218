"""Compare the CUDA kernels with their NumPy twins, on a GPU or numba's simulator; run by test_kernels_cuda.py.

A separate program, since numba decides at import whether the device is simulated.
"""

import sys

import numpy as np

from vitscore.errors import LabelError, UsageError
from vitscore.kernels.cuda import SLOTS, DeviceConfusionCounts, DeviceRows, DeviceRowScores, cuda
from vitscore.kernels.reference import count_reference, score_rows_reference


def to_device(array: np.ndarray) -> object:
    return cuda.to_device(np.ascontiguousarray(array))


def check_counts(num_classes: int, num_rows: int, dtype: type) -> None:
    rng = np.random.default_rng(num_classes)
    counts = DeviceConfusionCounts(num_classes)
    expected = np.zeros((num_classes, num_classes), np.int64) if num_classes <= 4096 else {}
    merged = DeviceConfusionCounts(num_classes)
    for is_other in (False, False, True):
        labels = rng.integers(-1, num_classes, num_rows).astype(dtype)
        preds = rng.integers(0, num_classes, num_rows).astype(dtype)
        preds[labels == -1] = -7  # ignored
        (merged if is_other else counts).update(to_device(preds), to_device(labels))
        if num_classes <= 4096:
            expected += count_reference(labels, preds, num_classes)
        else:
            for pair in zip(labels.tolist(), preds.tolist(), strict=True):
                if pair[0] >= 0:
                    expected[pair] = expected.get(pair, 0) + 1
    counts.merge(merged)
    confusion = counts.compute()
    if num_classes <= 4096:
        assert (confusion == expected).all()
    else:
        pairs = zip(confusion.rows.tolist(), confusion.cols.tolist(), strict=True)
        assert dict(zip(pairs, confusion.counts.tolist(), strict=True)) == expected
        assert confusion.rows.tolist() == sorted(confusion.rows.tolist())


def check_bad_ids() -> None:
    """Check that a batch with a bad id is not counted, that other batches are, and that `compute` raises."""
    for labels, preds in (([0, 3], [0, 0]), ([0, -2], [0, 0]), ([0, 1], [0, 3]), ([0, 1], [0, -1])):
        counts = DeviceConfusionCounts(3)
        for batch in (([1], [2]), (labels, preds), ([2], [2])):
            counts.update(to_device(np.array(batch[1], np.int64)), to_device(np.array(batch[0], np.int64)))
        try:
            counts.compute()
        except LabelError:
            kept = counts._counts.copy_to_host()
            assert kept[1, 2] == kept[2, 2] == 1 and kept.sum() == 2
            merged = DeviceConfusionCounts(3)
            merged.merge(counts)
            try:
                merged.compute()
            except LabelError:
                counts.reset()
            assert counts.compute().sum() == 0
        else:
            raise AssertionError("a bad id was accepted")


def check_full_table() -> None:
    counts = DeviceConfusionCounts(10**6)
    ids = np.arange(SLOTS + 1, dtype=np.int64)
    counts.update(to_device(ids), to_device(ids))
    try:
        counts.compute()
    except UsageError as error:
        assert "too many pairs" in str(error)
    else:
        raise AssertionError("a full table was not reported")


def check_rows(logits: np.ndarray, labels: np.ndarray, k: int) -> None:
    num_rows, num_classes = logits.shape
    given = DeviceRowScores(
        to_device(np.zeros((num_rows + 2, k), np.int32)),
        to_device(np.zeros((num_rows + 2, k), np.float32)),
        to_device(np.zeros((5, num_rows + 2), np.float32)),
        to_device(np.zeros(num_rows + 2, np.uint8)),
    )
    for buffers in (None, given):
        rows = DeviceRows(num_rows + 2, num_classes, k=k, scores=buffers)
        scores = rows.score(to_device(logits), to_device(labels))
        check_scores([array.copy_to_host() for array in scores], logits, labels, k)
    assert (given.ids_BT.copy_to_host() == rows.scores.ids_BT.copy_to_host()).all()
    assert not given.ids_BT.copy_to_host()[num_rows:].any()  # rows beyond the batch are unchanged


def check_scores(scores: list[np.ndarray], logits: np.ndarray, labels: np.ndarray, k: int) -> None:
    num_rows = len(logits)
    wanted = score_rows_reference(logits, labels, k)
    ids, probs, figures, is_finite = scores
    assert (ids[:num_rows] == wanted.topk).all()
    names = ("label_logprob", "sum_sq_prob", "log_sum_exp", "margin", "entropy")
    np.testing.assert_allclose(probs[:num_rows], wanted.topk_prob, rtol=3e-6, atol=3e-6)
    for name, figure in zip(names, figures[:, :num_rows], strict=True):
        np.testing.assert_allclose(figure, getattr(wanted, name), rtol=3e-6, atol=3e-6, err_msg=name)
    assert (is_finite[:num_rows].astype(bool) == wanted.is_finite).all()


def check_one_piece() -> None:
    """Check the kernel on views of one buffer, and reading the scores from it; simulated, on the host."""
    import torch

    from vitscore.engine.score_buffer import ScoreBuffer
    from vitscore.kernels.rows import RowScores

    rng = np.random.default_rng(3)
    for num_rows, num_classes, k in ((5, 7, 3), (3, 4, 4), (1, 1, 1)):
        logits = (rng.normal(size=(num_rows, num_classes)) * 5).astype(np.float32)
        logits[0, 0] = np.nan if num_rows > 3 else 0
        labels = rng.integers(-1, num_classes, num_rows).astype(np.int32)
        max_rows = num_rows + 2
        whole = torch.full((ScoreBuffer.num_bytes(max_rows, k),), 0x7F, dtype=torch.uint8)
        buffer = ScoreBuffer(whole, max_rows=max_rows, width=k)
        rows = DeviceRows(max_rows, num_classes, k=k, scores=DeviceRowScores(*(view.numpy() for view in buffer.arrays)))
        rows.score(logits, labels)
        copy = ScoreBuffer(whole.clone(), max_rows=max_rows, width=k)
        whole.fill_(0)
        scores, wanted = copy.read(num_rows), score_rows_reference(logits, labels, k)
        for name in RowScores._fields:
            one, other = getattr(scores, name), getattr(wanted, name)
            assert one.dtype == other.dtype and one.shape == other.shape, name
            np.testing.assert_allclose(one, other, rtol=3e-6, atol=3e-6, err_msg=name)


def check_compiled() -> None:
    """Check that every kernel compiles to assembly of a Hopper GPU; needs no GPU."""
    from types import SimpleNamespace

    from numba import types
    from numba.cuda import dispatcher

    from vitscore.kernels import cuda as twins

    # Functions called by kernels are compiled for the current device, not for the kernel's target.
    dispatcher.get_current_device = lambda: SimpleNamespace(compute_capability=(9, 0))

    def array(item: object, num_axes: int = 1) -> object:
        return types.Array(item, num_axes, "C")

    flags, counts, square = array(types.int32), array(types.int64), array(types.int64, 2)
    floats, ints = array(types.float32, 2), array(types.int32, 2)
    for ids in (array(types.int32), array(types.int64)):
        kernels = {
            twins._start_batch: (flags,),
            twins._check_ids: (flags, ids, ids, types.int64),
            twins._count_square: (flags, square, ids, ids),
            twins._count_table: (flags, counts, counts, ids, ids, types.int64),
            twins._merge_square: (flags, square, flags, square),
            twins._merge_table: (flags, counts, counts, flags, counts, counts),
            twins._score_rows: (floats, ids, ints, floats, floats, array(types.uint8)),
        }
        for kernel, arguments in kernels.items():
            assembly, _ = cuda.compile_ptx(kernel.py_func, types.void(*arguments), cc=(9, 0))
            assert ".target sm_90" in assembly and ".entry" in assembly


def main(is_thorough: bool) -> None:
    for num_classes, num_rows in ((1, 5), (3, 40), (10, 33), (5000, 30)):
        for dtype in (np.int32, np.int64):
            check_counts(num_classes, num_rows, dtype)
    check_bad_ids()
    if not is_thorough:
        check_full_table()
        check_one_piece()
    rng = np.random.default_rng(0)
    for num_classes in (1, 2, 7, 21, *((1000, 21841) if is_thorough else ())):
        for k in (1, 3, 30):
            logits = (rng.normal(size=(3, num_classes)) * 5).astype(np.float32)
            check_rows(logits, rng.integers(-1, num_classes, 3).astype(np.int32), min(k, num_classes))
    # Ties go to the lowest id, signed zeros are equal, rows that are not finite have no prediction.
    odd = np.array(
        [[1, 1, 1, 1], [0, -0.0, 0, -1], [np.nan, 1, 2, 3], [1, np.inf, 2, 3], [-1e38, 1e38, 0, 0]], np.float32
    )
    check_rows(odd, np.array([2, 1, 0, 1, 0], np.int64), 3)


if __name__ == "__main__":
    if "compiled" in sys.argv[1:]:
        check_compiled()
    else:
        main(is_thorough="thorough" in sys.argv[1:])
