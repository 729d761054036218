"""Groups of horizontal bars as one SVG: labels left, values right, whiskers over the rounds, light and dark.

Knows bars, not benches. The file is complete: its colours follow the reader's scheme, and it asks for nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from vitscore.bench.harness.timing import Figure

WIDTH, LABELS, VALUES = 960, 290, 150
"""Of all, of the column of labels, and what is kept free for values at the right."""
ROW, BAR, HEAD, GAP, TOP, BOTTOM = 26, 14, 30, 14, 40, 74
LOG_FROM = 20.0
"""The axis is logarithmic where the largest value is this many times the smallest."""
STYLE = """
.bench { --ink: #1d1c1a; --muted: #66615a; --line: #e4dfd7; --ours: #1c5a9c; --peer: #b9b1a5; --paper: #fdfcfa;
  font: 13px -apple-system, BlinkMacSystemFont, "Segoe UI", Roboto, "Helvetica Neue", Inter, "Liberation Sans", Arial,
  sans-serif; font-variant-numeric: tabular-nums; }
@media (prefers-color-scheme: dark) { .bench { --ink: #edeae4; --muted: #a9a297; --line: #37332e; --ours: #85b8ee;
  --peer: #6b655c; --paper: #171614; } }
.bench .paper { fill: var(--paper); }
.bench text { fill: var(--ink); paint-order: stroke; stroke: var(--paper); stroke-width: 4px; stroke-linejoin: round; }
.bench .head { font-weight: 650; font-size: 14px; }
.bench .soft { fill: var(--muted); }
.bench .peer-name { fill: var(--muted); }
.bench .grid { stroke: var(--line); }
.bench .ours { fill: var(--ours); }
.bench .peer { fill: var(--peer); }
.bench .bound { fill: none; stroke: var(--ours); stroke-width: 1.5; stroke-dasharray: 4 3; }
.bench .whisker { stroke: var(--paper); stroke-width: 4.5; fill: none; }
.bench .whisker.top { stroke: var(--ink); stroke-width: 1.5; }
.bench .mark { stroke: var(--ours); stroke-dasharray: 2 4; stroke-width: 1.5; }
.bench .mark-name { fill: var(--ours); font-weight: 600; }
"""


@dataclass(frozen=True)
class Bar:
    """One figure; `kind` is `ours`, `peer` or `bound`."""

    label: str
    figure: Figure
    kind: str = "ours"


@dataclass(frozen=True)
class Group:
    """Bars under one heading."""

    title: str
    bars: tuple[Bar, ...]


class Axis:
    """Values to places between LABELS and WIDTH - VALUES."""

    def __init__(self, values: Sequence[float]) -> None:
        largest, smallest = max(values), min(values)
        self.is_log = largest / smallest > LOG_FROM
        if self.is_log:
            self.low, self.high = 10.0 ** math.floor(math.log10(smallest * 0.9)), largest * 1.05
            decades = range(round(math.log10(self.low)), math.floor(math.log10(self.high)) + 1)
            self.ticks = [10.0**decade for decade in decades]
        else:
            self.low, self.high = 0.0, largest * 1.05
            step = nice_step(self.high / 5)
            self.ticks = [step * number for number in range(math.floor(self.high / step) + 1)]

    def x(self, value: float) -> float:
        if self.is_log:
            share = math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        else:
            share = value / self.high
        return LABELS + share * (WIDTH - LABELS - VALUES)


def nice_step(about: float) -> float:
    """1, 2 or 5 times a power of ten, at least `about`."""
    power = 10.0 ** math.floor(math.log10(about))
    return float(next(power * factor for factor in (1, 2, 5, 10) if power * factor >= about * 0.999))


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:,.1f}" if value >= 10 else f"{value:.3g}"


def draw(
    groups: Sequence[Group],
    *,
    title: str,
    unit: str,
    notes: Sequence[str],
    mark: Bar | None = None,
    margin: int = 24,
) -> str:
    """One SVG of all groups on one axis.

    Args:
        groups: at least one, each with at least one bar of a value above zero.
        title: what a screen reader says.
        unit: of the axis.
        notes: lines below the axis, two at most.
        mark: a value to draw a line at through all groups.
        margin: of paper around everything; none where a page has its own.
    """
    axis = Axis([value for group in groups for bar in group.bars for value in (bar.figure["low"], bar.figure["high"])])
    rows = sum(HEAD + ROW * len(group.bars) + GAP for group in groups)
    height = TOP + rows + BOTTOM
    parts = [*grid(axis, TOP, TOP + rows, unit)]
    if mark is not None:
        parts += marked(axis, mark, TOP, TOP + rows)
    y = TOP
    for group in groups:
        parts.append(f'<text class="head" x="0" y="{y + 20}">{escape(group.title)}</text>')
        y += HEAD
        for bar in group.bars:
            parts += bar_parts(axis, bar, y)
            y += ROW
        y += GAP
    parts += [
        f'<text class="soft" x="0" y="{height - 30 + 18 * place}">{escape(note)}</text>'
        for place, note in enumerate(notes[:2])
    ]
    frame = -margin, -margin // 2, WIDTH + 2 * margin, height + margin
    x, top, width, tall = frame
    paper = f'<rect class="paper" x="{x}" y="{top}" width="{width}" height="{tall}"/>' if margin else ""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="bench" role="img" viewBox="{x} {top} {width} {tall}">'
        f"<title>{escape(title)}</title><style>{STYLE}</style>{paper}{''.join(parts)}</svg>\n"
    )


def grid(axis: Axis, top: float, bottom: float, unit: str) -> Iterator[str]:
    for tick in axis.ticks:
        x = f"{axis.x(tick):.1f}"
        yield f'<path class="grid" d="M{x} {top}V{bottom}"/>'
        yield f'<text class="soft" x="{x}" y="{bottom + 18}" text-anchor="middle">{tick:,g}</text>'
    scale = ", logarithmic" if axis.is_log else ""
    yield f'<text class="soft" x="{WIDTH}" y="{top - 16}" text-anchor="end">{escape(unit + scale)}</text>'


def marked(axis: Axis, mark: Bar, top: float, bottom: float) -> Iterator[str]:
    x = f"{axis.x(mark.figure['median']):.1f}"
    yield f'<path class="mark" d="M{x} {top - 8}V{bottom}"/>'
    yield f'<text class="mark-name" x="{x}" y="{top - 16}" text-anchor="middle">{escape(mark.label)}</text>'


def bar_parts(axis: Axis, bar: Bar, y: float) -> Iterator[str]:
    """A bar with its label, value and whisker."""
    low, median, high = (axis.x(bar.figure[name]) for name in ("low", "median", "high"))
    middle = y + ROW / 2
    name_class = "peer-name" if bar.kind == "peer" else "name"
    label = bar.label if len(bar.label) <= 42 else bar.label[:41] + "…"
    yield f'<text class="{name_class}" x="16" y="{middle + 4.5}">{escape(label)}</text>'
    yield (
        f'<rect class="{escape(bar.kind)}" x="{LABELS}" y="{middle - BAR / 2}" width="{max(median - LABELS, 1):.1f}" '
        f'height="{BAR}" rx="2"><title>{escape(spread_text(bar))}</title></rect>'
    )
    if high - low > 0.5:
        path = f"M{low:.1f} {middle}H{high:.1f}M{low:.1f} {middle - 4}v8M{high:.1f} {middle - 4}v8"
        yield f'<path class="whisker" d="{path}"/><path class="whisker top" d="{path}"/>'
    x = max(median, high) + 10
    yield f'<text class="{name_class}" x="{x:.1f}" y="{middle + 4.5}">{number(bar.figure["median"])}</text>'


def spread_text(bar: Bar) -> str:
    """Return the text of a tooltip: the median and the range of the rounds."""
    figure = bar.figure
    text = f"{bar.label}: {number(figure['median'])} {figure['unit']}"
    if len(figure["rounds"]) > 1:
        text += f", {number(figure['low'])} to {number(figure['high'])} over {len(figure['rounds'])} rounds"
    return text
