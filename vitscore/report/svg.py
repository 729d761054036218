"""Parts of SVG figures as plain data: lines, texts, and each model's mark. The template `macros.html` writes them.

Colours are classes that figure.css gives a light and a dark value. A figure is 360 units wide, so that on a phone its
text is as large as the page's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

WIDTH = 360
SHAPES = ("circle", "square", "diamond", "triangle")
CORNERS: dict[str, list[tuple[float, float]]] = {
    "square": [(-1, -1), (1, -1), (1, 1), (-1, 1)],
    "diamond": [(0, -1.35), (1.35, 0), (0, 1.35), (-1.35, 0)],
    "triangle": [(0, -1.25), (1.2, 0.95), (-1.2, 0.95)],
}
NUM_COLOURS = 6


@dataclass(frozen=True)
class Element:
    """An SVG element; its attributes and text are escaped when the template writes them."""

    tag: str
    attributes: Mapping[str, str]
    children: Sequence[Element] = ()
    text: str = ""


def plot(height: float, label: str, body: Sequence[Element]) -> Element:
    """A whole figure, with the text that a screen reader gives for it."""
    attributes = {"class": "plot", "viewBox": f"0 0 {WIDTH} {height:g}", "role": "img", "aria-label": label}
    return Element("svg", attributes, body)


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Element:
    ends = zip(("x1", "y1", "x2", "y2"), (x1, y1, x2, y2), strict=True)
    return Element("line", {**{name: f"{value:.1f}" for name, value in ends}, "class": kind})


def text(x: float, y: float, content: str, kind: str = "", anchor: str = "start") -> Element:
    return Element("text", {"x": f"{x:.1f}", "y": f"{y:.1f}", "class": kind, "text-anchor": anchor}, text=content)


def titled(title: str, *children: Element) -> Element:
    """Elements with a text that appears where the pointer rests on them."""
    return Element("g", {}, (Element("title", {}, text=title), *children))


def marker(x: float, y: float, index: int, size: float = 5.0) -> Element:
    """A model's mark: its colour and its shape."""
    shape, kind = SHAPES[index % len(SHAPES)], f"mark fill{index % NUM_COLOURS}"
    if shape == "circle":
        return Element("circle", {"cx": f"{x:.1f}", "cy": f"{y:.1f}", "r": f"{size:g}", "class": kind})
    corners = ((x + dx * size * 0.9, y + dy * size * 0.9) for dx, dy in CORNERS[shape])
    return Element("polygon", {"points": points(corners), "class": kind})


def points(places: Iterable[tuple[float, float]]) -> str:
    """Coordinates as a polygon or polyline takes them."""
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in places)


def key(index: int) -> Element:
    """A model's mark beside its name in a heading or a legend."""
    attributes = {"class": "plot key", "viewBox": "0 0 14 14", "aria-hidden": "true"}
    return Element("svg", attributes, (marker(7, 7, index),))
