"""Show the progress of a run on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from vitscore.text.console import duration_text, make_console

if TYPE_CHECKING:
    from vitscore.plan.plan import Plan
    from vitscore.run import progress


class Watcher:
    """Progress line of rank 0 on standard error: images/s, running accuracy, time left; silent if it is piped."""

    def __init__(self, *, is_shown: bool | None = None, tells_notes: bool = True) -> None:
        self._tells_notes = tells_notes
        self._console = make_console(is_error=True)
        self._is_shown = sys.stderr.isatty() if is_shown is None else is_shown
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def planned(self, plan: Plan, *, num_done: int) -> None:
        if num_done:
            self._print(f"resuming: {num_done:,} of {len(plan.shards):,} shards are done")
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
        """Print notes about the models on rank 0's standard error."""
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

    def _print(self, text: str) -> None:
        if self._is_shown:
            self._console.print(Text(text))


def progress_fraction(state: progress.Progress) -> float:
    """Return the finished share of the corpus: by bytes if sizes are known, else by shards."""
    if state.bytes_total:
        return min(1.0, state.bytes_done / state.bytes_total)
    return state.shards_done / max(state.shards_total, 1)


def left_text(state: progress.Progress, fraction: float) -> str:
    """Return `1:05 left`, extrapolated from the finished share and the time it took."""
    if not 0 < fraction < 1 or state.seconds < 2:
        return ""
    return f"{duration_text(state.seconds * (1 - fraction) / fraction)} left"
