"""The page's section on where models differ: a sentence and a line of figures for each pair, on the same images."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from vitscore.metrics.notation import percent
from vitscore.report import words
from vitscore.report.data import Findings


def comparison_section(findings: Findings) -> str:
    entries = list(findings.document["comparisons"])
    is_corrected, has_macro = len(entries) > 1, any(entry.get("macro_f1_difference_ci") for entry in entries)
    # With one pair its sentence is the headline already.
    said = "".join(f"<li>{escape(sentence(entry, findings))}</li>" for entry in entries) if is_corrected else ""
    rows = ""
    for entry, adjusted_p in zip(entries, findings.adjusted_p, strict=True):
        cells = [*count_cells(entry), gap_cell(entry, "accuracy_difference")]
        cells += [gap_cell(entry, "macro_f1_difference")] if has_macro else []
        cells += [p_text(entry["mcnemar_p"]), *([p_text(adjusted_p)] if is_corrected else [])]
        name = f"{escape(entry['a'])} and {escape(entry['b'])}"
        rows += f'<tr><th scope="row">{name}</th>' + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
    return (
        (f'<ul class="said">{said}</ul>' if said else "")
        + '<div class="scroll" tabindex="0" role="region" aria-label="Table of comparisons"><table>'
        "<caption>How often each model is right where the other is not, on the same images.</caption>"
        f"<thead><tr>{heads(entries, has_macro=has_macro, is_corrected=is_corrected)}</tr></thead>"
        f'<tbody>{rows}</tbody></table></div><div id="disagreements"></div>'
    )


def sentence(entry: Mapping[str, Any], findings: Findings) -> str:
    said = words.spoken(entry, findings)
    return f"{said[0].upper() + said[1:] if said.startswith('no ') else said}."


def heads(entries: list[Mapping[str, Any]], *, has_macro: bool, is_corrected: bool) -> str:
    first, second = (entries[0]["a"], entries[0]["b"]) if len(entries) == 1 else ("the first", "the second")
    titles = ["models", "both right", f"only {escape(first)}", f"only {escape(second)}", "neither", "same answer"]
    titles.append("accuracy<small>difference in points, 95% interval</small>")
    titles += ["macro F1<small>difference in points, 95% interval</small>"] if has_macro else []
    titles += ["p<small>McNemar, exact</small>", *(["p, corrected<small>Holm</small>"] if is_corrected else [])]
    return "".join(f'<th scope="col">{title}</th>' for title in titles)


def count_cells(entry: Mapping[str, Any]) -> list[str]:
    """The four counts with their shares, and how often both give the same answer."""
    n = entry["samples"]
    cells = [
        f"{entry[key]:,}{f'<small>{percent(entry[key] / n)}%</small>' if n else ''}"
        for key in ("both", "only_a", "only_b", "neither")
    ]
    return [*cells, "–" if entry["agreement"] is None else f"{percent(entry['agreement'])}%"]


def gap_cell(entry: Mapping[str, Any], figure: str) -> str:
    interval = entry.get(f"{figure}_ci")
    if not interval:
        return "–"
    return f"{percent(entry[figure])}<small>{percent(interval[0])} to {percent(interval[1])}</small>"


def p_text(p: float | None) -> str:
    if p is None:
        return "–"
    return "&lt; 0.0001" if p < 1e-4 else f"{p:.{4 if p < 0.1 else 2}f}"
