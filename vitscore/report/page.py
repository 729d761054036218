"""The page: findings to HTML. Summary, models and confidence here; the rest in `comparison.py` and `record.py`.

Every text that comes from outside (class names, keys, paths, reasons) goes through `escape`, and the data for the
script through `script_json`. The page asks for nothing from anywhere, and its content policy forbids it to: images are
data URIs, the script is known by its hash.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from importlib import resources
from string import Template
from typing import Any

from vitscore import __version__
from vitscore.metrics.notation import percent
from vitscore.report import figures, words
from vitscore.report.comparison import comparison_section
from vitscore.report.data import Findings, payload
from vitscore.report.record import ledger_section, record_section, table

SCRIPTS = ("page.js", "table.js", "matrix.js", "gallery.js")
STYLES = ("page.css", "figure.css")


@dataclass(frozen=True)
class Row:
    """A line of the table of models."""

    title: str
    meaning: str
    value: Callable[[Mapping[str, Any]], float | None]
    interval: str = ""
    """Its name among `confidence_intervals`."""
    is_percent: bool = True
    is_low_best: bool = False


def average(kind: str, figure: str) -> Callable[[Mapping[str, Any]], float | None]:
    return lambda model: ((model.get("report") or {}).get(kind) or {}).get(figure)


def figure(name: str) -> Callable[[Mapping[str, Any]], float | None]:
    return lambda model: model.get(name)


def in_truth(model: Mapping[str, Any]) -> float | None:
    value: float | None = (model.get("macro_in_truth") or {}).get("f1-score")
    return value


def micro_f1(model: Mapping[str, Any]) -> float | None:
    value: float | None = (model.get("micro") or {}).get("f1-score")
    return value


AVERAGES = [
    Row("Macro F1", "every class counts the same", average("macro avg", "f1-score"), "macro_f1"),
    Row(
        "Macro precision",
        "of the answers of a class, how many are right",
        average("macro avg", "precision"),
        "macro_precision",
    ),
    Row("Macro recall", "of the images of a class, how many are found", average("macro avg", "recall"), "macro_recall"),
    Row("Weighted F1", "every image counts the same", average("weighted avg", "f1-score"), "weighted_f1"),
    Row("Weighted precision", "", average("weighted avg", "precision"), "weighted_precision"),
    Row("Micro F1", "over all answers", micro_f1),
    Row("Balanced accuracy", "mean recall of the classes that occur", figure("balanced_accuracy"), "balanced_accuracy"),
]
CHANCE = [
    Row("MCC", "correlation with the truth; 0 is chance, 1 perfect", figure("mcc"), "mcc", is_percent=False),
    Row("Cohen’s kappa", "agreement beyond chance", figure("cohen_kappa"), "cohen_kappa", is_percent=False),
]
PROBABILITIES = [
    Row("ECE", "gap between confidence and accuracy; lower is better", figure("ece"), is_low_best=True),
    Row(
        "NLL", "surprise at the true label, in nats; lower is better", figure("nll"), is_percent=False, is_low_best=True
    ),
    Row(
        "Brier score",
        "squared error of the probabilities, 0 to 2; lower is better",
        figure("brier"),
        is_percent=False,
        is_low_best=True,
    ),
]


def render(findings: Findings) -> str:
    """The whole page."""
    script = "(() => {\n'use strict';\n" + "\n".join(asset(name) for name in SCRIPTS) + "\n})();\n"
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    title, _ = words.headline(findings)
    sections = [section for section in make_sections(findings) if section[2]]
    contents = "".join(f'<li><a href="#{anchor}">{escape(name)}</a></li>' for anchor, name, _ in sections)
    return Template(asset("page.html")).substitute(
        policy=f"default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'",
        title=escape(title),
        style="\n".join(asset(name) for name in STYLES),
        kicker=escape(words.kicker(findings)),
        summary=summary(findings),
        contents=contents,
        sections="\n".join(
            f'<section id="{anchor}" aria-labelledby="{anchor}-title"><h2 id="{anchor}-title">{escape(name)}</h2>\n'
            f"{body}</section>"
            for anchor, name, body in sections
        ),
        data=script_json(payload(findings)),
        figure_style=script_json(asset("figure.css")),
        script=script,
        version=escape(__version__),
    )


@cache
def asset(name: str) -> str:
    return resources.files("vitscore.report").joinpath(name).read_text(encoding="utf-8")


def script_json(value: Any) -> str:
    """JSON that can stand inside a script element: no markup can begin or end in it."""
    dumped = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return re.sub("[<>&\u2028\u2029]", lambda found: f"\\u{ord(found[0]):04x}", dumped)


def make_sections(findings: Findings) -> list[tuple[str, str, str]]:
    """Anchor, heading and content; an empty content is left out."""
    is_measured = findings.has_metrics
    several = is_measured and bool(findings.document["comparisons"])
    return [
        ("models", "The models side by side", models_section(findings) if is_measured else ""),
        ("comparison", "Where they differ", comparison_section(findings) if several else ""),
        ("groups", "Groups of classes", groups_section(findings)),
        ("classes", "Class by class", asset("classes.html") if is_measured else ""),
        ("confusion", "What is taken for what", asset("confusion.html") if is_measured else ""),
        ("confidence", "How sure, and how often right", confidence_section(findings)),
        ("mistakes", "Confident mistakes", asset("mistakes.html") if findings.chosen.mistakes else ""),
        ("ledger", "Every sample accounted for", ledger_section(findings)),
        ("run", "How this was made", record_section(findings)),
    ]


def figure_html(name: str, drawn: str, caption: str, *, kind: str = "") -> str:
    """A figure that the page's script gives buttons to save it; `name` is the file's."""
    return f'<figure class="{kind}" data-save="{escape(name)}">{drawn}<figcaption>{caption}</figcaption></figure>'


def summary(findings: Findings) -> str:
    title, aside = words.headline(findings)
    below = f' <span class="aside">{escape(aside)}</span>' if aside else "."
    parts = [f"<h1>{unbroken(title, findings.models)}{below}</h1>"]
    parts.append(f'<p class="deck">{escape(words.deck(findings))}</p>')
    if said := words.warnings(findings):
        items = "".join(f"<li>{escape(note)}</li>" for note in said)
        parts.append(f'<aside class="notes" aria-label="Please note"><ul>{items}</ul></aside>')
    if findings.has_metrics:
        drawn = figures.accuracies(findings.document["models"])
        inner = figure_html("accuracy", drawn, "<b>Accuracy</b>, in percent, with 95% intervals (Wilson).")
        compared = [entry for entry in findings.document["comparisons"] if entry["samples"]]
        if compared:
            drawn = figures.differences(compared, findings.models)
            inner += figure_html(
                "difference",
                drawn,
                "<b>Difference of accuracy</b> on the same images, in points, with 95% intervals (Tango). An interval "
                "that holds zero shows no difference.",
            )
        parts.append(f'<div class="pair">{inner}</div>')
    return "\n".join(parts)


def unbroken(title: str, models: Sequence[str]) -> str:
    """A headline, escaped, in which no short name of a model is broken at its hyphens."""
    names = sorted((re.escape(name) for name in models if len(name) <= 20), key=len, reverse=True)
    pieces = re.split(f"({'|'.join(names)})", title) if names else [title]
    return "".join(f'<span class="whole">{p}</span>' if i % 2 else escape(p) for i, p in enumerate(pieces))


def models_section(findings: Findings) -> str:
    """Figures as rows, models as columns: on a phone the models stay beside each other."""
    models = findings.document["models"]
    heads = "".join(f'<th scope="col">{legend(index, name)}</th>' for index, name in enumerate(models))
    groups = [("Right answers", right_rows(findings)), ("Averages over the classes", average_rows(findings))]
    groups += [("Beyond chance", CHANCE), ("Probabilities", PROBABILITIES)]
    bodies = "".join(
        f'<tbody><tr class="group"><th scope="rowgroup" colspan="{len(models) + 1}">{title}</th></tr>'
        + "".join(model_row(row, models) for row in rows if is_known(row, models))
        + "</tbody>"
        for title, rows in groups
    )
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="Table of models"><table class="models">'
        "<caption>In percent where a % stands. Small: the 95% interval. Bold: the best value, which need not be better "
        "than chance would make it; the comparison says whether it is.</caption>"
        f"<thead><tr><td></td>{heads}</tr></thead>{bodies}{cost_rows(findings)}</table></div>"
    )


def right_rows(findings: Findings) -> list[Row]:
    ks = sorted({int(k) for model in findings.document["models"].values() for k in model["topk_accuracy"]} - {1})
    tops = [Row(f"Top-{k} accuracy", f"the label is among the {k} best", topk(k), f"topk:{k}") for k in ks]
    return [Row("Accuracy", "the first answer is right", figure("accuracy"), "accuracy"), *tops]


def topk(k: int) -> Callable[[Mapping[str, Any]], float | None]:
    return lambda model: model["topk_accuracy"].get(str(k))


def average_rows(findings: Findings) -> list[Row]:
    if not words.absent_classes(findings):
        return AVERAGES
    present = max(model["num_classes_in_truth"] for model in findings.document["models"].values())
    here = Row("Macro F1, classes that occur", f"over the {present:,} classes among the labels alone", in_truth)
    return [AVERAGES[0], here, *AVERAGES[1:]]


def is_known(row: Row, models: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether any model has this figure."""
    return any(row.value(model) is not None for model in models.values())


