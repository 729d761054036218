"""The results of a grid as plain text: sentences for robustness.json, and a table for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vitscore.metrics.intervals import LEVEL
from vitscore.text.console import cut

NAME_ROOM = 17
LEVEL_ROOM, MEAN_ROOM = 5, 6


def conclusions(document: Mapping[str, Any]) -> list[str]:
    """Return sentences about which model is more robust, under which operators, and each model's weakest operator."""
    sentences: list[str] = []
    if not document["samples"]:
        return ["no sample has a label, so the models' robustness is unknown"]
    for comparison in document["comparisons"]:
        sentences.append(_overall(document, comparison))
        sentences.append(_by_operator(comparison))
    sentences.extend(_weakest(name, model) for name, model in document["models"].items())
    return sentences


def _overall(document: Mapping[str, Any], comparison: Mapping[str, Any]) -> str:
    a, b, figures = comparison["a"], comparison["b"], comparison["overall"]
    difference, (low, high) = figures["error_difference"], figures["error_difference_ci"]
    images = f"{document['samples']:,} image{'s' if document['samples'] > 1 else ''}"
    if (low > 0 or high < 0) and figures["sign_p"] < 1 - LEVEL:
        better, worse = (b, a) if difference > 0 else (a, b)
        ends = sorted((abs(low), abs(high)))
        rates = [points(document["models"][name]["mean_corruption_error"]) for name in (better, worse)]
        return (
            f"{better} is more robust than {worse}: wrong on {rates[0]}% of the changed images against {rates[1]}%, "
            f"{points(abs(difference))} points apart ({LEVEL:.0%} interval {points(ends[0])} to {points(ends[1])}, "
            f"{images})"
        )
    return (
        f"no difference in robustness between {a} and {b} can be shown on these {images} "
        f"({points(difference)} points of error, {LEVEL:.0%} interval {points(low)} to {points(high)})"
    )


def _by_operator(comparison: Mapping[str, Any]) -> str:
    """Name the operators under which two models differ, after Holm's correction."""
    ahead: dict[str, list[str]] = {comparison["a"]: [], comparison["b"]: []}
    for name, figures in comparison["operators"].items():
        low, high = figures["error_difference_ci"]
        if (low > 0 or high < 0) and figures["adjusted_p"] < 1 - LEVEL:
            ahead[comparison["b"] if low > 0 else comparison["a"]].append(name)
    parts = [f"{model} is ahead under {listed(names)}" for model, names in ahead.items() if names]
    left = len(comparison["operators"]) - sum(map(len, ahead.values()))
    if left and parts:
        parts.append(f"under the other {left} no difference can be shown")
    if not parts:
        number = f"any of the {left} operators" if left > 1 else next(iter(comparison["operators"]))
        parts = [f"no difference can be shown under {number}"]
    return "; ".join(parts)


def _weakest(name: str, model: Mapping[str, Any]) -> str:
    worst, figures = max(model["operators"].items(), key=lambda item: float(item[1]["error"]))
    clean, lost = model["clean"]["accuracy"], model["accuracy_lost"]
    return (
        f"{name}: {points(clean)}% right on unchanged images, {points(abs(lost))} points "
        f"{'more' if lost < 0 else 'fewer'} on changed ones; "
        f"most wrong under {worst} ({points(figures['error'])}%)"
    )


def listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + f" and {names[-1]}"


def points(fraction: float | None) -> str:
    """Format a fraction as percent or percentage points with one digit, "-" for None; never "-0.0"."""
    if fraction is None:
        return "-"
    text = f"{100 * fraction:.1f}"
    return "0.0" if text == "-0.0" else text


def table(document: Mapping[str, Any], *, width: int = 80) -> list[str]:
    """Return a table of accuracies in percent: a line per operator, for each model a column per severity and the mean.

    Models that do not fit in the width follow in further blocks.
    """
    models, levels = list(document["models"]), _levels(document)
    room = LEVEL_ROOM * len(levels) + MEAN_ROOM
    per_block = max(1, (width - NAME_ROOM) // room)
    lines: list[str] = []
    for first in range(0, len(models), per_block):
        lines += ([""] if lines else []) + list(_block(document, models[first : first + per_block], levels, room))
    return lines


def _levels(document: Mapping[str, Any]) -> list[str]:
    return list(next(iter(document["operators"].values()))["severities"])


def _block(document: Mapping[str, Any], models: Sequence[str], levels: Sequence[str], room: int) -> Iterator[str]:
    def row(label: str, cells: Sequence[str]) -> str:
        return (f"{label:<{NAME_ROOM}}" + "".join(cells)).rstrip()

    def means(label: str, values: Sequence[str]) -> str:
        return row(label, [f"{value:>{room}}" for value in values])

    yield row("", [f" {cut(name, room - 1):>{room - 1}}" for name in models])
    heads = "".join(f"{level:>{LEVEL_ROOM}}" for level in levels) + f"{'mean':>{MEAN_ROOM}}"
    yield row("severity", [heads] * len(models))
    figures = [document["models"][name] for name in models]
    yield means("unchanged", [points(model["clean"]["accuracy"]) for model in figures])
    for name in document["operators"]:
        cells = []
        for model in figures:
            under = model["operators"][name]
            accuracies = [under["severities"][level]["accuracy"] for level in levels]
            cells.append("".join(f"{whole(value):>{LEVEL_ROOM}}" for value in accuracies))
            cells.append(f"{points(None if under['error'] is None else 1 - under['error']):>{MEAN_ROOM}}")
        yield row(name, cells)
    yield means("mean error", [points(model["mean_corruption_error"]) for model in figures])
    intervals = [model["mean_corruption_error_ci"] for model in figures]
    yield means("95% interval", ["-" if ends is None else "-".join(map(points, ends)) for ends in intervals])
    if len(document["models"]) > 1:
        own = [model["to_baseline"]["mean_corruption_error"] for model in figures]
        yield means("mCE to baseline", ["-" if value is None else f"{100 * value:.1f}" for value in own])


def whole(fraction: float | None) -> str:
    """Format a fraction as a percentage in at most four columns."""
    return "-" if fraction is None else f"{100 * fraction:.1f}" if fraction < 1 else "100"
