"""The page: lay out the findings with the templates.

The modules beside this one compute each section's values; `templates/ANCHOR.html` lays the section out. The page asks
for nothing from anywhere, and its content policy forbids it to: images are data URIs, the script is known by its hash.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from vitscore.metrics.notation import percent
from vitscore.report import figures, record, words
from vitscore.report.comparison import comparisons
from vitscore.report.confidence import confidences
from vitscore.report.data import Findings, payload
from vitscore.report.models_table import models_table
from vitscore.report.svg import key
from vitscore.report.templating import assets, fill
from vitscore.system.machine import versions

SCRIPTS = ("page.js", "table.js", "matrix.js", "gallery.js")
STYLES = ("page.css", "figure.css")
SCOPE = Markup("(() => {\n'use strict';\n%s\n})();\n")


def render(findings: Findings) -> str:
    """The whole page."""
    title, aside = words.headline(findings)
    compared = [entry for entry in findings.document["comparisons"] if entry["samples"]]
    has_metrics = findings.has_metrics
    script = SCOPE % assets(*SCRIPTS)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return fill(
        "page.html",
        policy=f"default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'",
        style=assets(*STYLES),
        kicker=words.kicker(findings),
        title=title,
        pieces=pieces(title, findings.models),
        aside=aside,
        deck=words.deck(findings),
        warnings=words.warnings(findings),
        accuracies=figures.accuracies(findings.document["models"]) if has_metrics else None,
        differences=figures.differences(compared, findings.models) if has_metrics and compared else None,
        sections=[section for section in make_sections(findings) if section[2]],
        findings=findings,
        key=key,
        data=payload(findings),
        figure_style=assets("figure.css"),
        script=script,
        version=versions()["vitscore"],
    )


def pieces(title: str, models: Sequence[str]) -> list[tuple[str, bool]]:
    """A headline in pieces: the short names of models, which no line may break at a hyphen, and the text between."""
    names = sorted((re.escape(name) for name in models if len(name) <= 20), key=len, reverse=True)
    split = re.split(f"({'|'.join(names)})", title) if names else [title]
    return [(piece, index % 2 == 1) for index, piece in enumerate(split)]


def make_sections(findings: Findings) -> list[tuple[str, str, Any]]:
    """Each section's anchor, which also names its template, heading and content; without content it is left out."""
    is_measured = findings.has_metrics
    several = is_measured and bool(findings.document["comparisons"])
    return [
        ("models", "The models side by side", is_measured and models_table(findings)),
        ("comparison", "Where they differ", several and comparisons(findings)),
        ("groups", "Groups of classes", groups(findings)),
        ("classes", "Class by class", is_measured),
        ("confusion", "What is taken for what", is_measured),
        ("confidence", "How sure, and how often right", confidences(findings)),
        ("mistakes", "Confident mistakes", bool(findings.chosen.mistakes)),
        ("ledger", "Every sample accounted for", record.ledger(findings)),
        ("run", "How this was made", record.record(findings)),
    ]


def groups(findings: Findings) -> record.Table | None:
    """Superclasses, where the run has them: an answer is right where it is of the label's group."""
    models = findings.document["models"]
    grouped = {name: model["groups"] for name, model in models.items() if (model.get("groups") or {}).get("report")}
    if not grouped:
        return None
    rows = []
    for group in next(iter(grouped.values()))["classes"]:
        reports = [of_model["report"][group] for of_model in grouped.values()]
        f1_scores = [f"{percent(report['f1-score'])}%" for report in reports]
        rows.append((group, f"{reports[0]['support']:,.0f}", *f1_scores))
    heads = ("group", "images", *(f"F1 of {name}" for name in grouped))
    return record.Table("An answer is right where it is of the label’s group.", heads, rows)
