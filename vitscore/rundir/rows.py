"""Rows of a part as arrays, one block at a time, for fold, comparison and export.

Only the requested columns are read. A bad row, which has no predictions, has -1 for ids and NaN for figures.
Axes: B rows, T the k of top-k, K classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vitscore.errors import LedgerError

ROWS_AT_ONCE = 65_536
LOGIT_ROWS_AT_ONCE = 2_048
"""Used if logits are read, to limit a block to 2,048 * K * 4 bytes for each model."""
LEDGER_COLUMNS = ("key", "shard", "label", "status", "reason")
COUNTED_COLUMNS = ("pred", "prob", "topk", "label_logprob", "sum_sq_prob")
"""The columns of a model that its metrics are counted from."""

Array: TypeAlias = npt.NDArray[Any]


@dataclass(frozen=True)
class ModelRows:
    """One model's columns; a column that was not read is None."""

    pred: Array
    """int32; -1 for a bad row."""
    prob: Array | None = None
    topk: Array | None = None
    """int32 (B, T); -1 for a bad row. Also None if all rows of the block are bad."""
    topk_prob: Array | None = None
    label_logprob: Array | None = None
    sum_sq_prob: Array | None = None
    logits: Array | None = None

    def take(self, chosen_B: Array) -> ModelRows:
        """Select rows by a mask or by their numbers."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        taken: dict[str, Any] = {name: None if value is None else value[chosen_B] for name, value in values.items()}
        return ModelRows(**taken)


@dataclass(frozen=True)
class Rows:
    """A block of rows of one part, in shard order."""

    keys: pa.Array
    shards: pa.Array
    labels_B: Array
    """-1 for no label."""
    is_bad_B: Array
    reasons: pa.Array
    models: dict[str, ModelRows]

    def __len__(self) -> int:
        return len(self.labels_B)

    def take(self, chosen_B: Array) -> Rows:
        """Select rows by a mask."""
        mask = pa.array(chosen_B)
        return Rows(
            self.keys.filter(mask),
            self.shards.filter(mask),
            self.labels_B[chosen_B],
            self.is_bad_B[chosen_B],
            self.reasons.filter(mask),
            {name: rows.take(chosen_B) for name, rows in self.models.items()},
        )


def read_rows(path: Path, models: Sequence[str], *, figures: Sequence[str] = COUNTED_COLUMNS) -> Iterator[Rows]:
    """Yield the rows of the part at `path`, block by block.

    Raises:
        LedgerError: the part cannot be read, or lacks a column.
    """
    columns = [*LEDGER_COLUMNS, *(f"{name}.{figure}" for name in models for figure in figures)]
    size = LOGIT_ROWS_AT_ONCE if "logits" in figures else ROWS_AT_ONCE
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            for batch in file.iter_batches(batch_size=size, columns=columns):
                yield Rows(
                    batch["key"],
                    batch["shard"],
                    batch["label"].to_numpy(),
                    pc.not_equal(batch["status"], "ok").to_numpy(zero_copy_only=False),
                    batch["reason"],
                    {name: _model_rows(batch, name, figures) for name in models},
                )
    except (OSError, KeyError, pa.ArrowException) as error:
        again = "Remove it and run the same command again, which scores the shard anew."
        raise LedgerError("part cannot be read", where=str(path), got=str(error), next_step=again) from None


def _model_rows(batch: pa.RecordBatch, name: str, figures: Sequence[str]) -> ModelRows:
    values: dict[str, Any] = {}
    for figure in figures:
        column = batch[f"{name}.{figure}"]
        if pa.types.is_list(column.type):
            values[figure] = _table(column)
        else:
            fill = -1 if pa.types.is_integer(column.type) else float("nan")
            values[figure] = column.fill_null(fill).to_numpy()
    return ModelRows(**values)


def _table(column: pa.ListArray) -> Array | None:
    """Convert a column of equally long lists to a table, with -1 or NaN for null rows; None if every row is null."""
    flat = column.flatten().to_numpy()
    num_rows, num_null = len(column), column.null_count
    if num_rows == num_null:
        return None
    table_BT: Array = flat.reshape(num_rows - num_null, -1)
    if num_null:
        fill = -1 if table_BT.dtype.kind == "i" else np.nan
        whole_BT = np.full((num_rows, table_BT.shape[1]), fill, table_BT.dtype)
        whole_BT[column.is_valid().to_numpy(zero_copy_only=False)] = table_BT
        return whole_BT
    return table_BT
