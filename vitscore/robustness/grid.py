"""Fold the parts of a robustness grid into figures: accuracy by operator and severity, and comparisons of the models.

`vitscore robustness` is a run that also scores its images under every cell of a grid (operator x severity). A part
holds all cells of its shard, in two more columns per model and cell (`NAME@gaussian_noise:3.pred`, `.prob`), instead of
one folder per cell. A shard is then done in every cell or in none, so resuming, the ledger and the distribution of
shards work as in any run, every model and cell is scored on the same images, and all results of one decode are kept
together. The predictions on unchanged images are in their usual columns, so `metrics`, `compare` and `status` work on
the folder.

The figures are counts of right answers per cell and, for each image, the number of an operator's cells in which it is
wrong. Severities share their images, so intervals and tests count images, never cells. Needs no model and no torch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vitscore.augment import operators
from vitscore.errors import LedgerError, UsageError
from vitscore.metrics.intervals import Z, wilson, wilson_of_rate
from vitscore.metrics.pairs import PairCounts, compare, holm, mcnemar_p, paired_interval
from vitscore.rundir.folder import require_record
from vitscore.rundir.parts import finished_parts
from vitscore.system.durable import write_json_durably

ROWS_AT_ONCE = 65_536
Array = np.ndarray[Any, Any]
# Axes: B images, S severities.


def make_cells(names: Sequence[str], severities: Sequence[int]) -> tuple[str, ...]:
    """Return the grid in the form of `RunOptions.cells`: severities within operators, in the list's order.

    Raises:
        UsageError: an operator is unknown, or a severity is not 1 to 5.
    """
    chosen = operators.select(names, option="--operators")
    for severity in severities:
        if severity not in operators.SEVERITIES:
            raise UsageError("wrong value", where="--severities", expected="of 1,2,3,4,5", got=str(severity))
    levels = sorted(set(severities)) or operators.SEVERITIES
    return tuple(f"{operator.name}:severity={level}" for operator in chosen for level in levels)


@dataclass
class Spread:
    """The count, the sum and the sum of squares of a whole number per image."""

    n: int = 0
    total: int = 0
    squares: int = 0

    def update(self, values_B: Array) -> None:
        self.n += len(values_B)
        self.total += int(values_B.sum())
        self.squares += int((values_B * values_B).sum())

    @property
    def variance(self) -> float:
        return (self.squares - self.total * self.total / self.n) / (self.n - 1) if self.n > 1 else 0.0


@dataclass
class ErrorDifference:
    """The difference between two models' numbers of wrong cells, image by image: errors of a minus errors of b."""

    spread: Spread = field(default_factory=Spread)
    a_better: int = 0
    b_better: int = 0

    def update(self, wrong_a_B: Array, wrong_b_B: Array) -> None:
        self.spread.update(wrong_a_B - wrong_b_B)
        self.a_better += int((wrong_a_B < wrong_b_B).sum())
        self.b_better += int((wrong_b_B < wrong_a_B).sum())

    def figures(self, num_cells: int) -> dict[str, Any]:
        """Return the difference of the error rates over these cells, its interval, and the exact sign test."""
        n = self.spread.n
        if not n:
            return {"error_difference": None, "error_difference_ci": None, "sign_p": None}
        difference = self.spread.total / n / num_cells
        if self.spread.squares:
            half = Z * math.sqrt(self.spread.variance / n) / num_cells
            interval = [max(difference - half, -1.0), min(difference + half, 1.0)]
        else:
            interval = paired_interval(0, 0, n)
        p = mcnemar_p(self.a_better, self.b_better)
        return {"error_difference": difference, "error_difference_ci": interval, "sign_p": p}


def rate_interval(spread: Spread, num_cells: int) -> list[float] | None:
    """Return Wilson's interval of an error rate over cells that share their images, for the effective sample size."""
    if not spread.n:
        return None
    rate = spread.total / spread.n / num_cells
    variance = spread.variance / (num_cells * num_cells)
    effective_n = spread.n * rate * (1 - rate) / variance if variance > 0 else spread.n
    return wilson_of_rate(rate, effective_n)


