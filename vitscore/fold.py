"""From the parts to metrics.json: a fold, in ordinal order, over the only results there are.

Reads one part at a time and only the columns that count, so memory does not grow with the run. What comes out depends
on the parts alone: not on who wrote them, when, in how many starts or on how many ranks. Here the books are checked:
every sample that an index expected is scored or bad, once, or the error names the shard. Needs no model and no torch.
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
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vitscore.compare import PairCounts, compare
from vitscore.durable import write_bytes_durably, write_json_durably
from vitscore.errors import LedgerError, UsageError
from vitscore.kernels.counts import Confusion, SparseConfusion
from vitscore.metrics import ModelCounts, model_metrics, report_names
from vitscore.parts import Footer, finished_parts, read_footer
from vitscore.shards.reasons import reason_kind

ROWS_AT_ONCE = 65_536
_LEDGER_COLUMNS = ("key", "shard", "label", "status", "reason")
_AGAIN = "Remove its part and run again: the shard is scored anew."
_FIGURES = ("pred", "prob", "topk", "label_logprob", "sum_sq_prob")

Array: TypeAlias = npt.NDArray[Any]


@dataclass(frozen=True)
class Folded:
    """What the parts come to."""

    document: dict[str, Any]
    """metrics.json."""
    confusions: dict[str, Confusion]
    """By model: rows truth, columns prediction."""


def refold(folder: Path) -> Folded:
    """Fold the parts of the run in `folder`.

    Raises:
        UsageError: there is no run.
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
        raise UsageError("the run's record cannot be read", where=str(folder), got=str(error)) from None
    parts = finished_parts(folder / "parts", record["identity_hash"])
    return fold([(ordinal, path) for ordinal, (path, _) in parts.items()], shards, record)


def fold(parts: Iterable[tuple[int, Path]], shards: pa.Table, record: Mapping[str, Any]) -> Folded:
    """Fold parts into the document of metrics.json and the confusion matrices.

    Args:
        parts: ordinal and path of each, by rising ordinal.
        shards: the frozen list: `ordinal`, `name`.
        record: run.json: `classes`, `models` (their order is kept), `options.on_bad_sample`.

    Raises:
        LedgerError: a shard is not in the list, is there twice, or its samples do not add up.
    """
    _refuse_repeated_shards(shards)
    names = dict(zip(shards["ordinal"].to_pylist(), shards["name"].to_pylist(), strict=True))
    folding = _Folding(
        record["classes"], list(record["models"]), record.get("options", {}).get("on_bad_sample", "skip")
    )
    seen: dict[int, Path] = {}
    for ordinal, path in parts:
        footer = read_footer(path)
        if footer is None or names.get(ordinal) != footer.shard or footer.ordinal != ordinal:
            got = "no footer" if footer is None else f"{footer.shard} as number {footer.ordinal}"
            wanted = f"{names[ordinal]} as number {ordinal}" if ordinal in names else "a shard of this run"
            raise LedgerError("part does not belong here", where=str(path), expected=wanted, got=got)
        if ordinal in seen:
            raise LedgerError("shard is there twice", where=footer.shard, got=f"{seen[ordinal].name} and {path.name}")
        seen[ordinal] = path
        folding.add_part(path, footer)
    return folding.result(num_shards=len(names))


def write_metrics(folder: Path, folded: Folded) -> None:
    """Write the confusion matrices, then metrics.json, each whole or not at all; the same bytes for the same parts."""
    for name, confusion in folded.confusions.items():
        write_bytes_durably(folder / f"confusion_{name}.npz", confusion_bytes(confusion))
    write_json_durably(folder / "metrics.json", folded.document)


