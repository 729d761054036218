"""Render robustness.html: curves of accuracy by severity, the figures, and one image under every condition.

The input is robustness.json and the pictures; the template lays them out for light and dark mode. The page is one file
that needs no network.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping
from typing import Any

from vitscore.report import svg
from vitscore.report.svg import Element
from vitscore.report.templating import assets, fill
from vitscore.robustness.words import points

COLOURS = ("#2563eb", "#d9480f", "#2b8a3e", "#862e9c", "#0b7285", "#a61e4d")
DASHES = ("", "6 3", "2 3", "8 3 2 3")
WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 250, 170, 34, 22, 8


def render(document: Mapping[str, Any], pictures: Mapping[str, bytes]) -> str:
    """Return the whole page.

    Args:
        document: the content of robustness.json.
        pictures: PNGs by condition: "" for the unchanged image, "@gaussian_noise:3" for a cell; empty for no pictures.
    """
    operators = document["operators"]
    return fill(
        "robustness.html",
        style=assets("robustness.css"),
        document=document,
        points=points,
        key=key,
        curves={name: curves(document, name) for name in operators},
        num_levels=max((len(operator["severities"]) for operator in operators.values()), default=0),
        images={condition: base64.b64encode(png).decode() for condition, png in pictures.items()},
    )


def key(index: int) -> Element:
    """Return a sample of a model's line, for the legend."""
    line = Element("line", {"x1": "0", "y1": "5", "x2": "34", "y2": "5", **stroke(index)})
    return Element("svg", {"width": "34", "height": "10"}, (line,))


def stroke(index: int) -> dict[str, str]:
    dash = DASHES[index // len(COLOURS) % len(DASHES)] or ("6 3" if index % 2 else "")
    return {"stroke": COLOURS[index % len(COLOURS)], "stroke-width": "2", "stroke-dasharray": dash}


def curves(document: Mapping[str, Any], name: str) -> Element:
    """Return the curves of all models under one operator, with bands for their intervals."""
    levels = [0, *(int(level) for level in document["operators"][name]["severities"])]
    body = []
    for percent in (0, 25, 50, 75, 100):
        y = _y(percent / 100)
        ends = {"x1": f"{LEFT}", "x2": f"{WIDTH - 6}", "y1": f"{y:.1f}", "y2": f"{y:.1f}"}
        body += [Element("line", {"class": "grid", **ends}), label(LEFT - 6, y + 4, percent, "end")]
    body += [label(_x(level), HEIGHT - 6, level, "middle") for level in levels]
    descriptions = []
    for index, (model, figures) in enumerate(document["models"].items()):
        cells = [figures["clean"], *figures["operators"][name]["severities"].values()]
        if cells[0]["accuracy"] is None:
            continue
        low, high = (curve(levels, (cell["accuracy_ci"][end] for cell in cells)) for end in (0, 1))
        band = {"fill": COLOURS[index % len(COLOURS)], "opacity": "0.15"}
        body.append(Element("polygon", {"points": svg.points([*low, *reversed(high)]), **band}))
        line = svg.points(curve(levels, (cell["accuracy"] for cell in cells)))
        body.append(Element("polyline", {"points": line, "fill": "none", **stroke(index)}))
        descriptions.append(f"{model}: " + ", ".join(points(cell["accuracy"]) for cell in cells))
    text = f"{name}, accuracy in percent by severity from {levels[0]}; " + "; ".join(descriptions)
    return Element("svg", {"viewBox": f"0 0 {WIDTH} {HEIGHT}", "role": "img", "aria-label": text}, body)


def curve(levels: Iterable[int], shares: Iterable[float]) -> list[tuple[float, float]]:
    return [(_x(level), _y(share)) for level, share in zip(levels, shares, strict=True)]


def label(x: float, y: float, value: int, anchor: str) -> Element:
    return Element("text", {"x": f"{x:.1f}", "y": f"{y:.1f}", "text-anchor": anchor}, text=str(value))


def _x(level: int) -> float:
    return LEFT + 8 + level * (WIDTH - LEFT - 20) / 5


def _y(accuracy: float) -> float:
    return TOP + (1 - accuracy) * (HEIGHT - TOP - BOTTOM)