class GridCounts:
    """The running counts of a grid."""

    def __init__(self, models: Sequence[str], grid: Mapping[str, Sequence[int]], *, is_bad_wrong: bool) -> None:
        self.models = tuple(models)
        self.grid = {name: tuple(levels) for name, levels in grid.items()}
        self.is_bad_wrong = is_bad_wrong
        self.samples = 0
        self.clean = dict.fromkeys(models, 0)
        self.right = {(model, cell): 0 for model in models for cell in self.cells}
        self.wrong = {(model, name): Spread() for model in models for name in (*grid, "")}
        """Wrong cells per image, by operator; "" is for all operators together."""
        self.pairs = {(pair, cell): PairCounts() for pair in itertools.combinations(models, 2) for cell in self.cells}
        self.differences = {
            (pair, name): ErrorDifference() for pair in itertools.combinations(models, 2) for name in (*grid, "")
        }

    @property
    def cells(self) -> list[str]:
        return [f"{name}:{level}" for name, levels in self.grid.items() for level in levels]

    def columns(self) -> list[str]:
        """Return the columns to read from a part."""
        of_cells = [f"{model}@{cell}.pred" for model in self.models for cell in self.cells]
        return ["label", "status", *(f"{model}.pred" for model in self.models), *of_cells]

    def update(self, batch: pa.RecordBatch) -> None:
        """Count the rows of a part."""
        labels_B = batch["label"].to_numpy()
        is_ok_B = pc.equal(batch["status"], "ok").to_numpy(zero_copy_only=False)
        counted_B = (labels_B >= 0) & (is_ok_B | self.is_bad_wrong)
        labels_B = labels_B[counted_B]
        self.samples += len(labels_B)

        def preds(column: str) -> Array:
            preds_B: Array = batch[f"{column}.pred"].fill_null(-1).to_numpy()[counted_B]
            return preds_B

        sums: dict[tuple[str, str], Array] = {}
        by_cell: dict[tuple[str, str], Array] = {}
        for model in self.models:
            self.clean[model] += int((preds(model) == labels_B).sum())
            sums[model, ""] = np.zeros(len(labels_B), np.int64)
            for name, levels in self.grid.items():
                sums[model, name] = np.zeros(len(labels_B), np.int64)
                for level in levels:
                    by_cell[model, f"{name}:{level}"] = preds_B = preds(f"{model}@{name}:{level}")
                    wrong_B = preds_B != labels_B
                    self.right[model, f"{name}:{level}"] += int((~wrong_B).sum())
                    sums[model, name] += wrong_B
                sums[model, ""] += sums[model, name]
        for key, wrong in sums.items():
            self.wrong[key].update(wrong)
        answered_B = is_ok_B[counted_B]
        for (pair, cell), counts in self.pairs.items():
            a_B, b_B = (by_cell[model, cell] for model in pair)
            counts.update(labels_B, a_B, b_B)
            counts.count_wrong(labels_B[~answered_B])
        for (pair, name), difference in self.differences.items():
            difference.update(sums[pair[0], name], sums[pair[1], name])


def count_parts(folder: Path) -> tuple[GridCounts, dict[str, Any]]:
    """Count the parts of a finished grid; return the counts and the run's record.

    Raises:
        UsageError: the folder holds no grid.
        LedgerError: a part cannot be read.
    """
    record = require_record(folder)
    cells = record["identity"].get("cells")
    if not cells:
        raise UsageError("no robustness run", where=str(folder), next_step="Start one with vitscore robustness.")
    grid: dict[str, list[int]] = {}
    for text in record["options"]["cells"]:
        name, _, level = text.partition(":severity=")
        grid.setdefault(name, []).append(int(level))
    is_bad_wrong = record["options"].get("on_bad_sample") == "wrong"
    counts = GridCounts(list(record["models"]), grid, is_bad_wrong=is_bad_wrong)
    for path, _ in finished_parts(folder / "parts", record["identity_hash"]).values():
        try:
            with pq.ParquetFile(path, page_checksum_verification=True) as file:
                for batch in file.iter_batches(batch_size=ROWS_AT_ONCE, columns=counts.columns()):
                    counts.update(batch)
        except (OSError, KeyError, pa.ArrowException) as error:
            again = "Remove it and run again: the shard is scored anew."
            raise LedgerError("part cannot be read", where=str(path), got=str(error), next_step=again) from None
    return counts, record


