"""The diagrams that stand still, as SVG: accuracies and differences with intervals, reliability, confidence.

Values in, markup out. Colours are classes that figure.css gives a light and a dark value; every colour has a text, a
shape or a place beside it. Each diagram is 360 units wide, so on a phone its text is as large as the page's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from vitscore.metrics.intervals import wilson
from vitscore.metrics.notation import percent
from vitscore.report.samples import Confidence

WIDTH = 360
LEFT, RIGHT = 8.0, 352.0
SHAPES = ("circle", "square", "diamond", "triangle")
CORNERS: dict[str, list[tuple[float, float]]] = {
    "square": [(-1, -1), (1, -1), (1, 1), (-1, 1)],
    "diamond": [(0, -1.35), (1.35, 0), (0, 1.35), (-1.35, 0)],
    "triangle": [(0, -1.25), (1.2, 0.95), (-1.2, 0.95)],
}
NUM_COLOURS = 6


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
    """A scale over [low, high] and a little more, with ticks at round values."""
    span = max(high - low, 1e-3)
    rough = span / num_ticks
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return Axis(first * step, last * step, start, stop, tuple(step * tick for tick in range(first, last + 1)))


def svg(height: float, label: str, body: Sequence[str]) -> str:
    parts = "\n".join(body)
    head = f'<svg class="plot" viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{escape(label)}">'
    return f"{head}\n{parts}\n</svg>"


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def text(x: float, y: float, content: str, kind: str = "", anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}">{escape(content)}</text>'


def marker(x: float, y: float, index: int, size: float = 5.0) -> str:
    """A model's mark: its colour, and a shape of its own."""
    shape, kind = SHAPES[index % len(SHAPES)], f'class="mark fill{index % NUM_COLOURS}"'
    if shape == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{size:g}" {kind}/>'
    points = " ".join(f"{x + dx * size * 0.9:.1f},{y + dy * size * 0.9:.1f}" for dx, dy in CORNERS[shape])
    return f'<polygon points="{points}" {kind}/>'


def tick_text(value: float, scale: Axis) -> str:
    step = scale.ticks[1] - scale.ticks[0]
    return percent(value, max(0, -math.floor(math.log10(100 * step) + 1e-9)))


def accuracies(models: Mapping[str, Mapping[str, Any]]) -> str:
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
    return svg(bottom + 22, f"Accuracy with 95% intervals: {said}", body)


def differences(comparisons: Sequence[Mapping[str, Any]], order: Sequence[str]) -> str:
    """The difference of accuracy of each pair with its interval, against zero."""
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
    return svg(bottom + 22, f"Difference of accuracy with 95% intervals: {said}", body)


def short(name: str, room: int = 18) -> str:
    """A name that fits into a diagram."""
    return name if len(name) <= room else name[: room - 1] + "…"


def grid(scale: Axis, top: float, bottom: float, *, unit: str) -> list[str]:
    """Vertical rules at the ticks, and the ticks' values below."""
    body = [line(scale(tick), top, scale(tick), bottom, "rule") for tick in scale.ticks]
    for position, tick in enumerate(scale.ticks):
        anchor = {0: "start", len(scale.ticks) - 1: "end"}.get(position, "middle")
        ending = unit if position == len(scale.ticks) - 1 else ""
        x = {0: LEFT, len(scale.ticks) - 1: RIGHT}.get(position, scale(tick))
        body.append(text(x, bottom + 15, tick_text(tick, scale) + ending, "tick", anchor))
    return body


def whisker(scale: Axis, low: float, high: float, y: float, index: int) -> list[str]:
    kind = f"interval line{index % NUM_COLOURS}"
    ends = [line(scale(end), y - 4, scale(end), y + 4, kind) for end in (low, high)]
    return [line(scale(low), y, scale(high), y, kind), *ends]


