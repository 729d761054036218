"""Compare the CUDA kernels with their NumPy references, on numba's device or simulator; run by test_kernels_cuda.py.

This is a separate program because numba decides at import whether the device is simulated.
"""

import sys
from collections import defaultdict, deque
from collections.abc import Callable

import numpy as np
from numba import cuda

from vitscore.errors import LabelError, UsageError
from vitscore.kernels import cuda_counts
from vitscore.kernels.cuda import DeviceRows, DeviceRowScores
from vitscore.kernels.cuda_counts import SLOTS, DeviceConfusionCounts
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
        preds[labels == -1] = -7  # ignored, since these rows have no label
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
            raise AssertionError("a bad id raised no error")


def check_full_table() -> None:
    counts = DeviceConfusionCounts(10**6)
    ids = np.arange(SLOTS + 1, dtype=np.int64)
    counts.update(to_device(ids), to_device(ids))
    try:
        counts.compute()
    except UsageError as error:
        assert "too many pairs" in str(error)
    else:
        raise AssertionError("a full table raised no error")


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
    assert not given.ids_BT.copy_to_host()[num_rows:].any()  # rows beyond the batch do not change


def check_scores(arrays: list[np.ndarray], logits: np.ndarray, labels: np.ndarray, k: int) -> None:
    num_rows = len(logits)
    wanted = score_rows_reference(logits, labels, k)
    ids, probs, figures, is_finite = arrays
    assert (ids[:num_rows] == wanted.topk).all()
    names = ("label_logprob", "sum_sq_prob", "log_sum_exp", "margin", "entropy")
    np.testing.assert_allclose(probs[:num_rows], wanted.topk_prob, rtol=3e-6, atol=3e-6)
    for name, values in zip(names, figures[:, :num_rows], strict=True):
        np.testing.assert_allclose(values, getattr(wanted, name), rtol=3e-6, atol=3e-6, err_msg=name)
    assert (is_finite[:num_rows].astype(bool) == wanted.is_finite).all()


def check_one_piece() -> None:
    """The kernel writes to views of one buffer, and the scores are read from it; simulated on the host."""
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
    """Every kernel compiles to assembly for a Hopper GPU, without a GPU in this machine."""
    from types import SimpleNamespace

    from numba import types
    from numba.cuda import dispatcher

    from vitscore.kernels import cuda as rows

    # Functions that kernels call are always compiled for the current device, not for the kernel's target.
    dispatcher.get_current_device = lambda: SimpleNamespace(compute_capability=(9, 0))

    def array(item: object, num_axes: int = 1) -> object:
        return types.Array(item, num_axes, "C")

    flags, counts, square = array(types.int32), array(types.int64), array(types.int64, 2)
    floats, ints = array(types.float32, 2), array(types.int32, 2)
    for ids in (array(types.int32), array(types.int64)):
        kernels = {
            cuda_counts._fill: (counts, types.int64),
            cuda_counts._start_batch: (flags,),
            cuda_counts._check_ids: (flags, ids, ids, types.int64),
            cuda_counts._count_square: (flags, square, ids, ids),
            cuda_counts._count_table: (flags, counts, counts, ids, ids, types.int64),
            cuda_counts._merge_square: (flags, square, flags, square),
            cuda_counts._merge_table: (flags, counts, counts, flags, counts, counts),
            rows._score_rows: (floats, ids, ints, floats, floats, array(types.uint8)),
        }
        for kernel, arguments in kernels.items():
            assembly, _ = cuda.compile_ptx(kernel.py_func, types.void(*arguments), cc=(9, 0))
            assert ".target sm_90" in assembly and ".entry" in assembly


class Streams:
    """Streams that run their work as late as CUDA allows: when the host waits for it or for work that depends on it.

    They replace numba's streams, events, launches and copies, which the simulator runs immediately. As with
    non-blocking streams, the default stream (0) does not wait for others, and a copy on it makes the host wait for it.
    """

    def __init__(self) -> None:
        self.queues: defaultdict[int, deque[Callable[[], None]]] = defaultdict(deque)
        cuda_counts.as_stream = lambda pointer: pointer
        cuda.event = lambda: LateEvent(self)
        array, streams = type(cuda.device_array(1, np.int32)), self
        array.copy_to_host = lambda self, ary=None, stream=0: streams.copied(self, stream)
        for name in (
            "_fill",
            "_start_batch",
            "_check_ids",
            "_count_square",
            "_count_table",
            "_merge_square",
            "_merge_table",
        ):
            if hasattr(cuda_counts, name):
                setattr(cuda_counts, name, LateKernel(self, getattr(cuda_counts, name)))

    def copied(self, array: object, stream: int) -> np.ndarray:
        host = np.full(array.shape, 77, array.dtype)
        self.queues[stream].append(lambda: np.copyto(host, array._ary))
        while stream == 0 and self.queues[0]:
            self.queues[0].popleft()()
        return host


