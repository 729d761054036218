"""Fold the parts of a run, in ordinal order, into metrics.json and the confusion matrices.

One part is read at a time, and only the columns that are counted, so memory does not grow with the run. The result is a
pure function of the parts: it does not depend on when they were written, in how many starts or by how many ranks. The
fold also checks the ledger: every sample that an index expected is scored or bad, exactly once, or an error names the
shard. Needs no model and no torch.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vitscore.classes.groups import Groups
from vitscore.errors import LedgerError, UsageError
from vitscore.kernels.arrays import Array
from vitscore.kernels.counts import Confusion, SparseConfusion
from vitscore.metrics.counts import TOP_K, ModelCounts
from vitscore.metrics.figures import model_metrics, report_names
from vitscore.metrics.pairs import Pair, compare_pairs
from vitscore.metrics.recount import Recount
from vitscore.rundir.parts import Footer, Parts, finished_parts, read_footer
from vitscore.rundir.rows import ModelRows, Rows, read_rows
from vitscore.shards.reasons import reason_kind
from vitscore.system.durable import write_bytes_durably, write_json_durably

_AGAIN = "Remove its part and start the run again; the shard is then scored again."


@dataclass(frozen=True)
class Folded:
    """Result of folding the parts."""

    document: dict[str, Any]
    """Content of metrics.json."""
    confusions: dict[str, Confusion]
    """By model: rows truth, columns prediction."""
    parts: Parts
    """The parts that were folded."""


def refold(folder: Path, *, parts: Parts | None = None, recount: Recount | None = None) -> Folded:
    """Fold the parts of the run in `folder`.

    Args:
        folder: the run's folder.
        parts: its finished parts, if already known.
        recount: changes to apply to the rows, see `fold`.

    Raises:
        UsageError: the folder holds no run, or its record cannot be read.
        LedgerError: the parts do not add up.
    """
    try:
        record = json.loads((folder / "run.json").read_bytes())
        shards = pq.read_table(folder / "shards.parquet")
    except FileNotFoundError as error:
        raise UsageError(
            "no run here",
            where=str(folder),
            expected=Path(error.filename or "shards.parquet").name,
            next_step="Check the path.",
        ) from None
    except (OSError, ValueError) as error:
        raise UsageError("cannot read the run's record", where=str(folder), got=str(error)) from None
    if parts is None:
        parts = finished_parts(folder / "parts", record["identity_hash"])
    return fold([(ordinal, path) for ordinal, (path, _) in parts.items()], shards, record, recount=recount)


def fold(
    parts: Iterable[tuple[int, Path]],
    shards: pa.Table,
    record: Mapping[str, Any],
    *,
    recount: Recount | None = None,
) -> Folded:
    """Fold parts into the document of metrics.json and the confusion matrices.

    Args:
        parts: ordinal and path of every part, in ascending order.
        shards: the table of shards.parquet: `ordinal`, `name`.
        record: run.json: `classes`, `models` (their order is kept), `options.on_bad_sample`, `groups`.
        recount: changes to apply to the rows before they are counted; they do not affect the ledger.

    Raises:
        LedgerError: a part's shard is not in the table, a shard has two parts, or its samples do not add up.
    """
    _refuse_repeated_shards(shards)
    names = dict(zip(shards["ordinal"].to_pylist(), shards["name"].to_pylist(), strict=True))
    folding = _Folding(record, recount)
    seen: Parts = {}
    for ordinal, path in parts:
        footer = read_footer(path)
        if footer is None or names.get(ordinal) != footer.shard or footer.ordinal != ordinal:
            got = "no footer" if footer is None else f"{footer.shard} as number {footer.ordinal}"
            wanted = f"{names[ordinal]} as number {ordinal}" if ordinal in names else "a shard of this run"
            raise LedgerError("part does not belong to this run", where=str(path), expected=wanted, got=got)
        if ordinal in seen:
            got = f"{seen[ordinal][0].name} and {path.name}"
            raise LedgerError("duplicate part for shard", where=footer.shard, got=got)
        seen[ordinal] = path, footer
        folding.add_part(path, footer)
    return folding.result(seen, num_shards=len(names))


def write_metrics(folder: Path, folded: Folded) -> None:
    """Write the confusion matrices and then metrics.json, atomically; the same parts give the same bytes."""
    for name, confusion in folded.confusions.items():
        write_bytes_durably(folder / f"confusion_{name}.npz", confusion_bytes(confusion))
    write_json_durably(folder / "metrics.json", folded.document)


def confusion_bytes(confusion: Confusion) -> bytes:
    """Return a confusion matrix as an .npz archive without timestamps."""
    arrays: Mapping[str, Any] = {"counts": confusion}
    if isinstance(confusion, SparseConfusion):
        arrays = {**confusion._asdict(), "shape": np.array(confusion.shape, np.int64)}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            entry = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            entry.compress_type = zipfile.ZIP_DEFLATED
            with archive.open(entry, "w", force_zip64=True) as file:
                np.lib.format.write_array(file, np.ascontiguousarray(array), allow_pickle=False)
    return buffer.getvalue()


class _Folding:
    """State of a fold: the counts of every model and pair, and the ledger."""

    def __init__(self, record: Mapping[str, Any], recount: Recount | None) -> None:
        self.recount = recount
        self.classes = report_names(record["classes"])
        num_classes, models = len(self.classes), list(record["models"])
        top_k = recount.top_k if recount and recount.top_k else TOP_K
        self.counts = {name: ModelCounts(num_classes, top_k=top_k) for name in models}
        self.pairs = {pair: Pair(num_classes) for pair in combinations(models, 2)}
        self.is_bad_wrong = record.get("options", {}).get("on_bad_sample", "skip") == "wrong"
        self.groups = Groups.from_record(record)
        if recount and recount.groups:
            self.groups = recount.groups
        self.expected = self.scored = self.bad = self.unlabelled = 0
        self.reasons: Counter[str] = Counter()
        self.bad_shards: dict[str, str] = {}

    def add_part(self, path: Path, footer: Footer) -> None:
        scored, bad, keys = 0, 0, []
        figures = {"figures": self.recount.figures} if self.recount else {}
        for rows in read_rows(path, list(self.counts), **figures):
            num_bad = int(rows.is_bad_B.sum())
            scored, bad = scored + len(rows) - num_bad, bad + num_bad
            _check_shard(footer, rows)
            keys.append(rows.keys)
            self.unlabelled += int((rows.labels_B[~rows.is_bad_B] == -1).sum())
            for reason in rows.reasons.filter(pa.array(rows.is_bad_B)).to_pylist():
                self.reasons[reason_kind(reason or "unknown")] += 1
            self._count(self.recount.apply(rows) if self.recount else rows)
        _check_part(footer, scored, bad, keys)
        self.expected += footer.expected
        self.scored += scored
        self.bad += bad
        if footer.fault is not None:
            self.bad_shards[footer.shard] = footer.fault

    def _count(self, rows: Rows) -> None:
        ok_B, bad_labels = ~rows.is_bad_B, rows.labels_B[rows.is_bad_B]
        labels = rows.labels_B[ok_B]
        for name, counts in self.counts.items():
            add_predictions(counts, labels, rows.models[name].take(ok_B))
            if self.is_bad_wrong:
                counts.count_wrong(bad_labels)
        for (a, b), pair in self.pairs.items():
            pair.update(labels, rows.models[a].pred[ok_B], rows.models[b].pred[ok_B])
            if self.is_bad_wrong:
                pair.count_wrong(bad_labels)

    def result(self, parts: Parts, *, num_shards: int) -> Folded:
        ledger = {
            "expected": self.expected,
            "scored": self.scored,
            "bad": self.bad,
            "unlabelled": self.unlabelled,
            "duplicates": 0,
            "reasons": dict(sorted(self.reasons.items(), key=lambda item: (-item[1], item[0]))),
            "shards": {"expected": num_shards, "done": len(parts), "bad": self.bad_shards},
        }
        only = self.recount.only if self.recount else None
        document = {
            "schema": 1,
            "classes": self.classes if only is None else [self.classes[index] for index in only],
            "ledger": ledger,
            "models": {
                name: model_metrics(counts, self.classes, only=only, groups=self.groups)
                for name, counts in self.counts.items()
            },
            "comparisons": compare_pairs(self.pairs),
        }
        if self.recount:
            self.recount.check()
            document["recount"] = self.recount.summary()
        return Folded(document, {name: counts.confusion.compute() for name, counts in self.counts.items()}, parts)


def add_predictions(counts: ModelCounts, labels_B: Array, rows: ModelRows) -> None:
    """Count one model's rows, with or without an answer."""
    counts.update(
        labels_B,
        rows.pred,
        topk_BT=rows.topk,
        prob_B=rows.prob,
        label_logprob_B=rows.label_logprob,
        sum_sq_prob_B=rows.sum_sq_prob,
    )