def confusion_bytes(confusion: Confusion) -> bytes:
    """A confusion matrix as an .npz without times in it."""
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
    """The running state: counts of each model and pair, and the ledger."""

    def __init__(self, classes: Sequence[str], models: Sequence[str], on_bad_sample: str) -> None:
        self.classes = report_names(classes)
        self.counts = {name: ModelCounts(len(classes)) for name in models}
        self.pairs = {pair: PairCounts() for pair in combinations(models, 2)}
        self.is_bad_wrong = on_bad_sample == "wrong"
        self.expected = self.scored = self.bad = self.unlabelled = self.num_parts = 0
        self.reasons: Counter[str] = Counter()
        self.bad_shards: dict[str, str] = {}

    def add_part(self, path: Path, footer: Footer) -> None:
        columns = [*_LEDGER_COLUMNS, *(f"{name}.{figure}" for name in self.counts for figure in _FIGURES)]
        scored, bad, keys = 0, 0, []
        try:
            with pq.ParquetFile(path, page_checksum_verification=True) as file:
                for batch in file.iter_batches(batch_size=ROWS_AT_ONCE, columns=columns):
                    num_ok, num_bad = self._add_rows(batch)
                    scored, bad = scored + num_ok, bad + num_bad
                    _check_shard(footer, batch)
                    keys.append(batch["key"])
        except (OSError, KeyError, pa.ArrowException) as error:
            again = "Remove it and run again: the shard is scored anew."
            raise LedgerError("part cannot be read", where=str(path), got=str(error), next_step=again) from None
        _check_part(footer, scored, bad, keys)
        self.num_parts += 1
        self.expected += footer.expected
        self.scored += scored
        self.bad += bad
        if footer.fault is not None:
            self.bad_shards[footer.shard] = footer.fault

    def _add_rows(self, batch: pa.RecordBatch) -> tuple[int, int]:
        labels_B = batch["label"].to_numpy()
        is_ok, is_bad = pc.equal(batch["status"], "ok"), pc.equal(batch["status"], "bad")
        ok_B, bad_B = is_ok.to_numpy(zero_copy_only=False), is_bad.to_numpy(zero_copy_only=False)
        self.unlabelled += int((labels_B[ok_B] == -1).sum())
        for reason in batch["reason"].filter(is_bad).to_pylist():
            self.reasons[reason_kind(reason or "unknown")] += 1
        preds: dict[str, Array] = {}
        for name, counts in self.counts.items():
            figures = {figure: batch[f"{name}.{figure}"].filter(is_ok) for figure in _FIGURES}
            preds[name] = _add_predictions(counts, labels_B[ok_B], figures)
            if self.is_bad_wrong:
                counts.count_wrong(labels_B[bad_B])
        for (a, b), pair in self.pairs.items():
            pair.update(labels_B[ok_B], preds[a], preds[b])
            if self.is_bad_wrong:
                pair.count_wrong(labels_B[bad_B])
        return int(ok_B.sum()), int(bad_B.sum())

    def result(self, *, num_shards: int) -> Folded:
        ledger = {
            "expected": self.expected,
            "scored": self.scored,
            "bad": self.bad,
            "unlabelled": self.unlabelled,
            "duplicates": 0,
            "reasons": dict(sorted(self.reasons.items(), key=lambda item: (-item[1], item[0]))),
            "shards": {"expected": num_shards, "done": self.num_parts, "bad": self.bad_shards},
        }
        document = {
            "schema": 1,
            "classes": self.classes,
            "ledger": ledger,
            "models": {name: model_metrics(counts, self.classes) for name, counts in self.counts.items()},
            "comparisons": [compare(a, b, counts) for (a, b), counts in self.pairs.items()],
        }
        return Folded(document, {name: counts.confusion.compute() for name, counts in self.counts.items()})


def _add_predictions(counts: ModelCounts, labels_B: Array, figures: Mapping[str, pa.Array]) -> Array:
    """Count one model's rows; returns its predictions, -1 where it has none."""
    preds_B: Array = figures["pred"].fill_null(-1).to_numpy()
    answered_B = preds_B >= 0
    counts.update(labels_B[~answered_B], preds_B[~answered_B])
    topk = figures["topk"].filter(pa.array(answered_B))
    num_answered = int(answered_B.sum())
    if num_answered:
        probabilities = (
            figures[name].fill_null(np.nan).to_numpy() for name in ("prob", "label_logprob", "sum_sq_prob")
        )
        prob_B, label_logprob_B, sum_sq_prob_B = (values_B[answered_B] for values_B in probabilities)
        counts.update(
            labels_B[answered_B], preds_B[answered_B], topk_BT=topk.flatten().to_numpy().reshape(num_answered, -1),
            prob_B=prob_B, label_logprob_B=label_logprob_B, sum_sq_prob_B=sum_sq_prob_B,
        )  # fmt: skip
    return preds_B


def _refuse_repeated_shards(shards: pa.Table) -> None:
    """With every name and every number once, rows of different parts are different samples."""
    for column in ("ordinal", "name"):
        values = shards[column].to_pylist()
        if len(set(values)) < len(values):
            value, times = Counter(values).most_common(1)[0]
            raise LedgerError(
                "shard is there twice", where="shards.parquet", expected=f"{column} {value} once", got=f"{times} times"
            )


def _check_shard(footer: Footer, batch: pa.RecordBatch) -> None:
    """Every row is of the part's own shard: a sample of another one would be counted there too."""
    is_own = pc.fill_null(pc.equal(batch["shard"], footer.shard), False)
    if not pc.all(is_own).as_py() and len(batch):
        position = pc.index(is_own, False).as_py()
        got = f"{batch['key'][position].as_py()} of {batch['shard'][position].as_py()}"
        raise LedgerError(
            "sample of another shard", where=footer.shard, expected="its own samples", got=got, next_step=_AGAIN
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
            "sample counted more than once", where=f"{footer.shard}[{key}]", expected="1 row", got=f"{times} rows",
            next_step=_AGAIN,
        )  # fmt: skip
