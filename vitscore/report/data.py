"""Gather everything that the report shows from a run's folder: figures, chosen samples, their thumbnails.

    parts ─► fold ─► figures, confusions ─┐
      └────► samples ─► thumbnails ───────┴─► Findings ─► page

The page is made from `Findings` and reads no file. `payload` is the part that the page's script draws (the table of
classes, the heat map, the pictures), as plain JSON values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from vitscore.kernels.counts import Confusion, SparseConfusion
from vitscore.metrics.fold import Folded
from vitscore.metrics.pairs import holm
from vitscore.report.samples import SAMPLES_A_PAIR, Cell, Chosen, Sample, choose_samples
from vitscore.report.thumbnails import Thumbnails, find_shards, make_thumbnails

Array: TypeAlias = npt.NDArray[Any]
PAIRS_SHOWN = 12
"""Most confused pairs shown for each model, with pictures."""
MISTAKES_PICTURED = 60
PAIRS_COMPARED = 3
"""Maximum number of pairs of models whose disagreements have pictures."""
MOST_CELLS = 40_000
"""Maximum number of cells off the diagonal in the heat map, the largest first."""
DIGITS = 6


@dataclass(frozen=True)
class ConfusedPair:
    """A cell off the diagonal: `count` of the `support` images of class `truth` were taken for `pred`."""

    truth: int
    pred: int
    count: int
    support: int
    samples: list[Sample]


@dataclass(frozen=True)
class Findings:
    """Everything that the page is made from."""

    document: Mapping[str, Any]
    """metrics.json."""
    record: Mapping[str, Any]
    """run.json."""
    confusions: Mapping[str, SparseConfusion]
    pairs: Mapping[str, list[ConfusedPair]]
    chosen: Chosen
    thumbnails: Thumbnails
    adjusted_p: list[float | None]
    """McNemar's p-values of `comparisons` after Holm's correction; None for a pair without samples."""

    @property
    def classes(self) -> list[str]:
        return list(self.document["classes"])

    @property
    def models(self) -> list[str]:
        return list(self.document["models"])

    @property
    def has_metrics(self) -> bool:
        """Whether any sample with a label was scored."""
        return any(model["report"] is not None for model in self.document["models"].values())

    @property
    def ranking(self) -> list[str]:
        """The models, the most accurate first."""
        figures = self.document["models"]
        return sorted(self.models, key=lambda name: -(figures[name]["accuracy"] or 0.0))


def gather(
    folder: Path,
    folded: Folded,
    record: Mapping[str, Any],
    *,
    shards: Sequence[str] = (),
    with_thumbnails: bool = True,
) -> Findings:
    """Read the parts for the samples worth a look, and the shards for their pictures; arguments as `write_report`'s."""
    document = folded.document
    confusions = {name: as_pairs(confusion) for name, confusion in folded.confusions.items()}
    cells = {name: most_confused(confusion, PAIRS_SHOWN) for name, confusion in confusions.items()}
    chosen = choose_samples(folded.parts, confused=cells, pairs=compared_pairs(document))
    pairs = {name: confused_pairs(name, cells[name], confusions[name], chosen) for name in cells}
    options = record.get("options", {})
    thumbnails = Thumbnails()
    if with_thumbnails:
        listed = pq.read_table(folder / "shards.parquet", columns=["ordinal", "name"]).to_pylist()
        places = find_shards(listed, tuple(shards) or options.get("shards", ()), split=options.get("split", "test"))
        thumbnails = make_thumbnails(
            pictured(chosen, pairs),
            places,
            image_key=options.get("image_key"),
            max_pixels=options.get("max_pixels", 178_956_970),
            may_fetch=bool(shards),
        )
    return Findings(document, record, confusions, pairs, chosen, thumbnails, adjusted(document["comparisons"]))


def as_pairs(confusion: Confusion) -> SparseConfusion:
    """The non-zero cells of a dense or sparse confusion matrix."""
    if isinstance(confusion, SparseConfusion):
        return confusion
    rows, cols = np.nonzero(confusion)
    return SparseConfusion(rows, cols, confusion[rows, cols], (len(confusion), len(confusion)))


def most_confused(confusion: SparseConfusion, most: int) -> list[Cell]:
    """The largest cells off the diagonal, lower ids first among equals."""
    rows, cols, counts = off_diagonal(confusion)
    order = np.lexsort((cols, rows, -counts))[:most]
    return [(int(rows[i]), int(cols[i])) for i in order]


def off_diagonal(confusion: SparseConfusion) -> tuple[Array, Array, Array]:
    is_off = confusion.rows != confusion.cols
    return confusion.rows[is_off], confusion.cols[is_off], confusion.counts[is_off]