def reliability(bins: Mapping[str, Sequence[Any]], index: int, name: str) -> str:
    """Accuracy against confidence: on the diagonal, a model that is 80% sure is right 80 times in 100.

    A bin's mark grows with its samples; its bar is Wilson's interval.
    """
    left, right, top, bottom = 40.0, 348.0, 8.0, 248.0
    across, up = axis(0, 1, start=left, stop=right), axis(0, 1, start=bottom, stop=top)
    body = frame(across, up)
    body.append(line(left, bottom, right, top, "diagonal"))
    rows = zip(bins["samples"], bins["confidence"], bins["accuracy"], strict=True)
    filled = [row for row in rows if row[0]]
    most = max((row[0] for row in filled), default=1)
    for samples, confidence, accuracy in filled:
        low, high = wilson(round(samples * accuracy), samples) or (accuracy, accuracy)
        said = f"{samples:,} answers, {percent(confidence)}% sure on average, {percent(accuracy)}% right"
        mark = marker(across(confidence), up(accuracy), index, 3 + 4 * math.sqrt(samples / most))
        whiskers = line(
            across(confidence), up(low), across(confidence), up(high), f"interval thin line{index % NUM_COLOURS}"
        )
        body.append(f"<g><title>{said}</title>{whiskers}{mark}</g>")
    body.append(text(left + 8, top + 16, "more often right than sure", "small halo"))
    body.append(text(right - 6, bottom - 8, "surer than right", "small halo", "end"))
    body.append(text((left + right) / 2, bottom + 34, "confidence", "tick", "middle"))
    body.append(
        f'<g transform="translate(11 {(top + bottom) / 2}) rotate(-90)">{text(0, 0, "right", "tick", "middle")}</g>'
    )
    return svg(290, f"Reliability of {name}: accuracy against confidence, in bins", body)


def frame(across: Axis, up: Axis) -> list[str]:
    body = [line(across.start, up(tick), across.stop, up(tick), "rule") for tick in up.ticks]
    body += [text(across.start - 6, up(tick) + 4, percent(tick, 0), "tick", "end") for tick in up.ticks]
    for position, tick in enumerate(across.ticks):
        ending = "%" if position == len(across.ticks) - 1 else ""
        anchor = "end" if ending else "middle"
        body.append(text(across(tick) + 6 * bool(ending), up.start + 17, percent(tick, 0) + ending, "tick", anchor))
    return body


def confidences(confidence: Confidence, name: str) -> str:
    """How sure a model is where it is right, and where it is wrong: one histogram each, each on its own scale."""
    wanted = [("right", "right", confidence.right), ("wrong", "wrong", confidence.wrong)]
    if confidence.unlabelled.any():
        wanted.append(("without a label", "other", confidence.unlabelled))
    shown = [entry for entry in wanted if entry[2].any() or entry[1] != "other"]
    if not (confidence.right.any() or confidence.wrong.any()):
        shown = [entry for entry in shown if entry[1] == "other"]
    body, y = [], 0.0
    for title, kind, counts_M in shown:
        body += histogram(counts_M.tolist(), title, kind, y)
        y += 104
    across = axis(0, 1, start=40, stop=348)
    for position, tick in enumerate(across.ticks):
        ending = "%" if position == len(across.ticks) - 1 else ""
        anchor = "end" if ending else "middle"
        body.append(text(across(tick) + 6 * bool(ending), y + 11, percent(tick, 0) + ending, "tick", anchor))
    body.append(text(194, y + 28, "confidence", "tick", "middle"))
    said = "; ".join(f"{int(counts_M.sum()):,} {title}" for title, _, counts_M in shown)
    return svg(y + 34, f"Confidence of {name}: {said}", body)


def histogram(counts: Sequence[int], title: str, kind: str, top: float) -> list[str]:
    """One row of bars, 70 units high, under its title."""
    most, width, base = max(max(counts), 1), 308 / len(counts), top + 94
    body = [text(40, top + 13, f"{sum(counts):,} {title}", "name")]
    body.append(text(34, top + 30, f"{most:,}" if any(counts) else "", "tick", "end"))
    for position, count in enumerate(counts):
        # A bin with one answer among thousands is still seen.
        height = max(70 * count / most, 1.5) if count else 0
        low, high = percent(position / len(counts), 0), percent((position + 1) / len(counts), 0)
        x = 40 + position * width + 1
        bar = (
            f'<rect x="{x:.1f}" y="{base - height:.1f}" width="{width - 2:.1f}" height="{height:.1f}" class="{kind}"/>'
        )
        body.append(f"<g><title>{count:,} {title}, {low} to {high}% sure</title>{bar}</g>")
    body.append(line(40, base, 348, base, "base"))
    return body
