"""How fast are predictions counted and logits ranked, against what people use?

Question: predictions/s into a confusion matrix at K = 10, 1,000 and 21,841 classes, in bulk and in batches of 256,
          against torchmetrics, torch.bincount and scikit-learn; rows/s from logits to top-5, probabilities and label
          log-probability, against torch's softmax, topk and gather.
Expected: counting at K=1,000 at least 8x torchmetrics in bulk and 100x in batches of 256; the row kernel faster than
          torch on one thread, though it computes more (sum of squares, entropy, margin, log-sum-exp).
Command:  python -m vitscore.bench counting
Method:   random ids and logits; each way of counting in turn, best of five rounds, in one process; torch on one thread,
          as our kernels run. torchmetrics also without its checks of the ids, which ours always makes. At K=21,841 a
          full matrix takes 3.8 GB, so torchmetrics, bincount and scikit-learn are not asked for one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from sklearn.metrics import confusion_matrix
from torchmetrics.classification import MulticlassConfusionMatrix

from vitscore.kernels import ConfusionCounts, score_rows

BATCH, ROUNDS = 256, 5
BULK = {10: 4_000_000, 1_000: 4_000_000, 21_841: 1_000_000}
SKLEARN_ROWS = 400_000
LOGIT_ROWS = {10: 65_536, 1_000: 8_192, 21_841: 512}

Array = np.ndarray[Any, Any]
Count = Callable[[Array, Array], None]


def measure() -> dict[str, Any]:
    """Predictions/s by K and way, rows/s by K and way."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        counting = {str(k): measure_counting(k, rows) for k, rows in BULK.items()}
        ranking = {str(k): measure_ranking(k, rows) for k, rows in LOGIT_ROWS.items()}
    finally:
        torch.set_num_threads(threads)
    return {"counting": counting, "ranking": ranking}


def measure_counting(num_classes: int, rows: int) -> dict[str, dict[str, float]]:
    random = np.random.default_rng(0)
    labels, preds = random.integers(0, num_classes, (2, rows))
    ways = ways_to_count(num_classes)
    found: dict[str, dict[str, float]] = {}
    for name, count in ways.items():
        bulk = rows if name != "scikit-learn" else min(rows, SKLEARN_ROWS)
        in_batches = 1_000 if name == "vitscore" else 40
        found[name] = {
            "bulk": rate(bulk, partial(count, labels[:bulk], preds[:bulk])),
            "batches": rate(in_batches * BATCH, partial(count_batches, count, labels, preds, in_batches)),
        }
    return found


def ways_to_count(num_classes: int) -> dict[str, Count]:
    """Functions that add a batch to a running matrix."""
    ours = ConfusionCounts(num_classes)

    def add_ours(labels: Array, preds: Array) -> None:
        ours.update(preds, labels)

    if num_classes > 4096:
        return {"vitscore": add_ours}
    checked = MulticlassConfusionMatrix(num_classes)
    unchecked = MulticlassConfusionMatrix(num_classes, validate_args=False)
    running = torch.zeros(num_classes * num_classes, dtype=torch.int64)
    summed = np.zeros((num_classes, num_classes), np.int64)

    def add_torchmetrics(labels: Array, preds: Array) -> None:
        checked.update(torch.from_numpy(preds), torch.from_numpy(labels))

    def add_unchecked(labels: Array, preds: Array) -> None:
        unchecked.update(torch.from_numpy(preds), torch.from_numpy(labels))

    def add_bincount(labels: Array, preds: Array) -> None:
        cells = torch.from_numpy(labels) * num_classes + torch.from_numpy(preds)
        running.add_(torch.bincount(cells, minlength=num_classes * num_classes))

    def add_sklearn(labels: Array, preds: Array) -> None:
        summed.__iadd__(confusion_matrix(labels, preds, labels=range(num_classes)))

    return {
        "vitscore": add_ours, "torchmetrics": add_torchmetrics, "torchmetrics, no checks": add_unchecked,
        "torch.bincount": add_bincount, "scikit-learn": add_sklearn,
    }  # fmt: skip


def count_batches(count: Count, labels: Array, preds: Array, batches: int) -> None:
    for start in range(0, batches * BATCH, BATCH):
        count(labels[start : start + BATCH], preds[start : start + BATCH])


def measure_ranking(num_classes: int, rows: int) -> dict[str, float]:
    random = np.random.default_rng(1)
    logits_BK = random.normal(size=(rows, num_classes)).astype(np.float32) * 4
    labels_B = random.integers(0, num_classes, rows).astype(np.int32)
    logits, labels = torch.from_numpy(logits_BK), torch.from_numpy(labels_B).long()

    def rank_by_torch() -> None:
        logprob = logits.log_softmax(dim=1)
        top = logprob.topk(5, dim=1)
        top.values.exp(), logprob.gather(1, labels[:, None])

    def rank_by_torch_whole() -> None:
        logprob = logits.log_softmax(dim=1)
        prob = logprob.exp()
        logprob.topk(5, dim=1), logprob.gather(1, labels[:, None])
        prob.square().sum(1), (prob * logprob).sum(1), logits.logsumexp(1)

    return {
        "vitscore": rate(rows, lambda: score_rows(logits_BK, labels_B, 5)),
        "torch, softmax and topk": rate(rows, rank_by_torch),
        "torch, all that we keep": rate(rows, rank_by_torch_whole),
    }


def rate(items: int, work: Callable[[], Any]) -> float:
    """Items a second, the best of several rounds; the first call warms up and is not timed."""
    work()
    best = float("inf")
    for _ in range(ROUNDS):
        started = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - started)
    return items / best


def table(result: dict[str, Any]) -> list[str]:
    lines = [f"{'counting, M predictions/s':<34}{'bulk':>10}{'by 256':>10}"]
    for num_classes, ways in result["counting"].items():
        for name, rates in ways.items():
            title = f"K={int(num_classes):,} {name}"
            lines.append(f"{title:<34}{rates['bulk'] / 1e6:>10.2f}{rates['batches'] / 1e6:>10.2f}")
    lines.append(f"{'ranking':<38}{'rows/s':>12}")
    for num_classes, rates in result["ranking"].items():
        for name, value in rates.items():
            title = f"K={int(num_classes):,} {name}"
            lines.append(f"{title:<38}{value:>12,.0f}")
    ours, theirs = (result["counting"]["1000"][name] for name in ("vitscore", "torchmetrics"))
    ratios = ", ".join(f"{ours[how] / theirs[how]:.1f}x in {how}" for how in ("bulk", "batches"))
    return [*lines, f"against torchmetrics at K=1,000: {ratios}"]
