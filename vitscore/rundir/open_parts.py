"""Parts of the shards that are being scored: opened with a shard's first sample, committed with its last row.

A thread writes finished parts while the loop continues; a few parts may wait for the thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path

from vitscore.rundir.parts import Footer, ModelColumns, ShardRows, part_schema
from vitscore.system.durable import writing

MOST_WAITING = 4
"""Finished parts that may wait to be written."""


class OpenParts:
    """Gathers rows by shard and commits each shard's part once.

    Args:
        folder: the run's folder of parts.
        columns: the columns of each model.
        before_commit: called before each commit; raises if the run must stop.
        waiting: makes the context manager that surrounds waiting for a part to be written.
    """

    def __init__(
        self,
        folder: Path,
        columns: Sequence[ModelColumns],
        *,
        before_commit: Callable[[], None],
        waiting: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._folder = folder
        self._columns = columns
        self._schema = part_schema(columns)
        self._before_commit = before_commit
        self._waiting = waiting
        self._open: dict[int, ShardRows] = {}
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="writer")
        self._writes: deque[Future[Path]] = deque()
        self.num_written = 0

    def open(self, footer: Footer, keys: Sequence[str]) -> ShardRows:
        """Open the part of a shard; `keys` are the keys of all its rows."""
        rows = ShardRows(self._folder, self._schema, self._columns, footer, keys)
        self._open[footer.ordinal] = rows
        return rows

    def __getitem__(self, ordinal: int) -> ShardRows:
        """The open part of a shard, by the shard's ordinal."""
        return self._open[ordinal]

    def advance(self, ordinals: Iterable[int]) -> None:
        """Commit the parts that have all their rows; write full row groups of the other parts."""
        for ordinal in dict.fromkeys(ordinals):
            rows = self._open[ordinal]
            if rows.num_open:
                with writing(self._folder):
                    rows.flush_full_groups()
            else:
                del self._open[ordinal]
                self._commit(rows)

    def finish(self) -> None:
        """Wait until every committed part is on disk."""
        while self._writes:
            self._finish_write()

    def close(self) -> None:
        """Wait for the writer, and drop incomplete parts."""
        self._writer.shutdown(wait=True)
        for rows in self._open.values():
            rows.discard()

    def _commit(self, rows: ShardRows) -> None:
        self._before_commit()
        self._writes.append(self._writer.submit(rows.commit))
        while len(self._writes) > MOST_WAITING or (self._writes and self._writes[0].done()):
            self._finish_write()

    def _finish_write(self) -> None:
        with writing(self._folder), self._waiting():
            self._writes.popleft().result()
        self.num_written += 1
