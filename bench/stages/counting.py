"""How fast are predictions counted and logits ranked, against what people use?

Question: predictions/s into a confusion matrix at K = 10, 1,000 and 21,841 classes, in bulk and in batches of 256,
          against torchmetrics, torch.bincount and scikit-learn; rows/s from logits to top-5, probabilities and label
          log-probability, against torch's softmax, topk and gather.
Expected: counting at K=1,000 at least 8x torchmetrics in bulk and 100x in batches of 256; the row kernel faster than
          torch on one thread, though it computes more (sum of squares, entropy, margin, log-sum-exp).
Command:  vitscore bench counting
Method:   random ids and logits; the ways by turns, five rounds in one process, medians; torch on one thread,
          as our kernels run. torchmetrics also without its checks of the ids, which ours always makes. At K=21,841 a
          full matrix takes 3.8 GB, so torchmetrics, bincount and scikit-learn are not asked for one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from sklearn.metrics import confusion_matrix
from torchmetrics.classification import MulticlassConfusionMatrix

from vitscore.bench.harness.timing import Figure, figure, rate, ratio, rounds_in_turn, show
from vitscore.kernels import ConfusionCounts, score_rows

BATCH, ROUNDS, QUICK_SHRINK = 256, 5, 40
AT_LEAST_S = 0.1
BULK = {10: 4_000_000, 1_000: 4_000_000, 21_841: 1_000_000}
SKLEARN_ROWS = 400_000
LOGIT_ROWS = {10: 65_536, 1_000: 8_192, 21_841: 512}

Array = np.ndarray[Any, Any]
Count = Callable[[Array, Array], None]


def measure(*, quick: bool = False) -> dict[str, Any]:
    """Predictions/s by K and way, rows/s by K and way."""
    shrink = QUICK_SHRINK if quick else 1
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        counting = {str(k): measure_counting(k, rows // shrink) for k, rows in BULK.items()}
        ranking = {str(k): measure_ranking(k, rows // shrink) for k, rows in LOGIT_ROWS.items()}
    finally:
        torch.set_num_threads(threads)
    return {"counting": counting, "ranking": ranking}


def measure_counting(num_classes: int, rows: int) -> dict[str, dict[str, Figure]]:
    """By way: predictions/s in bulk, and in batches."""
    random = np.random.default_rng(0)
    labels, preds = random.integers(0, num_classes, (2, rows))
    bulk: dict[str, Callable[[], float]] = {}
    batches: dict[str, Callable[[], float]] = {}
    for name, count in ways_to_count(num_classes).items():
        num = rows if name != "scikit-learn" else min(rows, SKLEARN_ROWS)
        bulk[name] = partial(measured, num, partial(count, labels[:num], preds[:num]))
        num = min(1_000 if name == "vitscore" else 40, rows // BATCH)
        batches[name] = partial(measured, num * BATCH, partial(count_batches, count, labels, preds, num))
    in_bulk, by_batch = by_turns(bulk, "predictions/s"), by_turns(batches, "predictions/s")
    return {name: {"bulk": in_bulk[name], "batches": by_batch[name]} for name in bulk}


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
        "vitscore": add_ours,
        "torchmetrics": add_torchmetrics,
        "torchmetrics, no checks": add_unchecked,
        "torch.bincount": add_bincount,
        "scikit-learn": add_sklearn,
    }


def count_batches(count: Count, labels: Array, preds: Array, batches: int) -> None:
    for start in range(0, batches * BATCH, BATCH):
        count(labels[start : start + BATCH], preds[start : start + BATCH])


def measure_ranking(num_classes: int, rows: int) -> dict[str, Figure]:
    """Rows/s by way."""
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

    ways: dict[str, Callable[[], Any]] = {
        "vitscore": partial(score_rows, logits_BK, labels_B, 5),
        "torch, softmax and topk": rank_by_torch,
        "torch, all that we keep": rank_by_torch_whole,
    }
    return by_turns({name: partial(measured, rows, rank) for name, rank in ways.items()}, "rows/s")


def measured(items: int, work: Callable[[], Any]) -> float:
    """Items a second, in one round."""
    return rate(items, work, at_least_s=AT_LEAST_S)


def by_turns(ways: dict[str, Callable[[], float]], unit: str) -> dict[str, Figure]:
    return {name: figure(found, unit) for name, found in rounds_in_turn(ways, ROUNDS).items()}


def table(result: dict[str, Any]) -> list[str]:
    lines = [f"{'counting, M predictions/s':<34}{'bulk':>10}{'by 256':>10}"]
    for num_classes, ways in result["counting"].items():
        for name, rates in ways.items():
            title = f"K={int(num_classes):,} {name}"
            lines.append(f"{title:<34}{rates['bulk']['median'] / 1e6:>10.2f}{rates['batches']['median'] / 1e6:>10.2f}")
    lines.append(f"{'ranking':<38}{'rows/s':>34}")
    for num_classes, rates in result["ranking"].items():
        for name, value in rates.items():
            title = f"K={int(num_classes):,} {name}"
            lines.append(f"{title:<38}{show(value, 0):>34}")
    ours, theirs = (result["counting"]["1000"][name] for name in ("vitscore", "torchmetrics"))
    ratios = ", ".join(f"{show(ratio(ours[how], theirs[how]))}x in {how}" for how in ("bulk", "batches"))
    return [*lines, f"against torchmetrics at K=1,000: {ratios}"]
