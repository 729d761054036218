"""Tables and lines that show the results of a run on standard output, in 80 columns or the terminal's width."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vitscore.metrics.notation import percent
from vitscore.text.console import NARROW, cut

if TYPE_CHECKING:
    from vitscore.kernels.counts import Confusion
    from vitscore.run.bottleneck import Bottleneck
MOST_NOTES = 5


def models_table(document: Mapping[str, Any], *, width: int = NARROW) -> list[str]:
    """Return two header lines and a line per model: accuracy and its interval, top-5, macro and weighted P, R and F1.

    Figures are in percent; names that do not fit `width` are cut.
    """
    models = document["models"]
    top = widest_top_k(document)
    figures_head = f"{'accuracy (95% CI)':<20}{f'top-{top}' if top > 1 else '':>6}" + 2 * "     P     R    F1 "
    room = min(max(map(len, [*models, "model"])), max(width - len(figures_head) - 2, 12))
    lines = [f"{'':<{room + 28}}{'macro':^20}{'weighted':^18}".rstrip(), f"{'model':<{room}}  {figures_head}".rstrip()]
    for name, model in models.items():
        low, high = (model["confidence_intervals"] or {}).get("accuracy") or (None, None)
        accuracy = f"{percent(model['accuracy'], 2)} ({percent(low)}-{percent(high)})"
        top_k = percent((model["topk_accuracy"] or {}).get(str(top))) if top > 1 else ""
        averages = "".join(
            "".join(f"{percent(row.get(figure)):>6}" for figure in ("precision", "recall", "f1-score")) + " "
            for row in ((model["report"] or {}).get(average, {}) for average in ("macro avg", "weighted avg"))
        )
        lines.append(f"{cut(name, room):<{room}}  {accuracy:<20}{top_k:>6}{averages}".rstrip())
    return lines


def widest_top_k(document: Mapping[str, Any]) -> int:
    """Return the largest k among the models' top-k accuracies, at least 1."""
    ks = [int(k) for model in document["models"].values() for k in model["topk_accuracy"] or {}]
    return max(ks, default=1)


def class_table(document: Mapping[str, Any], name: str) -> Table:
    """Return a table of one model's precision, recall, F1 and support by class."""
    table = Table(box=None, pad_edge=False, padding=(0, 1), header_style="bold")
    table.add_column(name, overflow="fold")
    for column in ("precision", "recall", "F1", "support"):
        table.add_column(column, justify="right", no_wrap=True)
    report = document["models"][name]["report"]
    if report is None:
        return table
    for label in document["classes"]:
        row = report[label]
        figures = (percent(row[figure], 2) for figure in ("precision", "recall", "f1-score"))
        table.add_row(Text(label), *figures, f"{row['support']:,.0f}")
    return table


def ledger_line(document: Mapping[str, Any]) -> str:
    """Return the ledger as `500 samples: 498 scored, 2 bad (1 undecodable image, 1 no image); 4 of 4 shards`."""
    ledger = document["ledger"]
    text = f"{ledger['expected']:,} samples: {ledger['scored']:,} scored, {ledger['bad']:,} bad"
    if ledger["reasons"]:
        text += " (" + ", ".join(f"{count:,} {reason}" for reason, count in ledger["reasons"].items()) + ")"
    if ledger["unlabelled"]:
        text += f", {ledger['unlabelled']:,} without a label"
    return text + f"; {ledger['shards']['done']:,} of {ledger['shards']['expected']:,} shards"


def show_document(
    document: Mapping[str, Any],
    *,
    per_class: bool,
    console: Console,
    confusions: Mapping[str, Confusion] | None = None,
) -> None:
    """Print the models' table, the conclusions, pictures of the confusion matrices, and the ledger."""
    has_metrics = any(model["report"] is not None for model in document["models"].values())
    if not document["ledger"]["shards"]["done"]:
        console.print("No shard is finished yet, so there are no metrics.")
    elif has_metrics:
        groups, head, *rows = models_table(document, width=console.width)
        heading = (Text(groups, style="dim"), Text(head, style="bold"))
        console.print(*heading, *map(Text, rows), sep="\n", soft_wrap=True)
        show_sentences(conclusions(document), console)
        show_confusions(confusions or {}, document["classes"], console)
    else:
        console.print("No sample has a label: predictions are in the parts, but there are no metrics.")
    if per_class and has_metrics:
        for name in document["models"]:
            console.print()
            console.print(class_table(document, name))
    console.print(Text(ledger_line(document)))
    for shard, reason in document["ledger"]["shards"]["bad"].items():
        console.print(Text(f"bad shard {shard}: {reason}"))


def show_confusions(confusions: Mapping[str, Confusion], classes: Sequence[str], console: Console) -> None:
    """Print pictures of the confusion matrices between empty lines."""
    from vitscore.text.confusion import confusion_pictures

    is_unicode = console.encoding.lower().startswith("utf")
    lines = confusion_pictures(confusions, classes, width=console.width, is_unicode=is_unicode)
    if lines:
        console.print(*map(Text, [*lines, ""]), sep="\n", soft_wrap=True)


def show_sentences(sentences: Iterable[str], console: Console) -> None:
    for sentence in sentences:
        console.print(*map(Text, textwrap.wrap(f"{sentence}.", console.width)), sep="\n")


def show_notes(notes: Sequence[str], console: Console) -> None:
    """Print the first notes about the shards, and the number of further ones."""
    for note in notes[:MOST_NOTES]:
        console.print(Text(f"note: {note}"), soft_wrap=True)
    if len(notes) > MOST_NOTES:
        console.print(f"note: {len(notes) - MOST_NOTES:,} more; the parts' footers hold all of them")


def conclusions(document: Mapping[str, Any]) -> Iterable[str]:
    """Return one sentence per pair of models."""
    from vitscore.metrics.pairs import conclusion

    for comparison in document["comparisons"]:
        if comparison["samples"]:
            yield conclusion(comparison)


def bottleneck_line(bottleneck: Bottleneck) -> str:
    """Return a line that names the limiting stage, its share of the loop's time, and the change that would help."""
    return f"{bottleneck.stage}-bound ({100 * bottleneck.share:.0f}%): {bottleneck.advice}"


def show_written(folder: Path, document: Mapping[str, Any], console: Console) -> None:
    """Print the folder and the files of the run."""
    names = ["metrics.json", *(f"confusion_{name}.npz" for name in document["models"]), "parts/", "run.json"]
    if (folder / "report.html").exists():
        names.insert(0, "report.html")
    console.print(Text(f"written to {folder}: {', '.join(names)}"), soft_wrap=True)
