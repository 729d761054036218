"""The report's static figures: accuracies and differences with intervals, reliability, confidence.

Each takes values and returns an SVG element. A colour is never the only mark: a text, a shape or a place says the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from vitscore.metrics.intervals import wilson
from vitscore.metrics.notation import percent
from vitscore.report.samples import Confidence
from vitscore.report.svg import NUM_COLOURS, Element, line, marker, plot, text, titled

LEFT, RIGHT = 8.0, 352.0
Bin: TypeAlias = tuple[int, float, float]
"""Answers of about the same confidence: their number, mean confidence and accuracy."""


@dataclass(frozen=True)
class Axis:
    """A linear scale with its ticks."""

    low: float
    high: float
    start: float
    stop: float
    ticks: tuple[float, ...]

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.stop - self.start)


def axis(low: float, high: float, *, start: float, stop: float, num_ticks: int = 5) -> Axis:
    """A scale that covers [low, high], with ticks at round values."""
    span = max(high - low, 1e-3)
    rough = span / num_ticks
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return Axis(first * step, last * step, start, stop, tuple(step * tick for tick in range(first, last + 1)))


def tick_text(value: float, scale: Axis) -> str:
    step = scale.ticks[1] - scale.ticks[0]
    return percent(value, max(0, -math.floor(math.log10(100 * step) + 1e-9)))


def accuracies(models: Mapping[str, Mapping[str, Any]]) -> Element:
    """Each model's accuracy with its interval, on one scale."""
    shown = [
        (index, name, model) for index, (name, model) in enumerate(models.items()) if model["accuracy"] is not None
    ]
    ends = [model["confidence_intervals"]["accuracy"] for _, _, model in shown]
    scale = axis(min(low for low, _ in ends), max(high for _, high in ends), start=LEFT + 6, stop=RIGHT - 10)
    bottom = 44.0 * len(shown) + 6
    body = grid(scale, 4, bottom, unit="%")
    for position, (index, name, model) in enumerate(shown):
        y = 44.0 * position + 34
        low, high = model["confidence_intervals"]["accuracy"]
        body.append(text(LEFT, y - 14, short(name, 34), "name halo"))
        body.append(text(RIGHT, y - 14, f"{percent(model['accuracy'], 2)}%", "figure halo", "end"))
        body += whisker(scale, low, high, y, index)
        body.append(marker(scale(model["accuracy"]), y, index))
    said = "; ".join(f"{name} {percent(model['accuracy'], 2)}%" for _, name, model in shown)
    return plot(bottom + 22, f"Accuracy with 95% intervals: {said}", body)


def differences(comparisons: Sequence[Mapping[str, Any]], order: Sequence[str]) -> Element:
    """Each pair's difference of accuracy with its interval, around zero."""
    shown = [entry for entry in comparisons if entry["samples"]]
    ends = [end for entry in shown for end in entry["accuracy_difference_ci"]]
    reach = max(0.002, *(abs(end) for end in ends))
    scale = axis(-reach, reach, start=LEFT + 10, stop=RIGHT - 10, num_ticks=4)
    bottom = 44.0 * len(shown) + 24
    first, second = (shown[0]["a"], shown[0]["b"]) if len(shown) == 1 else ("first", "second")
    body = [text(scale(0) - 8, 11, f"◂ {short(second)} ahead", "small", "end")]
    body.append(text(scale(0) + 8, 11, f"{short(first)} ahead ▸", "small"))
    body += grid(scale, 18, bottom, unit=" points")
    body.append(line(scale(0), 18, scale(0), bottom, "zero"))
    for position, entry in enumerate(shown):
        y = 44.0 * position + 52
        low, high = entry["accuracy_difference_ci"]
        index = list(order).index(entry["a"] if entry["accuracy_difference"] >= 0 else entry["b"])
        body.append(text(LEFT, y - 14, f"{short(entry['a'])} − {short(entry['b'])}", "name halo"))
        body.append(text(RIGHT, y - 14, percent(entry["accuracy_difference"]), "figure halo", "end"))
        body += whisker(scale, low, high, y, index)
        body.append(marker(scale(entry["accuracy_difference"]), y, index))
    said = "; ".join(f"{e['a']} minus {e['b']} {percent(e['accuracy_difference'])} points" for e in shown)
    return plot(bottom + 22, f"Difference of accuracy with 95% intervals: {said}", body)


def short(name: str, room: int = 18) -> str:
    """A name cut to fit a figure."""
    return name if len(name) <= room else name[: room - 1] + "…"


def grid(scale: Axis, top: float, bottom: float, *, unit: str) -> list[Element]:
    """Vertical rules at the ticks, with their values below."""
    body = [line(scale(tick), top, scale(tick), bottom, "rule") for tick in scale.ticks]
    for position, tick in enumerate(scale.ticks):
        anchor = {0: "start", len(scale.ticks) - 1: "end"}.get(position, "middle")
        ending = unit if position == len(scale.ticks) - 1 else ""
        x = {0: LEFT, len(scale.ticks) - 1: RIGHT}.get(position, scale(tick))
        body.append(text(x, bottom + 15, tick_text(tick, scale) + ending, "tick", anchor))
    return body


