"""What people see in a terminal: the progress line, the table of models, the plan of a dry run.

Results go to standard output and fit 80 columns; progress goes to standard error, and only where that is a terminal.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from vitscore.augment import operators
from vitscore.config import VIEWS

if TYPE_CHECKING:
    from vitscore import progress
    from vitscore.bottleneck import Bottleneck
    from vitscore.kernels.counts import Confusion
    from vitscore.prepare import Plan

NARROW = 80
MOST_NOTES = 5


def make_console(*, is_error: bool = False) -> Console:
    """A console as wide as the terminal, or 80 columns where the output is piped.

    It looks its stream up each time it writes: the decoder changes `sys.stderr` while it is at work.
    """
    stream = sys.stderr if is_error else sys.stdout
    return Console(
        stderr=is_error, width=None if stream.isatty() else NARROW, highlight=False, markup=False, emoji=False
    )


def percent(value: float | None, digits: int = 2) -> str:
    """A fraction as a percentage; an undefined one as a dash."""
    return "-" if value is None else f"{100 * value:.{digits}f}"


def models_table(document: Mapping[str, Any], *, width: int = NARROW) -> list[str]:
    """The models side by side, in percent: accuracy with its interval, top-5, macro and weighted P, R, F1.

    Two lines of heading, then a line a model; a name is cut where `width` leaves it no room.
    """
    models = document["models"]
    top = widest_top_k(document)
    figures_head = f"{'accuracy (95% CI)':<20}{f'top-{top}' if top > 1 else '':>6}" + 2 * "     P     R    F1 "
    room = min(max(map(len, [*models, "model"])), max(width - len(figures_head) - 2, 12))
    lines = [f"{'':<{room + 28}}{'macro':^20}{'weighted':^18}".rstrip(), f"{'model':<{room}}  {figures_head}".rstrip()]
    for name, model in models.items():
        low, high = (model["confidence_intervals"] or {}).get("accuracy") or (None, None)
        accuracy = f"{percent(model['accuracy'])} ({percent(low, 1)}-{percent(high, 1)})"
        top_k = percent((model["topk_accuracy"] or {}).get(str(top)), 1) if top > 1 else ""
        averages = "".join(
            "".join(f"{percent(row.get(figure), 1):>6}" for figure in ("precision", "recall", "f1-score")) + " "
            for row in ((model["report"] or {}).get(average, {}) for average in ("macro avg", "weighted avg"))
        )
        lines.append(f"{cut(name, room):<{room}}  {accuracy:<20}{top_k:>6}{averages}".rstrip())
    return lines


def cut(text: str, room: int) -> str:
    """`text`, its end left out where it is longer than `room`."""
    return text if len(text) <= room else text[: room - 1] + "…"


def widest_top_k(document: Mapping[str, Any]) -> int:
    """The largest k that every model's top-k accuracy has."""
    ks = [int(k) for model in document["models"].values() for k in model["topk_accuracy"] or {}]
    return max(ks, default=1)


def class_table(document: Mapping[str, Any], name: str) -> Table:
    """One model's precision, recall, F1 and support, class by class."""
    table = Table(box=None, pad_edge=False, padding=(0, 1), header_style="bold")
    table.add_column(name, overflow="fold")
    for column in ("precision", "recall", "F1", "support"):
        table.add_column(column, justify="right", no_wrap=True)
    report = document["models"][name]["report"]
    if report is None:
        return table
    for label in document["classes"]:
        row = report[label]
        figures = (percent(row[figure]) for figure in ("precision", "recall", "f1-score"))
        table.add_row(Text(label), *figures, f"{row['support']:,.0f}")
    return table


