"""Where models differ: a sentence and a line of figures for each pair, on the same images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vitscore.report import words
from vitscore.report.data import Findings


@dataclass(frozen=True)
class Comparisons:
    """The pairs of models; with one pair its sentence is the headline already, and p needs no correction."""

    pairs: list[tuple[Mapping[str, Any], list[str]]]
    """Entries of metrics.json, each with its p-values as shown."""
    gaps: dict[str, str]
    """Titles of the differences shown, by their key in metrics.json."""
    sentences: list[str]


def comparisons(findings: Findings) -> Comparisons:
    entries = list(findings.document["comparisons"])
    is_corrected = len(entries) > 1
    gaps = {"accuracy_difference": "accuracy"}
    if any(entry.get("macro_f1_difference_ci") for entry in entries):
        gaps["macro_f1_difference"] = "macro F1"
    pairs = []
    for entry, adjusted_p in zip(entries, findings.adjusted_p, strict=True):
        tested = [entry["mcnemar_p"], adjusted_p] if is_corrected else [entry["mcnemar_p"]]
        pairs.append((entry, [p_text(p) for p in tested]))
    return Comparisons(pairs, gaps, [sentence(entry, findings) for entry in entries] if is_corrected else [])


def sentence(entry: Mapping[str, Any], findings: Findings) -> str:
    said = words.spoken(entry, findings)
    return f"{said[0].upper() + said[1:] if said.startswith('no ') else said}."


def p_text(p: float | None) -> str:
    if p is None:
        return "–"
    return "< 0.0001" if p < 1e-4 else f"{p:.{4 if p < 0.1 else 2}f}"
