"""robustness.html: curves of accuracy by severity, the figures, and one image under every condition; one file.

Gets robustness.json and the pictures; opens without a network, in light and dark. Everything that comes from outside
is escaped.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vitscore.robustness.words import points

COLOURS = ("#2563eb", "#d9480f", "#2b8a3e", "#862e9c", "#0b7285", "#a61e4d")
DASHES = ("", "6 3", "2 3", "8 3 2 3")
WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 250, 170, 34, 22, 8

STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1e; --soft: #6b6b70; --line: #d8d8dc; --ground: #ffffff; }
@media (prefers-color-scheme: dark) { :root { --ink: #ececf0; --soft: #a0a0a8; --line: #3a3a40; --ground: #17171a; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--ground);
       max-width: 1120px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
p.note { color: var(--soft); } .scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .6rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(240px, 1fr)); gap: 1rem; }
figure { margin: 0; } figcaption { font-weight: 600; }
figcaption span { font-weight: 400; color: var(--soft); display: block; font-size: .85rem; min-height: 3em; }
svg text { fill: var(--soft); font: 11px system-ui, sans-serif; } svg .grid { stroke: var(--line); }
.key span { display: inline-flex; align-items: center; gap: .4rem; margin-right: 1.2rem; }
.sheet img { width: 112px; height: 112px; object-fit: contain; image-rendering: pixelated; display: block; }
.sheet td, .sheet th { border: 0; padding: .15rem; text-align: left; vertical-align: middle; font-size: .85rem; }
"""


def render(document: Mapping[str, Any], pictures: Mapping[str, bytes]) -> str:
    """The whole page.

    Args:
        document: robustness.json.
        pictures: PNGs by condition: "" for the plain image, "@gaussian_noise:3" for a cell; empty where none is shown.
    """
    body = "\n".join(_sections(document, pictures))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Robustness</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _sections(document: Mapping[str, Any], pictures: Mapping[str, bytes]) -> Iterator[str]:
    names = " and ".join(document["models"]) if len(document["models"]) < 4 else f"{len(document['models'])} models"
    yield f"<h1>Robustness of {_text(names)}</h1>"
    num_levels = max((len(each["severities"]) for each in document["operators"].values()), default=0)
    yield (
        f'<p class="note">{document["samples"]:,} labelled images, {len(document["operators"])} operators, '
        f"{num_levels} severities; seed {document['seed']}.</p>"
    )
    yield "<ul>" + "".join(f"<li>{_text(sentence)}.</li>" for sentence in document["conclusions"]) + "</ul>"
    yield from _table(document)
    yield "<h2>Accuracy by severity</h2>"
    yield _key(list(document["models"]))
    yield '<div class="curves">' + "".join(_figure(document, name) for name in document["operators"]) + "</div>"
    yield '<p class="note">Severity 0 is the unchanged image. Bands are 95% intervals (Wilson).</p>'
    yield from _sheet(document, pictures)
    yield from _sources(document)


def _table(document: Mapping[str, Any]) -> Iterator[str]:
    baseline = _text(document["baseline"])
    heads = ("model", "unchanged", "mean error", "95% interval", "points lost", "mCE", "relative mCE")
    rows = []
    for name, model in document["models"].items():
        interval = model["mean_corruption_error_ci"]
        to_baseline = model["to_baseline"]
        figures = (
            points(model["clean"]["accuracy"]),
            points(model["mean_corruption_error"]),
            "-" if interval is None else f"{points(interval[0])} to {points(interval[1])}",
            points(model["accuracy_lost"]),
            points(to_baseline["mean_corruption_error"]),
            points(to_baseline["relative_mean_corruption_error"]),
        )
        rows.append(f"<tr><td>{_text(name)}</td>" + "".join(f"<td>{text}</td>" for text in figures) + "</tr>")
    yield "<h2>Figures</h2>"
    head = "".join(f"<th>{text}</th>" for text in heads)
    yield f'<div class="scroll"><table><tr>{head}</tr>{"".join(rows)}</table></div>'
    yield (
        '<p class="note">In percent. Mean error: over all operators and severities. mCE: the errors divided by those '
        f"of {baseline}, operator by operator, then averaged; relative: the same of what is lost against clean images "
        "(Hendrycks and Dietterich 2019). A dash: the baseline loses nothing under some operator.</p>"
    )
    if document["comparisons"] and document["samples"]:
        yield from _comparisons(document)


def _comparisons(document: Mapping[str, Any]) -> Iterator[str]:
    yield "<h2>Models compared, operator by operator</h2>"
    for comparison in document["comparisons"]:
        a, b = _text(comparison["a"]), _text(comparison["b"])
        rows = []
        for name, each in comparison["operators"].items():
            low, high = each["error_difference_ci"]
            figures = (
                points(each["error_difference"]),
                f"{points(low)} to {points(high)}",
                f"{each['adjusted_p']:.2g}",
            )
            rows.append(f"<tr><td>{_text(name)}</td>" + "".join(f"<td>{text}</td>" for text in figures) + "</tr>")
        yield (
            f'<div class="scroll"><table><tr><th>error of {a} less that of {b}</th><th>points</th>'
            f"<th>95% interval</th><th>p (Holm)</th></tr>{''.join(rows)}</table></div>"
        )
    yield '<p class="note">Paired by image; p: exact sign test over images, corrected for the number of operators.</p>'


