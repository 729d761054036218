"""Notes below the models' table, in 80 columns: classes absent from the truth, groups, recounts."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

WIDTH = 80


def figure_notes(document: Mapping[str, Any]) -> list[str]:
    """Return the lines; none if every class is in the truth and nothing was grouped or recounted."""
    notes = [*_absent(document), *_groups(document), *_recount(document)]
    return [line for text in notes for line in textwrap.wrap(text, WIDTH, subsequent_indent="  ")]


def _absent(document: Mapping[str, Any]) -> Iterator[str]:
    num_classes = len(document["classes"])
    for name, model in document["models"].items():
        present, averages = model["num_classes_in_truth"], model["macro_in_truth"]
        if averages and present < num_classes:
            figures = " ".join(f"{100 * averages[key]:.1f}" for key in ("precision", "recall", "f1-score"))
            yield f"{name}: {present:,} of {num_classes:,} classes are in the truth; macro P R F1 over these: {figures}"


def _groups(document: Mapping[str, Any]) -> Iterator[str]:
    for name, model in document["models"].items():
        groups = model.get("groups")
        if groups and groups["report"]:
            low, high = groups["confidence_intervals"]["accuracy"]
            yield (
                f"{name}: {len(groups['classes']):,} groups: accuracy {100 * groups['accuracy']:.2f} "
                f"({100 * low:.1f}-{100 * high:.1f}), macro F1 {100 * groups['report']['macro avg']['f1-score']:.1f}"
            )


def _recount(document: Mapping[str, Any]) -> Iterator[str]:
    recount = document.get("recount")
    if not recount:
        return
    yield f"recounted: {recount['samples']:,} samples; nothing was written to the run"
    labels = recount.get("labels")
    if labels:
        text = f"labels: {labels['given']:,} given, {labels['found']:,} found, {labels['changed']:,} changed"
        if labels["of_bad_samples"]:
            text += f"; {labels['of_bad_samples']:,} of bad samples, which have no prediction"
        yield text
    unknown = [
        name
        for name, model in document["models"].items()
        if model["samples"] and model["nll"] is None and model["accuracy"] is not None
    ]
    if unknown:
        yield (
            f"no NLL and no Brier score for {', '.join(unknown)}: the parts lack the necessary probabilities "
            "(a run with --save logits has them)"
        )
