"""Lines that `vitscore compare` prints below the models' table: small tables and sentences, in 80 columns.

They are made from the document of `results.compare`, without a terminal.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from vitscore.text.console import cut

WIDTH = 80
CLASSES_SHOWN = 5


def comparison_lines(document: Mapping[str, Any], *, rows_shown: int) -> list[str]:
    """Return the comparison, pair by pair, and its conclusion.

    Args:
        document: the result of `compare_runs`.
        rows_shown: how many disagreements to list for every pair.
    """
    joined = document["joined"]
    lines = [f"{document['samples']:,} common samples with a label and an answer from every model"]
    for run in document["runs"]:
        shards = run["shards"]
        if shards["done"] < shards["expected"]:
            lines.append(f"  {run['run']} is not finished: {shards['done']:,} of {shards['expected']:,} shards")
        if run["not_common"]:
            lines.append(f"  {run['not_common']:,} of {run['samples']:,} samples of {run['run']} are not in every run")
    for count, why in (
        (joined["without_answer"], "lack an answer from some model (bad samples)"),
        (joined["unlabelled"], "have no label"),
        (joined["by_key_alone"], "were matched by key alone"),
    ):
        if count:
            lines.append(f"  {count:,} {why}")
    lines += cost_lines(document["models"])
    for entry in document["comparisons"]:
        lines += ["", *pair_lines(entry, document["classes"], rows_shown=rows_shown)]
    if len(document["comparisons"]) > 1:
        lines += ["", *textwrap.wrap(f"{document['conclusion']}.", WIDTH)]
    return lines


def cost_lines(models: Mapping[str, Any]) -> list[str]:
    """Return a line with the recorded cost of every model that has one."""
    lines = []
    for name, model in models.items():
        cost = model["cost"]
        figures = [
            f"{cost['parameters'] / 1e6:,.1f} M parameters" if cost["parameters"] else "",
            f"{cost['gflop_per_image']:,.2f} GFLOP per image" if cost["gflop_per_image"] else "",
            f"{cost['images_per_s']:,.0f} images/s ({cost['models_in_run']} model(s) in that run)"
            if cost["images_per_s"]
            else "",
        ]
        if any(figures):
            lines.append(f"  {name}: {', '.join(filter(None, figures))}")
    return lines


def pair_lines(entry: Mapping[str, Any], classes: Sequence[str], *, rows_shown: int) -> list[str]:
    """Return one pair's table of agreement, differences, most different classes and disagreements, and conclusion."""
    a, b = entry["a"], entry["b"]
    if not entry["samples"]:
        return textwrap.wrap(f"{entry['conclusion']}.", WIDTH)
    left, right = (min(max(len(name) + 6, 12), 30) for name in (a, b))
    heads = [cut(name, 24) for name in (a, b)]
    lines = [
        f"{'':<{left}}  {heads[1] + ' right':>{right}}  {heads[1] + ' wrong':>{right}}",
        f"{heads[0] + ' right':<{left}}  {entry['both']:>{right},}  {entry['only_a']:>{right},}",
        f"{heads[0] + ' wrong':<{left}}  {entry['only_b']:>{right},}  {entry['neither']:>{right},}",
        f"same answer on {100 * entry['agreement']:.1f}% of them",
        f"accuracy {_difference(entry, 'accuracy')}, {_test(entry)}",
        f"macro F1 {_difference(entry, 'macro_f1')}",
    ]
    differing = [row for row in entry["per_class"] if row["f1_difference"]][:CLASSES_SHOWN]
    if differing:
        lines.append("classes that differ most: F1 of both, samples that only one has right, p by Holm")
    for row in differing:
        f1_a, f1_b = (f"{100 * value:.1f}" for value in row["f1"])
        alone = f"{row['only_a']}:{row['only_b']}"
        lines.append(
            f"  {cut(row['class'], 34):<34} {f1_a:>6} {f1_b:>6}  {alone:>9}  p {_p_text(row['mcnemar_p_holm'])}"
        )
    if entry["disagreements"]:
        lines.append(f"most confident disagreements (label; {a}; {b}):")
    for row in entry["disagreements"][:rows_shown]:
        answers = "; ".join(
            f"{_class_name(classes, pred)} {prob:.2f}" for pred, prob in zip(row["preds"], row["probs"], strict=True)
        )
        lines.append(f"  {row['key']}: {_class_name(classes, row['label'])}; {answers}")
    return [*lines, *textwrap.wrap(f"{entry['conclusion']}.", WIDTH)]


def _class_name(classes: Sequence[str], class_id: int) -> str:
    return classes[class_id] if class_id < len(classes) else "no answer"


def _test(entry: Mapping[str, Any]) -> str:
    p, corrected = entry["mcnemar_p"], entry["mcnemar_p_holm"]
    return f"McNemar p {_p_text(p)}" + (f", {_p_text(corrected)} by Holm" if corrected != p else "")


def _p_text(p: float) -> str:
    return f"{p:.2g}" if p else "< 1e-300"


def _difference(entry: Mapping[str, Any], figure: str) -> str:
    low, high = entry[f"{figure}_difference_ci"]
    return f"{100 * entry[f'{figure}_difference']:+.1f} points (95% interval {100 * low:+.1f} to {100 * high:+.1f})"