def _key(models: Sequence[str]) -> str:
    lines = (f'<line x1="0" y1="5" x2="34" y2="5" {_stroke(index)}/>' for index in range(len(models)))
    spans = (
        f'<span><svg width="34" height="10">{line}</svg>{_text(name)}</span>'
        for line, name in zip(lines, models, strict=True)
    )
    return f'<p class="key">{"".join(spans)}</p>'


def _stroke(index: int) -> str:
    dash = DASHES[index // len(COLOURS) % len(DASHES)] or ("6 3" if index % 2 else "")
    return f'stroke="{COLOURS[index % len(COLOURS)]}" stroke-width="2" stroke-dasharray="{dash}"'


def _figure(document: Mapping[str, Any], name: str) -> str:
    """One operator's curves, as an SVG of its own."""
    levels = [0, *(int(level) for level in document["operators"][name]["severities"])]
    described = _text(document["operators"][name]["does"])
    parts = []
    for percent in (0, 25, 50, 75, 100):
        y = _y(percent / 100)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - 6}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{percent}</text>')
    for level in levels:
        parts.append(f'<text x="{_x(level):.1f}" y="{HEIGHT - 6}" text-anchor="middle">{level}</text>')
    spoken = []
    for index, (model, figures) in enumerate(document["models"].items()):
        cells = [figures["clean"], *figures["operators"][name]["severities"].values()]
        if cells[0]["accuracy"] is None:
            continue
        low = [f"{_x(level):.1f},{_y(cell['accuracy_ci'][0]):.1f}" for level, cell in zip(levels, cells, strict=True)]
        high = [f"{_x(level):.1f},{_y(cell['accuracy_ci'][1]):.1f}" for level, cell in zip(levels, cells, strict=True)]
        line = " ".join(
            f"{_x(level):.1f},{_y(cell['accuracy']):.1f}" for level, cell in zip(levels, cells, strict=True)
        )
        colour = COLOURS[index % len(COLOURS)]
        parts.append(f'<polygon points="{" ".join([*low, *reversed(high)])}" fill="{colour}" opacity="0.15"/>')
        parts.append(f'<polyline points="{line}" fill="none" {_stroke(index)}/>')
        spoken.append(f"{model}: " + ", ".join(points(cell["accuracy"]) for cell in cells))
    label = _text(f"{name}, accuracy in percent by severity from {levels[0]}; " + "; ".join(spoken))
    return (
        f"<figure><figcaption>{_text(name)}<span>{described}</span></figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg></figure>'
    )


def _x(level: int) -> float:
    return LEFT + 8 + level * (WIDTH - LEFT - 20) / 5


def _y(accuracy: float) -> float:
    return TOP + (1 - accuracy) * (HEIGHT - TOP - BOTTOM)


def _sheet(document: Mapping[str, Any], pictures: Mapping[str, bytes]) -> Iterator[str]:
    if not pictures:
        return
    yield "<h2>One image under every condition</h2>"
    yield f'<p class="sheet">{_picture(pictures.get("", b""), "unchanged")}</p>'
    levels = next(iter(document["operators"].values()))["severities"]
    rows = ["<tr><th></th>" + "".join(f"<th>severity {_text(level)}</th>" for level in levels) + "</tr>"]
    for name, described in document["operators"].items():
        cells = []
        for level, values in described["severities"].items():
            written = ", ".join(f"{argument} {value:g}" for argument, value in values.items())
            cells.append(f"<td>{_picture(pictures.get(f'@{name}:{level}', b''), f'{name} {level}: {written}')}</td>")
        rows.append(f"<tr><th>{_text(name)}</th>{''.join(cells)}</tr>")
    yield f'<div class="scroll"><table class="sheet">{"".join(rows)}</table></div>'


def _picture(png: bytes, title: str) -> str:
    if not png:
        return ""
    data = base64.b64encode(png).decode()
    return f'<img src="data:image/png;base64,{data}" alt="{_text(title)}" title="{_text(title)}">'


def _sources(document: Mapping[str, Any]) -> Iterator[str]:
    own = [name for name, each in document["operators"].items() if each["source"] != "ImageNet-C"]
    text = (
        "Operators and severities are those of the Common Corruptions benchmark, ImageNet-C (D. Hendrycks and "
        "T. Dietterich, ICLR 2019), carried out on the resized image that the model sees"
    )
    if own:
        text += f"; those of {', '.join(own)} are vitscore's own"
    yield f'<p class="note">{_text(text)}.</p>'


def _text(text: str) -> str:
    return html.escape(str(text), quote=True)