class LateKernel:
    """A kernel whose launches are queued on their stream."""

    def __init__(self, streams: Streams, kernel: object) -> None:
        self._streams = streams
        self._kernel = kernel

    def __getitem__(self, launch: tuple[int, int, int]) -> Callable[..., None]:
        *shape, stream = launch
        queue = self._streams.queues[stream]
        return lambda *arguments: queue.append(lambda: self._kernel[tuple(shape)](*arguments))


class LateEvent:
    """An event: a position on a stream, reached when the list that is queued there is no longer empty."""

    def __init__(self, streams: Streams) -> None:
        self._queues = streams.queues
        self._stream, self._is_reached = 0, [True]

    def record(self, stream: int = 0) -> None:
        self._stream, self._is_reached = stream, is_reached = stream, []
        self._queues[stream].append(lambda: is_reached.append(True))

    def wait(self, stream: int = 0) -> None:
        place = self._stream, self._is_reached
        self._queues[stream].append(lambda: self._reach(*place))

    def synchronize(self) -> None:
        self._reach(self._stream, self._is_reached)

    def _reach(self, stream: int, is_reached: list[bool]) -> None:
        while not is_reached:
            self._queues[stream].popleft()()


def check_streams() -> None:
    """Operations on counts from several streams run in the order of the calls, even if the streams are late."""
    Streams()
    rng = np.random.default_rng(1)
    for num_classes in (7, 5000):

        def batch(classes: int = num_classes) -> tuple[np.ndarray, np.ndarray]:
            return rng.integers(0, classes, 9), rng.integers(0, classes, 9)

        def assert_counted(confusion: object, wanted: list[tuple[np.ndarray, np.ndarray]], classes: int) -> None:
            dense = np.zeros((classes, classes), np.int64)
            for preds, labels in wanted:
                np.add.at(dense, (labels, preds), 1)
            if classes > 4096:
                expected = np.argwhere(dense)
                assert np.array_equal(np.stack([confusion.rows, confusion.cols], 1), expected)
                confusion, dense = confusion.counts, dense[tuple(expected.T)]
            assert np.array_equal(confusion, dense)

        for on in ({}, {"stream": 5}):
            first, other = DeviceConfusionCounts(num_classes), DeviceConfusionCounts(num_classes, **on)
            batches = [batch() for _ in range(6)]
            for stream, (preds, labels) in zip((5, 6, 5, 0), batches[:4], strict=True):
                first.update(to_device(preds), to_device(labels), stream=stream)
            assert_counted(first.compute(**on), batches[:4], num_classes)
            other.update(to_device(batches[4][0]), to_device(batches[4][1]), stream=6)
            first.merge(other, stream=7)
            other.update(to_device(batches[5][0]), to_device(batches[5][1]), stream=6)
            assert_counted(other.compute(**on), batches[4:], num_classes)
            assert_counted(first.compute(**on), batches[:5], num_classes)
            first.update(to_device(batches[0][0]), to_device(batches[0][1]), stream=6)
            first.reset(stream=5)
            first.update(to_device(batches[1][0]), to_device(batches[1][1]), stream=6)
            assert_counted(first.compute(**on), batches[1:2], num_classes)


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
    # Ties go to the lowest id, signed zeros are equal, and rows that are not finite have no prediction.
    odd = np.array(
        [[1, 1, 1, 1], [0, -0.0, 0, -1], [np.nan, 1, 2, 3], [1, np.inf, 2, 3], [-1e38, 1e38, 0, 0]], np.float32
    )
    check_rows(odd, np.array([2, 1, 0, 1, 0], np.int64), 3)


if __name__ == "__main__":
    if "compiled" in sys.argv[1:]:
        check_compiled()
    elif "streams" in sys.argv[1:]:
        check_streams()
    else:
        main(is_thorough="thorough" in sys.argv[1:])
