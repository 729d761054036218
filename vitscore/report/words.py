"""The report's sentences: headline, summary and warnings, as plain text.

The headline is the conclusion of comparing the two most accurate models. With one model it is its accuracy; without
labels it says that nothing could be measured.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from vitscore.metrics.notation import percent
from vitscore.metrics.pairs import conclusion
from vitscore.report.data import Findings


def counted(number: int, noun: str) -> str:
    """`1 image`, `2,000 images`, `3 classes`."""
    plural = f"{noun}es" if noun.endswith("s") else f"{noun}s"
    return f"{number:,} {noun if number == 1 else plural}"


def kicker(findings: Findings) -> str:
    """The line above the headline: program, data, date."""
    shards = findings.record.get("options", {}).get("shards") or []
    sessions = findings.record.get("sessions") or [{}]
    date = str(sessions[-1].get("ended") or sessions[-1].get("started") or "").partition("T")[0]
    names = [str(shards[0]).rstrip("/").rpartition("/")[2]] if len(shards) == 1 else []
    return " · ".join(["vitscore report", *names, *filter(None, [date])])


def headline(findings: Findings) -> tuple[str, str]:
    """The one-sentence conclusion, and its figures in brackets, which may be empty."""
    ledger = findings.document["ledger"]
    if not ledger["shards"]["done"]:
        return "No shard is done yet: there is nothing to report", ""
    if not ledger["expected"]:
        return "The shards hold no samples", ""
    if not ledger["scored"]:
        return f"None of the {counted(ledger['expected'], 'sample')} could be scored", ""
    if not findings.has_metrics:
        return f"No sample has a label: {counted(ledger['scored'], 'image')} predicted, nothing to measure them by", ""
    if (entry := leading_pair(findings)) is None:
        return one_model(findings)
    sentence = spoken(entry, findings)
    # Model names have no brackets, so the first bracket opens the figures.
    before, bracket, after = sentence.partition(" (")
    begins = before.startswith("no difference between")
    return (before[0].upper() + before[1:] if begins else before), (bracket + after).strip()


def leading_pair(findings: Findings) -> Mapping[str, Any] | None:
    """The comparison of the two most accurate models; None with one model."""
    best = set(findings.ranking[:2])
    return next((pair for pair in findings.document["comparisons"] if {pair["a"], pair["b"]} == best), None)


def spoken(entry: Mapping[str, Any], findings: Findings) -> str:
    """The conclusion for a pair; the p-value is corrected if several pairs are tested."""
    adjusted_p = findings.adjusted_p[list(findings.document["comparisons"]).index(entry)]
    said = conclusion({**entry, "mcnemar_p": adjusted_p})
    # Figures get a true minus sign; hyphens in names stay.
    return re.sub(r"(?<![\w.])-(?=\d)", "−", said)


def one_model(findings: Findings) -> tuple[str, str]:
    name = findings.ranking[0]
    model = findings.document["models"][name]
    low, high = model["confidence_intervals"]["accuracy"]
    right = f"{name} is right on {percent(model['accuracy'])}% of {counted(model['samples'], 'image')}"
    return right, f"(95% interval {percent(low)} to {percent(high)}%)"


def deck(findings: Findings) -> str:
    """The sentences below the headline: images, classes and models, and how the two best models differ."""
    ledger, entry = findings.document["ledger"], leading_pair(findings)
    classes = counted(len(findings.classes), "class")
    text = f"{counted(ledger['scored'], 'image')}, {classes}, {counted(len(findings.models), 'model')}."
    if entry is not None and entry["samples"]:
        text += (
            f" On {entry['both']:,} images both models are right, on {entry['only_a']:,} only {entry['a']}, "
            f"on {entry['only_b']:,} only {entry['b']}, on {entry['neither']:,} neither."
        )
    return text


def warnings(findings: Findings) -> list[str]:
    """Notes that affect how every figure is read."""
    ledger, shards = findings.document["ledger"], findings.document["ledger"]["shards"]
    said = []
    if shards["done"] < shards["expected"]:
        said.append(f"The run is not finished: {shards['done']:,} of {counted(shards['expected'], 'shard')} are done.")
    if shards["bad"]:
        bad = len(shards["bad"])
        be, their = ("is", "its") if bad == 1 else ("are", "their")
        said.append(f"{counted(bad, 'shard')} {be} bad; {their} readable samples are scored.")
    if ledger["bad"]:
        said.append(f"{counted(ledger['bad'], 'sample')} could not be scored; the reasons are in the ledger below.")
    if ledger["unlabelled"] and findings.has_metrics:
        said.append(f"{counted(ledger['unlabelled'], 'image')} without a label: predicted, but not measured.")
    if absent := absent_classes(findings):
        said.append(absent)
    return said + findings.thumbnails.notes


def absent_classes(findings: Findings) -> str:
    """A note on classes without images, which lower the macro averages; empty if there are none."""
    measured = [model for model in findings.document["models"].values() if model["samples"]]
    present = min((model["num_classes_in_truth"] for model in measured), default=0)
    total = len(findings.classes)
    if not measured or present == total:
        return ""
    return (
        f"Only {present:,} of {counted(total, 'class')} occur among the labels. Macro averages cover all {total:,}, as "
        "in scikit-learn; the table also has the macro F1 of the classes that occur."
    )
