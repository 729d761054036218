"""How sure each model is, and how often it is right: a pair of figures a model."""

from __future__ import annotations

from dataclasses import dataclass

from vitscore.report import figures
from vitscore.report.data import Findings
from vitscore.report.svg import Element


@dataclass(frozen=True)
class ModelConfidence:
    """One model's figures; without labels there is no reliability, no mean gap (ECE) and no bin."""

    name: str
    index: int
    histograms: Element
    ece: float | None
    bins: list[figures.Bin]
    reliability: Element | None


def confidences(findings: Findings) -> list[ModelConfidence]:
    """The figures of every model that gave an answer."""
    shown = []
    for index, name in enumerate(findings.models):
        confidence, model = findings.chosen.confidence[name], findings.document["models"][name]
        if confidence.total:
            bins = [] if model["ece"] is None else figures.filled_bins(model["reliability"])
            drawn = None if model["ece"] is None else figures.reliability(bins, index, name)
            histograms = figures.confidences(confidence, name)
            shown.append(ModelConfidence(name, index, histograms, model["ece"], bins, drawn))
    return shown