def make_document(counts: GridCounts, *, baseline: str | None, seed: int) -> dict[str, Any]:
    """Return the content of robustness.json, a pure function of the parts and the chosen baseline.

    Args:
        counts: the counts of all parts.
        baseline: the model whose errors mCE divides by; None means the first model.
        seed: the seed of the random operators.

    Raises:
        UsageError: the baseline is not a model of the run.
    """
    from vitscore.robustness.words import conclusions

    baseline = baseline or counts.models[0]
    if baseline not in counts.models:
        raise UsageError("unknown model", where="--baseline", expected=" or ".join(counts.models), got=baseline)
    document: dict[str, Any] = {
        "schema": 1,
        "samples": counts.samples,
        "seed": seed,
        "baseline": baseline,
        "operators": {name: _describe(name, levels) for name, levels in counts.grid.items()},
        "models": {model: _model_figures(counts, model, baseline) for model in counts.models},
        "comparisons": [_comparison(counts, pair) for pair in itertools.combinations(counts.models, 2)],
    }
    document["conclusions"] = conclusions(document)
    return document


def _describe(name: str, levels: Sequence[int]) -> dict[str, Any]:
    operator = operators.OPERATORS[name]
    values = {str(level): dict(zip(operator.arguments, operator.at(level).values, strict=True)) for level in levels}
    return {"does": operator.does, "source": operator.source, "severities": values}


def _model_figures(counts: GridCounts, model: str, baseline: str) -> dict[str, Any]:
    n = counts.samples
    num_levels = {name: len(levels) for name, levels in counts.grid.items()}
    overall = counts.wrong[model, ""]
    error = _rate(overall.total, n * sum(num_levels.values()))
    return {
        "clean": _cell(counts.clean[model], n),
        "operators": {
            name: {
                "error": _rate(counts.wrong[model, name].total, n * num_levels[name]),
                "error_ci": rate_interval(counts.wrong[model, name], num_levels[name]),
                "severities": {str(level): _cell(counts.right[model, f"{name}:{level}"], n) for level in levels},
            }
            for name, levels in counts.grid.items()
        },
        "mean_corruption_error": error,
        "mean_corruption_error_ci": rate_interval(overall, sum(num_levels.values())),
        "accuracy_lost": None if error is None else counts.clean[model] / n - (1 - error),
        "to_baseline": {
            "mean_corruption_error": _to_baseline(counts, model, baseline, is_relative=False),
            "relative_mean_corruption_error": _to_baseline(counts, model, baseline, is_relative=True),
        },
    }


def _cell(right: int, n: int) -> dict[str, Any]:
    return {"samples": n, "right": right, "accuracy": _rate(right, n), "accuracy_ci": wilson(right, n)}


def _rate(count: int, of: int) -> float | None:
    return count / of if of else None


def _to_baseline(counts: GridCounts, model: str, baseline: str, *, is_relative: bool) -> float | None:
    """Return the benchmark's mCE: the mean over operators of a model's errors divided by the baseline's.

    The relative mCE counts only the errors beyond those on unchanged images. The result is None if the baseline has no
    errors to divide by under one of the operators.
    """

    def errors(name: str, operator: str) -> int:
        clean = len(counts.grid[operator]) * (counts.samples - counts.clean[name]) if is_relative else 0
        return counts.wrong[name, operator].total - clean

    ratios = []
    for operator in counts.grid:
        own, other = errors(model, operator), errors(baseline, operator)
        if other <= 0:
            return None
        ratios.append(own / other)
    return sum(ratios) / len(ratios)


def _comparison(counts: GridCounts, pair: tuple[str, str]) -> dict[str, Any]:
    """Compare two models over all cells, by operator (with Holm's correction), and in every cell."""
    by_operator = {name: counts.differences[pair, name].figures(len(levels)) for name, levels in counts.grid.items()}
    p_values = [figures["sign_p"] for figures in by_operator.values()]
    if None not in p_values:
        for figures, adjusted in zip(by_operator.values(), holm(p_values), strict=True):
            figures["adjusted_p"] = adjusted
    for name, levels in counts.grid.items():
        by_operator[name]["severities"] = {
            str(level): {
                key: value
                for key, value in compare(*pair, counts.pairs[pair, f"{name}:{level}"]).items()
                if key not in ("a", "b")
            }
            for level in levels
        }
    return {
        "a": pair[0],
        "b": pair[1],
        "overall": counts.differences[pair, ""].figures(len(counts.cells)),
        "operators": by_operator,
    }


def refold(folder: Path, *, baseline: str | None = None) -> dict[str, Any]:
    """Fold the grid's parts, write robustness.json, and return its content."""
    counts, record = count_parts(folder)
    document = make_document(counts, baseline=baseline, seed=record["options"]["augment_seed"])
    write_json_durably(folder / "robustness.json", document)
    return document
