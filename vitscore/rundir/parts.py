"""Parts: one Parquet file for each shard. They are the only record of a run's results.

Predictions arrive in batches, and a batch may hold rows of several shards. A `ShardRows` gathers the rows of one shard.
Once every row is known, the part is written under a temporary name, flushed to disk and renamed; a shard is done when
its part has its final name. Long outputs (logits, embeddings) are written to the temporary file in row groups of a
fixed number of rows, so that memory does not grow with the shard and the file does not depend on the batches.

This module depends on neither models nor metrics; `rundir.rows` reads the parts.
"""

from __future__ import annotations

import contextlib
import json
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vitscore.errors import LedgerError
from vitscore.system.durable import NewFile

if TYPE_CHECKING:
    from vitscore.kernels import RowScores

FOOTER_KEY = b"vitscore"
GROUP_BYTES = 32 << 20
SCORE_COLUMNS = ("pred", "prob", "topk", "topk_prob", "label_logprob", "sum_sq_prob")
PART_NAME = re.compile(r"(\d{7,})-.*\.parquet\Z")

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Footer:
    """Metadata of a part, kept in the Parquet file's key-value metadata."""

    identity: str
    ordinal: int
    shard: str
    num_bytes: int | None
    expected: int
    """Number of samples in the shard's index, cut to --limit."""
    bad: int
    fault: str | None = None
    """The reason if the shard itself is bad (cut, missing, not a tar), else None."""
    notes: tuple[str, ...] = ()
    schema: int = 1

    def dump(self) -> bytes:
        """Return the footer as JSON, with a checksum of all other values at the end."""
        values = asdict(self)
        return json.dumps({**values, "crc32": checksum(values)}, ensure_ascii=False).encode()

    @classmethod
    def load(cls, data: bytes) -> Footer:
        """Read the output of `dump`.

        Raises:
            ValueError, KeyError, TypeError: the data are not a footer, or are damaged.
        """
        values = json.loads(data)
        if values.pop("crc32") != checksum(values):
            raise ValueError("wrong checksum in the footer")
        values["notes"] = tuple(values["notes"])
        return cls(**values)


def checksum(values: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(values, sort_keys=True, ensure_ascii=False).encode())


def part_name(ordinal: int, shard_name: str) -> str:
    """Return the file name of a part, `0000012-STEM.parquet`: it sorts by ordinal and shows the shard's name."""
    stem = re.split(r"[/\\]", shard_name.rstrip("/"))[-1].split(".")[0]
    safe = re.sub(r"[^A-Za-z0-9_-]+", "_", stem)[:80] or "shard"
    return f"{ordinal:07d}-{safe}.parquet"


def read_footer(path: Path) -> Footer | None:
    """Read the footer of a finished part; None if the file is not a part or is damaged."""
    try:
        metadata = pq.read_metadata(path).metadata or {}
        return Footer.load(metadata[FOOTER_KEY])
    except (OSError, pa.ArrowException, MemoryError, AttributeError, KeyError, TypeError, ValueError):
        return None


Parts: TypeAlias = dict[int, tuple[Path, Footer]]
"""Finished parts, by rising ordinal."""


def finished_parts(folder: Path, identity: str) -> Parts:
    """Return this run's finished parts, by rising ordinal; other files in the folder are ignored.

    Raises:
        LedgerError: a shard has two parts.
    """
    parts: Parts = {}
    for path in sorted(folder.glob("*.parquet")):
        footer = read_footer(path) if PART_NAME.fullmatch(path.name) else None
        if footer is None or footer.identity != identity:
            continue
        if footer.ordinal in parts:
            got = f"{parts[footer.ordinal][0].name} and {path.name}"
            raise LedgerError("duplicate part for shard", where=footer.shard, got=got, next_step="Remove one of them.")
        parts[footer.ordinal] = (path, footer)
    return dict(sorted(parts.items()))