def ledger_line(document: Mapping[str, Any]) -> str:
    """`500 samples: 498 scored, 2 bad (1 undecodable image, 1 no image); 4 of 4 shards`."""
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
    """The table, the comparisons in words, small pictures of the confusion matrices, the ledger."""
    has_metrics = any(model["report"] is not None for model in document["models"].values())
    if not document["ledger"]["shards"]["done"]:
        console.print("No part is done yet: there is nothing to measure.")
    elif has_metrics:
        groups, head, *rows = models_table(document, width=console.width)
        heading = (Text(groups, style="dim"), Text(head, style="bold"))
        console.print(*heading, *map(Text, rows), sep="\n", soft_wrap=True)
        show_sentences(conclusions(document), console)
        show_confusions(confusions or {}, document["classes"], console)
    else:
        console.print("No sample has a label: predictions are in the parts, there is nothing to measure them by.")
    if per_class and has_metrics:
        for name in document["models"]:
            console.print()
            console.print(class_table(document, name))
    console.print(Text(ledger_line(document)))
    for shard, reason in document["ledger"]["shards"]["bad"].items():
        console.print(Text(f"bad shard {shard}: {reason}"))


def show_confusions(confusions: Mapping[str, Confusion], classes: Sequence[str], console: Console) -> None:
    """Small pictures of the confusion matrices, set off by empty lines."""
    from vitscore.confusion_text import confusion_pictures

    is_unicode = console.encoding.lower().startswith("utf")
    lines = confusion_pictures(confusions, classes, width=console.width, is_unicode=is_unicode)
    if lines:
        console.print(*map(Text, [*lines, ""]), sep="\n", soft_wrap=True)


def show_sentences(sentences: Iterable[str], console: Console) -> None:
    for sentence in sentences:
        console.print(*map(Text, textwrap.wrap(f"{sentence}.", console.width)), sep="\n")


def show_notes(notes: Sequence[str], console: Console) -> None:
    """What is odd about the shards; the first few, and how many more."""
    for note in notes[:MOST_NOTES]:
        console.print(Text(f"note: {note}"), soft_wrap=True)
    if len(notes) > MOST_NOTES:
        console.print(f"note: {len(notes) - MOST_NOTES:,} more; each part's footer has its own")


def conclusions(document: Mapping[str, Any]) -> Iterable[str]:
    """One sentence a pair of models."""
    from vitscore.metrics.pairs import conclusion

    for comparison in document["comparisons"]:
        if comparison["samples"]:
            yield conclusion(comparison)


def bottleneck_line(found: Bottleneck) -> str:
    """What limits the run, its share of the loop's time, and what to change: one line below the rate."""
    return f"{found.stage}-bound ({100 * found.share:.0f}%): {found.advice}"


def show_written(folder: Path, document: Mapping[str, Any], console: Console) -> None:
    """Where everything is."""
    names = ["metrics.json", *(f"confusion_{name}.npz" for name in document["models"]), "parts/", "run.json"]
    if (folder / "report.html").exists():
        names.insert(0, "report.html")
    console.print(Text(f"written to {folder}: {', '.join(names)}"), soft_wrap=True)


def show_plan(plan: Plan, disk_bytes: int | None, console: Console) -> None:
    """What a run would do: shards, classes and their matching, every automatic choice with its reason, disk."""
    sizes = [shard.num_bytes for shard in plan.shards]
    known = sum(size or 0 for size in sizes)
    unknown = " and shards of unknown size" if None in sizes else ""
    console.print(f"shards   {len(plan.shards):,}, {size_text(known)}{unknown}")
    for shard in [*plan.shards[:3], *plan.shards[max(3, len(plan.shards) - 1) :]]:
        size = "size unknown" if shard.num_bytes is None else size_text(shard.num_bytes)
        console.print(Text(f"         {shard.ordinal:>7}  {shard.name}  {size}"), soft_wrap=True)
    if plan.last_rows is not None:
        console.print(f"limit    {plan.options.limit:,} samples: {plan.last_rows:,} of the last shard listed")
    more = " ..." if len(plan.classes) > 5 else ""
    names = ", ".join(plan.classes[:5]) + more
    console.print(f"classes  {len(plan.classes):,}, from {plan.classes_source}: {names}", soft_wrap=True)
    for model in plan.models:
        matching = model.head.summary if model.head else f"zero-shot, {len(plan.templates)} templates"
        console.print(Text(f"model    {model.name} ({model.checkpoint.kind}): {matching}"), soft_wrap=True)
    for name, choice in plan.settings.items():
        console.print(Text(f"choice   {name} = {choice.value}: {choice.reason}"), soft_wrap=True)
    for text in plan.options.augment:
        console.print(Text(f"augment  {operators.parse(text)}, on the resized image"), soft_wrap=True)
    if plan.options.tta != "none":
        console.print(f"tta      {plan.options.tta}{views_text(plan)}")
    about = "unknown" if disk_bytes is None else f"about {size_text(disk_bytes)}"
    console.print(f"disk     {about} for the parts in {plan.options.output}", soft_wrap=True)
    console.print("dry run: nothing was written, nothing was scored")