def _refuse_repeated_shards(shards: pa.Table) -> None:
    """Check that names and ordinals are unique, so that rows of different parts are different samples."""
    for column in ("ordinal", "name"):
        values = shards[column].to_pylist()
        if len(set(values)) < len(values):
            value, times = Counter(values).most_common(1)[0]
            raise LedgerError(
                "duplicate shard", where="shards.parquet", expected=f"{column} {value} once", got=f"{times} times"
            )


def _check_shard(footer: Footer, rows: Rows) -> None:
    """Check that every row names the part's own shard; a sample of another shard would be counted twice."""
    is_own = pc.fill_null(pc.equal(rows.shards, footer.shard), False)
    if len(rows) and not pc.all(is_own).as_py():
        position = pc.index(is_own, False).as_py()
        got = f"{rows.keys[position].as_py()} of {rows.shards[position].as_py()}"
        raise LedgerError(
            "sample of another shard", where=footer.shard, expected="its own samples only", got=got, next_step=_AGAIN
        )


def _check_part(footer: Footer, scored: int, bad: int, keys: Sequence[pa.Array]) -> None:
    if footer.expected != scored + bad:
        got = f"{scored} scored and {bad} bad"
        raise LedgerError(
            "samples do not add up", where=footer.shard, expected=f"{footer.expected}", got=got, next_step=_AGAIN
        )
    if footer.bad != bad:
        raise LedgerError(
            "bad samples do not add up", where=footer.shard, expected=f"{footer.bad}", got=f"{bad}", next_step=_AGAIN
        )
    all_keys = pa.chunked_array(keys, pa.string())
    if pc.count_distinct(all_keys).as_py() < len(all_keys):
        counted = Counter(all_keys.to_pylist())
        key, times = counted.most_common(1)[0]
        raise LedgerError(
            "sample counted more than once",
            where=f"{footer.shard}[{key}]",
            expected="1 row",
            got=f"{times} rows",
            next_step=_AGAIN,
        )