@dataclass(frozen=True)
class ModelColumns:
    """Columns of one model: its name, and the lengths of its lists."""

    name: str
    top_k: int
    num_logits: int = 0
    """K if logits are saved, else 0."""
    num_embedding: int = 0
    is_brief: bool = False
    """Keep only the class and its probability: for the cells of a robustness grid, of which there are many."""

    @property
    def row_bytes(self) -> int:
        return 4 * (self.num_logits + self.num_embedding)

    @property
    def figures(self) -> tuple[str, ...]:
        """Fields of `Predictions` that are kept, without logits and embedding."""
        return SCORE_COLUMNS[:2] if self.is_brief else SCORE_COLUMNS

    def fields(self) -> list[pa.Field]:
        if self.is_brief:
            return [pa.field(f"{self.name}.pred", pa.int32()), pa.field(f"{self.name}.prob", pa.float32())]
        fields = [
            pa.field(f"{self.name}.pred", pa.int32()),
            pa.field(f"{self.name}.prob", pa.float32()),
            pa.field(f"{self.name}.topk", pa.list_(pa.int32())),
            pa.field(f"{self.name}.topk_prob", pa.list_(pa.float32())),
            pa.field(f"{self.name}.label_logprob", pa.float32()),
            pa.field(f"{self.name}.sum_sq_prob", pa.float32()),
        ]
        if self.num_logits:
            fields.append(pa.field(f"{self.name}.logits", pa.list_(pa.float32())))
        if self.num_embedding:
            fields.append(pa.field(f"{self.name}.embedding", pa.list_(pa.float32())))
        return fields


def part_schema(models: Sequence[ModelColumns]) -> pa.Schema:
    """Return the columns of a part, in their fixed order."""
    return pa.schema(
        [
            pa.field("key", pa.string(), nullable=False),
            pa.field("shard", pa.string(), nullable=False),
            pa.field("label", pa.int32(), nullable=False),
            pa.field("status", pa.string(), nullable=False),
            pa.field("reason", pa.string()),
            *(field for model in models for field in model.fields()),
        ]
    )