def confused_pairs(name: str, cells: Sequence[Cell], confusion: SparseConfusion, chosen: Chosen) -> list[ConfusedPair]:
    counts = dict(
        zip(zip(confusion.rows.tolist(), confusion.cols.tolist(), strict=True), confusion.counts, strict=True)
    )
    support_K = np.bincount(confusion.rows, weights=confusion.counts, minlength=confusion.shape[0])
    return [
        ConfusedPair(row, col, int(counts[row, col]), int(support_K[row]), chosen.confused[name][row, col])
        for row, col in cells
    ]


def compared_pairs(document: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The pairs of models that differ on most samples."""
    ordered = sorted(document["comparisons"], key=lambda entry: -(entry["only_a"] + entry["only_b"]))
    return [(entry["a"], entry["b"]) for entry in ordered[:PAIRS_COMPARED]]


def adjusted(comparisons: Sequence[Mapping[str, Any]]) -> list[float | None]:
    tested = [entry["mcnemar_p"] for entry in comparisons]
    corrected = iter(holm([p for p in tested if p is not None]))
    return [None if p is None else next(corrected) for p in tested]


def pictured(chosen: Chosen, pairs: Mapping[str, Sequence[ConfusedPair]]) -> Iterator[Sample]:
    """Samples to show pictures of, the most important first."""
    for mistake in chosen.mistakes[:MISTAKES_PICTURED]:
        yield mistake.sample
    for first, second in chosen.disagreements.values():
        yield from (*first, *second)
    for position in range(SAMPLES_A_PAIR):
        for of_model in pairs.values():
            for pair in of_model:
                yield from pair.samples[position : position + 1]


def payload(findings: Findings) -> dict[str, Any]:
    """The script's data as JSON values; elsewhere a sample is its index in `samples`."""
    numbers: dict[tuple[int, int], int] = {}
    samples: list[list[Any]] = []

    def number(sample: Sample) -> int:
        if sample.place not in numbers:
            numbers[sample.place] = len(samples)
            samples.append(sample_entry(sample, findings))
        return numbers[sample.place]

    pairs = {
        name: [[p.truth, p.pred, p.count, p.support, [number(sample) for sample in p.samples]] for p in of_model]
        for name, of_model in findings.pairs.items()
    }
    return {
        "classes": findings.classes,
        "order": findings.models,
        "models": {name: model_entry(findings, name) for name in findings.models},
        "pairs": pairs,
        "mistakes": [[number(m.sample), m.answer, round(m.confidence, DIGITS)] for m in findings.chosen.mistakes],
        "disagreements": [
            {"a": a, "b": b, "only_a": [*map(number, first)], "only_b": [*map(number, second)]}
            for (a, b), (first, second) in findings.chosen.disagreements.items()
        ],
        "samples": samples,
    }


def sample_entry(sample: Sample, findings: Findings) -> list[Any]:
    """Key, shard, label, thumbnail, and each model's prediction, confidence and the label's probability."""
    answers = [sample.answers[name] for name in findings.models]
    figures = [[answer.pred, rounded(answer.prob), rounded(answer.label_prob)] for answer in answers]
    return [sample.key, sample.shard, sample.label, findings.thumbnails.images.get(sample.place), figures]


def model_entry(findings: Findings, name: str) -> dict[str, Any]:
    """One model's figures class by class, and its confusions as a flat list of row, column, count."""
    report = findings.document["models"][name]["report"]
    rows, cols, counts = off_diagonal(findings.confusions[name])
    order = np.lexsort((cols, rows, -counts))
    shown = order[:MOST_CELLS]
    entry: dict[str, Any] = {
        "cells": np.stack([rows[shown], cols[shown], counts[shown]], axis=1).reshape(-1).tolist(),
        "hidden": int(counts[order[MOST_CELLS:]].sum()),
        "right": right_of(findings.confusions[name]).tolist(),
    }
    for key, figure in (("precision", "precision"), ("recall", "recall"), ("f1", "f1-score"), ("support", "support")):
        entry[key] = [rounded(report[label][figure]) for label in findings.classes] if report else None
    return entry


def right_of(confusion: SparseConfusion) -> Array:
    is_right = confusion.rows == confusion.cols
    right_K = np.zeros(confusion.shape[0], np.int64)
    right_K[confusion.rows[is_right]] = confusion.counts[is_right]
    return right_K


def rounded(value: float | None) -> float | int | None:
    if value is None:
        return None
    return int(value) if float(value).is_integer() else round(float(value), DIGITS)