def whisker(scale: Axis, low: float, high: float, y: float, index: int) -> list[Element]:
    kind = f"interval line{index % NUM_COLOURS}"
    ends = [line(scale(end), y - 4, scale(end), y + 4, kind) for end in (low, high)]
    return [line(scale(low), y, scale(high), y, kind), *ends]


def filled_bins(bins: Mapping[str, Sequence[Any]]) -> list[Bin]:
    """The bins that hold answers, from metrics.json."""
    rows = zip(bins["samples"], bins["confidence"], bins["accuracy"], strict=True)
    return [row for row in rows if row[0]]


def reliability(bins: Sequence[Bin], index: int, name: str) -> Element:
    """Accuracy against confidence, in bins; a calibrated model lies on the diagonal.

    A bin's mark grows with its number of samples; its bar is Wilson's interval.
    """
    left, right, top, bottom = 40.0, 348.0, 8.0, 248.0
    across, up = axis(0, 1, start=left, stop=right), axis(0, 1, start=bottom, stop=top)
    body = frame(across, up)
    body.append(line(left, bottom, right, top, "diagonal"))
    most = max((samples for samples, _, _ in bins), default=1)
    for samples, confidence, accuracy in bins:
        low, high = wilson(round(samples * accuracy), samples) or (accuracy, accuracy)
        said = f"{samples:,} answers, {percent(confidence)}% sure on average, {percent(accuracy)}% right"
        mark = marker(across(confidence), up(accuracy), index, 3 + 4 * math.sqrt(samples / most))
        x, kind = across(confidence), f"interval thin line{index % NUM_COLOURS}"
        body.append(titled(said, line(x, up(low), x, up(high), kind), mark))
    body.append(text(left + 8, top + 16, "underconfident", "small halo"))
    body.append(text(right - 6, bottom - 8, "overconfident", "small halo", "end"))
    body.append(text((left + right) / 2, bottom + 34, "confidence", "tick", "middle"))
    turned = {"transform": f"translate(11 {(top + bottom) / 2}) rotate(-90)"}
    body.append(Element("g", turned, (text(0, 0, "right", "tick", "middle"),)))
    return plot(290, f"Reliability of {name}: accuracy against confidence, in bins", body)


def frame(across: Axis, up: Axis) -> list[Element]:
    body = [line(across.start, up(tick), across.stop, up(tick), "rule") for tick in up.ticks]
    body += [text(across.start - 6, up(tick) + 4, percent(tick, 0), "tick", "end") for tick in up.ticks]
    return [*body, *percents_below(across, up.start + 17)]


def percents_below(across: Axis, y: float) -> list[Element]:
    """The values of a horizontal axis in percent; the last one has the sign."""
    *others, last = across.ticks
    texts = [text(across(tick), y, percent(tick, 0), "tick", "middle") for tick in others]
    return [*texts, text(across(last) + 6, y, f"{percent(last, 0)}%", "tick", "end")]


def confidences(confidence: Confidence, name: str) -> Element:
    """Histograms of a model's confidence in right and wrong answers, each with a separate scale."""
    wanted = [("right", "right", confidence.right), ("wrong", "wrong", confidence.wrong)]
    if confidence.unlabelled.any():
        wanted.append(("without a label", "other", confidence.unlabelled))
    shown = [entry for entry in wanted if entry[2].any() or entry[1] != "other"]
    if not (confidence.right.any() or confidence.wrong.any()):
        shown = [entry for entry in shown if entry[1] == "other"]
    body: list[Element] = []
    y = 0.0
    for title, kind, counts_M in shown:
        body += histogram(counts_M.tolist(), title, kind, y)
        y += 104
    body += percents_below(axis(0, 1, start=40, stop=348), y + 11)
    body.append(text(194, y + 28, "confidence", "tick", "middle"))
    said = "; ".join(f"{int(counts_M.sum()):,} {title}" for title, _, counts_M in shown)
    return plot(y + 34, f"Confidence of {name}: {said}", body)


def histogram(counts: Sequence[int], title: str, kind: str, top: float) -> list[Element]:
    """One histogram, 70 units high, below its title."""
    most, width, base = max(max(counts), 1), 308 / len(counts), top + 94
    body = [text(40, top + 13, f"{sum(counts):,} {title}", "name")]
    body.append(text(34, top + 30, f"{most:,}" if any(counts) else "", "tick", "end"))
    for position, count in enumerate(counts):
        # A bin with one answer among thousands stays visible.
        height = max(70 * count / most, 1.5) if count else 0
        low, high = percent(position / len(counts), 0), percent((position + 1) / len(counts), 0)
        x = 40 + position * width + 1
        sides = {"x": x, "y": base - height, "width": width - 2, "height": height}
        bar = Element("rect", {**{side: f"{value:.1f}" for side, value in sides.items()}, "class": kind})
        body.append(titled(f"{count:,} {title}, {low} to {high}% sure", bar))
    body.append(line(40, base, 348, base, "base"))
    return body