def model_row(row: Row, models: Mapping[str, Mapping[str, Any]]) -> str:
    values = [row.value(model) for model in models.values()]
    known = [value for value in values if value is not None]
    shown = [row_text(row, value) for value in values]
    best = row_text(row, (min if row.is_low_best else max)(known)) if len(known) > 1 else ""
    is_single = shown.count(best) == 1
    cells = ""
    for text, model in zip(shown, models.values(), strict=True):
        strong = f'<b>{text}<span class="hidden"> (best)</span></b>' if is_single and text == best else text
        cells += f"<td>{strong}{interval_html(row, model)}</td>"
    meaning = f"<small>{escape(row.meaning)}</small>" if row.meaning else ""
    return f'<tr><th scope="row">{escape(row.title)}{meaning}</th>{cells}</tr>'


def row_text(row: Row, value: float | None) -> str:
    if value is None:
        return "–"
    return f"{percent(value, 2)}%" if row.is_percent else f"{value:z.4f}".replace("-", "−")


def interval_html(row: Row, model: Mapping[str, Any]) -> str:
    intervals = model.get("confidence_intervals") or {}
    of_k = row.interval.removeprefix("topk:")
    found = (intervals.get("topk_accuracy") or {}).get(of_k) if of_k != row.interval else intervals.get(row.interval)
    if not found:
        return ""
    ends = [percent(end) if row.is_percent else f"{end:z.3f}".replace("-", "−") for end in found]
    return f"<small>{ends[0]} to {ends[1]}</small>"


