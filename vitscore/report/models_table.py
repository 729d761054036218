"""The table of models: figures as rows, models as columns, so that on a phone the models stay beside each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from vitscore.metrics.notation import percent
from vitscore.report import words
from vitscore.report.data import Findings

Model: TypeAlias = Mapping[str, Any]
"""A model's entry in metrics.json."""
Value: TypeAlias = Callable[[Model], float | None]
Cell: TypeAlias = tuple[str, str, bool]
"""A figure, its interval, and whether it is the best one."""
Line: TypeAlias = tuple[str, str, list[Cell]]
"""A row as shown: title, meaning, a cell a model."""


@dataclass(frozen=True)
class Row:
    """A figure that metrics.json may hold of each model."""

    title: str
    meaning: str
    value: Value
    interval: str = ""
    """Its name among `confidence_intervals`."""
    is_percent: bool = True
    is_low_best: bool = False


def figure(name: str) -> Value:
    return lambda model: model.get(name)


def average(kind: str, name: str) -> Value:
    return lambda model: ((model.get("report") or {}).get(kind) or {}).get(name)


def f1_of(entry: str) -> Value:
    return lambda model: (model.get(entry) or {}).get("f1-score")


def topk(k: int) -> Value:
    return lambda model: model["topk_accuracy"].get(str(k))


MACRO, WEIGHTED = "macro avg", "weighted avg"
ANSWERS, IMAGES = "share of a class's answers that are right", "share of a class's images that are found"
AVERAGES = [
    Row("Macro F1", "every class has equal weight", average(MACRO, "f1-score"), "macro_f1"),
    Row("Macro precision", ANSWERS, average(MACRO, "precision"), "macro_precision"),
    Row("Macro recall", IMAGES, average(MACRO, "recall"), "macro_recall"),
    Row("Weighted F1", "every image has equal weight", average(WEIGHTED, "f1-score"), "weighted_f1"),
    Row("Weighted precision", "", average(WEIGHTED, "precision"), "weighted_precision"),
    Row("Micro F1", "over all answers", f1_of("micro")),
    Row("Balanced accuracy", "mean recall of the classes that occur", figure("balanced_accuracy"), "balanced_accuracy"),
]
CHANCE = [
    Row("MCC", "correlation with the truth; 0 is chance, 1 perfect", figure("mcc"), "mcc", is_percent=False),
    Row("Cohen’s kappa", "agreement beyond chance", figure("cohen_kappa"), "cohen_kappa", is_percent=False),
]
SURPRISE = "negative log-likelihood of the true label, in nats; lower is better"
SQUARES = "squared error of the probabilities, 0 to 2; lower is better"
PROBABILITIES = [
    Row("ECE", "gap between confidence and accuracy; lower is better", figure("ece"), is_low_best=True),
    Row("NLL", SURPRISE, figure("nll"), is_percent=False, is_low_best=True),
    Row("Brier score", SQUARES, figure("brier"), is_percent=False, is_low_best=True),
]
COSTS = {
    "parameters": ("Parameters", "{:,.0f}"),
    "gflop_per_image": ("GFLOP per image", "{:,.2f}"),
    "images_per_s": ("Images per second", "{:,.0f}"),
}
"""Title and format by key in run.json."""


def models_table(findings: Findings) -> list[tuple[str, list[Line]]]:
    """Headings, each with its rows; figures that no model has are left out."""
    models = findings.document["models"]
    wanted = [("Right answers", right_rows(models)), ("Averages over the classes", average_rows(findings))]
    wanted += [("Beyond chance", CHANCE), ("Probabilities", PROBABILITIES)]
    groups = [(title, [line for row in rows if (line := row_line(row, models))]) for title, rows in wanted]
    costs = cost_lines(findings)
    return groups + ([("Cost", costs)] if costs else [])


def right_rows(models: Mapping[str, Model]) -> list[Row]:
    ks = sorted({int(k) for model in models.values() for k in model["topk_accuracy"]} - {1})
    tops = [Row(f"Top-{k} accuracy", f"the label is among the {k} best", topk(k), f"topk:{k}") for k in ks]
    return [Row("Accuracy", "the first answer is right", figure("accuracy"), "accuracy"), *tops]


def average_rows(findings: Findings) -> list[Row]:
    if not words.absent_classes(findings):
        return AVERAGES
    present = max(model["num_classes_in_truth"] for model in findings.document["models"].values())
    meaning = f"over the {present:,} classes among the labels alone"
    return [AVERAGES[0], Row("Macro F1, classes that occur", meaning, f1_of("macro_in_truth")), *AVERAGES[1:]]


def row_line(row: Row, models: Mapping[str, Model]) -> Line | None:
    """A row with the best figure marked, if it is the only one at the digits shown; None where no model has one."""
    values = [row.value(model) for model in models.values()]
    known = [value for value in values if value is not None]
    if not known:
        return None
    texts = [row_text(row, value) for value in values]
    best = row_text(row, (min if row.is_low_best else max)(known))
    is_marked = len(known) > 1 and texts.count(best) == 1
    intervals = [interval_text(row, model) for model in models.values()]
    cells = [(text, interval, is_marked and text == best) for text, interval in zip(texts, intervals, strict=True)]
    return row.title, row.meaning, cells


def row_text(row: Row, value: float | None) -> str:
    if value is None:
        return "–"
    return f"{percent(value, 2)}%" if row.is_percent else f"{value:z.4f}".replace("-", "−")


def interval_text(row: Row, model: Model) -> str:
    intervals = model.get("confidence_intervals") or {}
    name, _, k = row.interval.partition(":")
    ends = (intervals.get("topk_accuracy") or {}).get(k) if k else intervals.get(name)
    if not ends:
        return ""
    low, high = (percent(end) if row.is_percent else f"{end:z.3f}".replace("-", "−") for end in ends)
    return f"{low} to {high}"


def cost_lines(findings: Findings) -> list[Line]:
    """Each model's cost, as far as run.json has it."""
    recorded = [findings.record.get("models", {}).get(name, {}) for name in findings.models]
    lines: list[Line] = []
    for key, (title, form) in COSTS.items():
        values = [value if isinstance(value := entry.get(key), int | float) else None for entry in recorded]
        if any(value is not None for value in values):
            lines.append((title, "", [("–" if value is None else form.format(value), "", False) for value in values]))
    return lines