@dataclass
class Predictions:
    """One model's outputs for some rows; axes: B rows, k top classes, K classes, D embedding."""

    pred: Array
    prob: Array
    topk: Array
    topk_prob: Array
    label_logprob: Array
    sum_sq_prob: Array
    logits: Array | None = None
    embedding: Array | None = None

    @classmethod
    def of(cls, scores: RowScores, *, logits: Array | None = None, embedding: Array | None = None) -> Predictions:
        """Take the columns that parts keep from the row kernel's scores, and add the requested long outputs."""
        return cls(
            pred=scores.pred,
            prob=scores.prob,
            topk=scores.topk,
            topk_prob=scores.topk_prob,
            label_logprob=scores.label_logprob,
            sum_sq_prob=scores.sum_sq_prob,
            logits=logits,
            embedding=embedding,
        )

    def take(self, rows: Array | slice) -> Predictions:
        """Select rows by a slice (views) or by their numbers (copies)."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        taken: dict[str, Any] = {name: None if value is None else value[rows] for name, value in values.items()}
        return Predictions(**taken)


@dataclass
class ShardRows:
    """Rows of one shard that is being scored. Rows are resolved in any order, every row once.

    It has many attributes: rows are gathered by column, counted by state, and written in groups through one file.
    """

    folder: Path
    schema: pa.Schema
    models: Sequence[ModelColumns]
    footer: Footer
    keys: Sequence[str]
    labels: Array = field(init=False)
    reasons: dict[int, str] = field(init=False, default_factory=dict)
    is_resolved: Array = field(init=False)
    num_open: int = field(init=False)
    is_committed: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        num_rows = len(self.keys)
        self.labels = np.full(num_rows, -1, np.int32)
        self.is_resolved = np.zeros(num_rows, bool)
        self.num_open = num_rows
        self._columns = {
            model.name: Predictions(
                pred=np.zeros(num_rows, np.int32),
                prob=np.zeros(num_rows, np.float32),
                topk=np.zeros((num_full, model.top_k), np.int32),
                topk_prob=np.zeros((num_full, model.top_k), np.float32),
                label_logprob=np.full(num_full, np.nan, np.float32),
                sum_sq_prob=np.zeros(num_full, np.float32),
            )
            for model in self.models
            for num_full in (0 if model.is_brief else num_rows,)
        }
        self._long: dict[str, list[tuple[Array, Predictions]]] = {model.name: [] for model in self.models}
        row_bytes = sum(model.row_bytes for model in self.models)
        self._group_rows = max(1, GROUP_BYTES // row_bytes) if row_bytes else max(1, num_rows)
        self._num_flushed = 0
        self._writer: pq.ParquetWriter | None = None
        self._file: NewFile | None = None

    @property
    def path(self) -> Path:
        return self.folder / part_name(self.footer.ordinal, self.footer.shard)

    @property
    def bytes_per_row(self) -> float:
        """The shard's bytes spread evenly over its samples."""
        return (self.footer.num_bytes or 0) / max(len(self.keys), 1)

    def set_labels(self, rows: Array, labels: Array) -> None:
        self.labels[rows] = labels

    def set_bad(self, row: int, reason: str) -> None:
        """Resolve a row without predictions; the part keeps it with its reason."""
        self.reasons[row] = reason
        self._resolve(np.array([row]))

    def set_predictions(self, rows: Array, by_model: Mapping[str, Predictions]) -> None:
        """Resolve `rows` with the outputs of all models."""
        for model in self.models:
            given, kept = by_model[model.name], self._columns[model.name]
            for name in model.figures:
                getattr(kept, name)[rows] = getattr(given, name)
            if model.row_bytes:
                self._long[model.name].append((rows, given))
        self._resolve(rows)

    def _resolve(self, rows: Array) -> None:
        assert not self.is_resolved[rows].any(), "a row was scored twice"
        self.is_resolved[rows] = True
        self.num_open -= len(rows)

    def flush_full_groups(self) -> None:
        """Write the row groups whose rows are all known; only a part with long outputs has several groups."""
        try:
            while self._num_flushed + self._group_rows < len(self.keys):
                stop = self._num_flushed + self._group_rows
                if not self.is_resolved[self._num_flushed : stop].all():
                    return
                self._write_group(stop)
        except BaseException:
            self.discard()
            raise

    def commit(self) -> Path:
        """Write the remaining rows, flush the file to disk and rename it; every row must be resolved."""
        assert self.num_open == 0 and not self.is_committed
        try:
            while self._num_flushed < len(self.keys):
                self._write_group(min(self._num_flushed + self._group_rows, len(self.keys)))
            writer = self._open()
            footer = Footer(**{**asdict(self.footer), "bad": len(self.reasons)})
            writer.add_key_value_metadata({FOOTER_KEY: footer.dump()})
            writer.close()
            assert self._file is not None
            self._file.commit()
        except BaseException:
            self.discard()
            raise
        self.is_committed = True
        return self.path

    def discard(self) -> None:
        """Remove an incomplete part."""
        if self._file is not None:
            self._file.discard()
        if self._writer is not None:
            with contextlib.suppress(Exception):
                self._writer.close()

    def _open(self) -> pq.ParquetWriter:
        if self._writer is None:
            self._file = NewFile(self.path)
            self._writer = pq.ParquetWriter(self._file, self.schema, compression="zstd", write_page_checksum=True)
        return self._writer

    def _write_group(self, stop: int) -> None:
        start, self._num_flushed = self._num_flushed, stop
        rows = np.arange(start, stop)
        is_bad = np.array([row in self.reasons for row in rows], bool)
        reasons = [self.reasons.get(int(row)) for row in rows]
        columns: list[pa.Array] = [
            pa.array(self.keys[start:stop], pa.string()),
            pa.array([self.footer.shard] * len(rows), pa.string()),
            pa.array(self.labels[start:stop], pa.int32()),
            pa.array(np.where(is_bad, "bad", "ok").tolist(), pa.string()),
            pa.array(reasons, pa.string()),
        ]
        for model in self.models:
            columns.extend(self._model_columns(model, start, stop, is_bad))
        self._open().write_table(pa.Table.from_arrays(columns, schema=self.schema))

    def _model_columns(self, model: ModelColumns, start: int, stop: int, is_bad: Array) -> Iterator[pa.Array]:
        kept = self._columns[model.name].take(slice(start, stop))
        yield pa.array(kept.pred, mask=is_bad)
        yield pa.array(kept.prob, mask=is_bad)
        if model.is_brief:
            return
        yield list_column(kept.topk, is_bad)
        yield list_column(kept.topk_prob, is_bad)
        yield pa.array(kept.label_logprob, mask=is_bad | np.isnan(kept.label_logprob))
        yield pa.array(kept.sum_sq_prob, mask=is_bad)
        pieces = self._long[model.name]
        for name, width in (("logits", model.num_logits), ("embedding", model.num_embedding)):
            if width:
                values = np.zeros((stop - start, width), np.float32)
                for rows, given in pieces:
                    inside = (rows >= start) & (rows < stop)
                    values[rows[inside] - start] = getattr(given, name)[inside]
                yield list_column(values, is_bad)
        self._long[model.name] = [piece for piece in pieces if piece[0][-1] >= stop]


def list_column(values_BN: Array, is_bad_B: Array) -> pa.Array:
    """Make a list column from rows of equal length; bad rows are null and store no values."""
    good = ~is_bad_B
    lengths = np.where(good, values_BN.shape[1], 0)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    flat = pa.array(np.ascontiguousarray(values_BN[good]).reshape(-1))
    return pa.ListArray.from_arrays(pa.array(offsets), flat, mask=pa.array(is_bad_B))