def cost_rows(findings: Findings) -> str:
    """What a model costs, as far as run.json knows."""
    recorded = [findings.record.get("models", {}).get(name, {}) for name in findings.models]
    wanted = (
        ("parameters", "Parameters", "{:,.0f}"),
        ("gflop_per_image", "GFLOP per image", "{:,.2f}"),
        ("images_per_s", "Images per second", "{:,.0f}"),
    )
    rows = ""
    for key, title, form in wanted:
        values = [entry.get(key) for entry in recorded]
        if any(isinstance(value, int | float) for value in values):
            cells = "".join(f"<td>{form.format(v) if isinstance(v, int | float) else '–'}</td>" for v in values)
            rows += f'<tr><th scope="row">{title}</th>{cells}</tr>'
    head = f'<tr class="group"><th scope="rowgroup" colspan="{len(recorded) + 1}">Cost</th></tr>'
    return f"<tbody>{head}{rows}</tbody>" if rows else ""


def groups_section(findings: Findings) -> str:
    """Superclasses, where the run has them: an answer is right where it is of the label's group."""
    models = findings.document["models"]
    reports: dict[str, Any] = {name: (model.get("groups") or {}).get("report") for name, model in models.items()}
    reports = {name: found for name, found in reports.items() if found}
    if not reports:
        return ""
    names = next(models[name]["groups"]["classes"] for name in reports)
    rows = [
        (
            name,
            f"{next(iter(reports.values()))[name]['support']:,.0f}",
            *(f"{percent(found[name]['f1-score'])}%" for found in reports.values()),
        )
        for name in names
    ]
    caption = "An answer is right where it is of the label’s group."
    return table(caption, ("group", "images", *(f"F1 of {name}" for name in reports)), rows)


def legend(index: int, name: str) -> str:
    """A model's mark and name, as the diagrams show it."""
    mark = f'<svg class="plot key" viewBox="0 0 14 14" aria-hidden="true">{figures.marker(7, 7, index)}</svg>'
    return f"{mark}{escape(name)}"


def confidence_section(findings: Findings) -> str:
    """A pair of diagrams for each model."""
    body = ""
    for index, name in enumerate(findings.models):
        confidence = findings.chosen.confidence[name]
        total = int(confidence.right.sum() + confidence.wrong.sum() + confidence.unlabelled.sum())
        if not total:
            continue
        shown = ""
        model = findings.document["models"][name]
        if model["ece"] is not None:
            shown += figure_html(
                f"reliability-{name}",
                figures.reliability(model["reliability"], index, name),
                f"<b>Reliability.</b> On the dashed line, confidence is what it says. Mean gap (ECE): "
                f"{percent(model['ece'], 2)} points.{bins_table(model['reliability'])}",
            )
        shown += figure_html(
            f"confidence-{name}",
            figures.confidences(confidence, name),
            "<b>Confidence</b> of the first answer."
            + (" Each histogram has its own scale: mistakes are seen however few." if findings.has_metrics else ""),
        )
        body += f'<h3>{legend(index, name)}</h3><div class="pair">{shown}</div>'
    return body


def bins_table(bins: Mapping[str, Sequence[Any]]) -> str:
    rows = zip(bins["samples"], bins["confidence"], bins["accuracy"], strict=True)
    lines = "".join(
        f"<tr><td>{n:,}</td><td>{percent(confidence)}%</td><td>{percent(accuracy)}%</td></tr>"
        for n, confidence, accuracy in rows
        if n
    )
    heads = "".join(f'<th scope="col">{name}</th>' for name in ("answers", "mean confidence", "right"))
    head = f"<thead><tr>{heads}</tr></thead>"
    return f"<details><summary>The numbers</summary><table>{head}<tbody>{lines}</tbody></table></details>"