def views_text(plan: Plan) -> str:
    """What `--tta` costs."""
    forwards = VIEWS[plan.options.tta]
    return f", {forwards} forwards an image each" if forwards > 1 else ""


def size_text(num_bytes: float) -> str:
    """Bytes in the unit that leaves one to three digits."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if num_bytes < 1000 or unit == "TB":
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    raise AssertionError


class Watcher:
    """Rank 0's progress line on standard error: images/s, running accuracy, time left; silent where it is piped."""

    def __init__(self, *, is_shown: bool | None = None, tells_notes: bool = True) -> None:
        self._tells_notes = tells_notes
        self._console = make_console(is_error=True)
        self._is_shown = sys.stderr.isatty() if is_shown is None else is_shown
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def planned(self, plan: Plan, *, num_done: int) -> None:
        if num_done:
            self._say(f"going on: {num_done:,} of {len(plan.shards):,} shards are done")
        if not self._is_shown or num_done == len(plan.shards):
            return
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TextColumn("{task.fields[rate]}"),
            TextColumn("{task.fields[accuracy]}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=self._console,
            transient=True,
            expand=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._task = self._progress.add_task("loading", total=None, rate="", accuracy="", left="")
        self._progress.start()

    def loaded(self, notes: Sequence[str]) -> None:
        """Say, on rank 0's standard error, what a user should know of the models."""
        if self._tells_notes:
            for note in notes:
                self._console.print(Text(f"note: {note}"), soft_wrap=True)

    def progressed(self, state: progress.Progress) -> None:
        if self._progress is None or self._task is None:
            return
        rate = (state.images - state.images_at_start) / state.seconds if state.seconds else None
        fraction = progress_fraction(state)
        shown = [f"{name} {100 * value:.1f}%" for name, value in state.accuracy.items() if value is not None]
        self._progress.update(
            self._task,
            description="scoring",
            total=1.0,
            completed=fraction,
            rate=f"{rate:,.0f} img/s" if rate else "",
            accuracy=" ".join(shown[:2]),
            left=left_text(state, fraction),
        )

    def waiting(self, num_ranks: int) -> None:
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, description=f"waiting for {num_ranks} rank(s)", left="")

    def finished(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _say(self, text: str) -> None:
        if self._is_shown:
            self._console.print(Text(text))


def progress_fraction(state: progress.Progress) -> float:
    """The share of the corpus that is done, by bytes where sizes are known, else by shards."""
    if state.bytes_total:
        return min(1.0, state.bytes_done / state.bytes_total)
    return state.shards_done / max(state.shards_total, 1)


def left_text(state: progress.Progress, fraction: float) -> str:
    """`1:05 left`, from the share that is done and the time that took."""
    if not 0 < fraction < 1 or state.seconds < 2:
        return ""
    return f"{duration_text(state.seconds * (1 - fraction) / fraction)} left"


def duration_text(seconds: float | None) -> str:
    """`1:05`, `2:00:00`; unknown where it is None."""
    if seconds is None:
        return "unknown"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
