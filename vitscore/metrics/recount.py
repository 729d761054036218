"""Recount a run from its parts with other labels, classes, keys or k, as `vitscore metrics` options ask.

    rows of a part ─► recount ─► rows ─► fold

If the logits were saved, everything is computed from them, as a run would do. Otherwise a figure that the parts do not
determine (for example the probability of a corrected label outside the top k) is omitted, not guessed. Nothing is
written; no model and no torch are needed. Axes: B rows, K classes, T the k of top-k.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vitscore.classes.groups import Groups, read_groups
from vitscore.classes.label_maps import BY_POSITION, NameIndex, read_label_map, split_label_map
from vitscore.classes.names import plain_names
from vitscore.errors import ClassError, LabelError, UsageError
from vitscore.kernels.arrays import Array
from vitscore.kernels.rows import score_rows
from vitscore.rundir.rows import COUNTED_COLUMNS, ModelRows, Rows
from vitscore.shards.labels import LabelRule, load_labels


@dataclass
class Recount:
    """Changes to the rows of a run's parts, and the number of rows each change applied to."""

    num_classes: int
    has_logits: bool = False
    labels: dict[str, int] | None = None
    """Corrected class ids, by key."""
    keys: frozenset[str] | None = None
    """Keys of the only samples to count."""
    maps: dict[str, Array] = field(default_factory=dict)
    """For every model with a label map: the meant class of every predicted class."""
    top_k: tuple[int, ...] | None = None
    only: Array | None = None
    """Ids of the only classes to count."""
    groups: Groups | None = None
    num_rows: int = 0
    num_labels_given: int = 0
    num_labels_changed: int = 0
    num_labels_of_bad: int = 0

    @property
    def figures(self) -> tuple[str, ...]:
        """The columns to read of every model."""
        return (*COUNTED_COLUMNS, "logits" if self.has_logits else "topk_prob")

    def summary(self) -> dict[str, Any]:
        """Return the applied changes: the entry `recount` of the document."""
        summary: dict[str, Any] = {"samples": self.num_rows, "from_logits": self.has_logits}
        if self.labels is not None:
            summary["labels"] = {
                "given": len(self.labels),
                "found": self.num_labels_given,
                "changed": self.num_labels_changed,
                "of_bad_samples": self.num_labels_of_bad,
            }
        if self.keys is not None:
            summary["keys"] = len(self.keys)
        if self.maps:
            summary["label_maps"] = sorted(self.maps)
        if self.only is not None:
            summary["classes"] = len(self.only)
        return summary

    def check(self) -> None:
        """Check, after all rows, that the given keys occurred.

        Raises:
            LabelError: no sample has one of the given keys.
        """
        if self.keys is not None and not self.num_rows:
            got = f"{len(self.keys)} other keys"
            raise LabelError("no sample left", where="--keys", expected="keys of samples in the parts", got=got)
        if self.labels is not None and not self.num_labels_given:
            wanted, got = "keys of samples in the parts", f"{len(self.labels)} other keys"
            raise LabelError("no sample has one of these keys", where="--labels", expected=wanted, got=got)

    def apply(self, rows: Rows) -> Rows:
        """Return the rows to count: filtered, relabelled and mapped."""
        if self.keys is not None:
            rows = rows.take(np.array([key in self.keys for key in rows.keys.to_pylist()], bool))
        old_labels_B = rows.labels_B
        if self.labels is not None:
            rows = self._relabel(rows, self.labels)
        if self.only is not None:
            is_wanted_B = np.isin(rows.labels_B, self.only)
            rows, old_labels_B = rows.take(is_wanted_B), old_labels_B[is_wanted_B]
        self.num_rows += len(rows)
        changed = {name: self._model(name, model, rows, old_labels_B) for name, model in rows.models.items()}
        return replace(rows, models=changed)

    def _relabel(self, rows: Rows, labels: Mapping[str, int]) -> Rows:
        labels_B, is_given_B = corrected(rows.keys, rows.labels_B, labels)
        self.num_labels_given += int(is_given_B.sum())
        self.num_labels_changed += int((labels_B != rows.labels_B).sum())
        self.num_labels_of_bad += int((is_given_B & rows.is_bad_B).sum())
        return replace(rows, labels_B=labels_B)

    def _model(self, name: str, model: ModelRows, rows: Rows, old_labels_B: Array) -> ModelRows:
        class_map = self.maps.get(name)
        if model.logits is not None:
            return self._from_logits(model, rows.labels_B, class_map)
        if class_map is not None:
            if len(np.unique(class_map)) < self.num_classes:
                # Several classes are joined; the parts hold the best one, not their joint probability.
                return ModelRows(_mapped(class_map, model.pred))
            back_K = np.argsort(class_map)
            topk = None if model.topk is None else _mapped(class_map, model.topk)
            model = replace(model, pred=_mapped(class_map, model.pred), topk=topk)
            same_B = _mapped(back_K, rows.labels_B) == old_labels_B
        else:
            same_B = rows.labels_B == old_labels_B
        return model if same_B.all() else replace(model, label_logprob=_logprobs(model, rows.labels_B, same_B))

    def _from_logits(self, model: ModelRows, labels_B: Array, class_map: Array | None) -> ModelRows:
        assert model.logits is not None
        answered_B = model.pred >= 0
        logits_BK = model.logits[answered_B]
        is_empty_K = np.zeros(self.num_classes, bool)
        if class_map is not None:
            logits_BK, is_empty_K = join_logits(logits_BK, class_map)
        kept_k = model.topk.shape[1] if model.topk is not None else 1
        k = max(kept_k, *(self.top_k or (1,)))
        scores = score_rows(logits_BK, labels_B[answered_B], k)
        logprob_B = np.where(is_empty_K[labels_B[answered_B]], np.nan, scores.label_logprob)

        def spread(values: Array, nothing: float) -> Array:
            whole = np.full((len(labels_B), *values.shape[1:]), nothing, values.dtype)
            whole[answered_B] = values
            return whole

        return ModelRows(
            pred=spread(scores.pred, -1),
            prob=spread(scores.prob, np.nan),
            topk=spread(scores.topk, -1),
            label_logprob=spread(logprob_B.astype(np.float32), np.nan),
            sum_sq_prob=spread(scores.sum_sq_prob, np.nan),
        )


def corrected(keys: pa.Array, labels_B: Array, labels: Mapping[str, int]) -> tuple[Array, Array]:
    """Return the labels with corrections applied, and a mask of the rows that have one."""
    given = [labels.get(key) for key in keys.to_pylist()]
    is_given_B = np.array([label is not None for label in given], bool)
    labels_B = labels_B.copy()
    labels_B[is_given_B] = [label for label in given if label is not None]
    return labels_B, is_given_B


def _mapped(class_map: Array, ids: Array) -> Array:
    """Return `ids` mapped through `class_map`; -1 stays."""
    return np.append(class_map, -1)[ids].astype(np.int32)


def _logprobs(model: ModelRows, labels_B: Array, same_B: Array) -> Array:
    """Return the labels' log-probabilities: as stored for unchanged rows, else from the top k, else NaN."""
    assert model.label_logprob is not None
    logprob_B = np.full(len(labels_B), np.nan, np.float32)
    if model.topk is not None and model.topk_prob is not None:
        is_label_BT = (model.topk == labels_B[:, None]) & (labels_B[:, None] >= 0)
        with np.errstate(divide="ignore"):
            logs_BT = np.where(is_label_BT & (model.topk_prob > 0), np.log(model.topk_prob), np.nan)
        has_label_B = ~np.isnan(logs_BT).all(axis=1)
        logprob_B[has_label_B] = np.nanmax(logs_BT[has_label_B], axis=1)
    return np.where(same_B, model.label_logprob, logprob_B)


def join_logits(logits_BK: Array, class_map: Array) -> tuple[Array, Array]:
    """Return the logits of the mapped classes, joined by logsumexp, and a mask of classes that no class maps to."""
    num_classes = len(class_map)
    top_B1 = logits_BK.max(axis=1, keepdims=True, initial=-np.inf)
    joined_BK = np.full(logits_BK.shape, -np.inf, np.float64)
    for target in np.unique(class_map):
        members = np.flatnonzero(class_map == target)
        picked = logits_BK[:, members].astype(np.float64)
        if len(members) == 1:
            joined_BK[:, target] = picked[:, 0]
        else:
            joined_BK[:, target] = top_B1[:, 0] + np.log(np.maximum(np.exp(picked - top_B1).sum(axis=1), 1e-300))
    is_empty_K = ~np.isin(np.arange(num_classes), class_map)
    # Finite, with a probability of 0: the kernel treats infinite logits as a fault.
    return np.where(is_empty_K, top_B1 - 1e4, joined_BK).astype(np.float32), is_empty_K


def make_recount(
    record: Mapping[str, Any],
    *,
    labels: Path | None = None,
    keys: Path | None = None,
    label_maps: Sequence[str] = (),
    top_k: str | None = None,
    only_classes: str | None = None,
    groups: Path | None = None,
) -> Recount | None:
    """Return the recount that the options of `vitscore metrics` describe; None without any of them.

    Args:
        record: the run's run.json.
        labels: CSV or Parquet file (key, label).
        keys: text file of keys, one per line, or CSV or Parquet file with a column `key`.
        label_maps: `[NAME=]FILE`: JSON object from predicted class to meant class.
        top_k: comma-separated numbers.
        only_classes: file of class names, or comma-separated names.
        groups: JSON file of superclasses, see `classes.groups`.

    Raises:
        VitscoreError: a file or a value is invalid.
    """
    if not any((labels, keys, label_maps, top_k, only_classes, groups)):
        return None
    classes = list(record["classes"])
    has_logits = "logits" in record.get("options", {}).get("save", ())
    made = Recount(len(classes))
    # Logits are long, so they are read only if something depends on them.
    made.has_logits = has_logits and bool(labels or label_maps or top_k)
    if labels is not None:
        made.labels = read_corrections(labels, classes)
    if keys is not None:
        made.keys = read_keys(keys)
    for text in label_maps:
        made.maps.update(read_class_map(text, classes, list(record["models"]), known=made.maps))
    if top_k is not None:
        kept = None if has_logits else record["choices"]["top_k"]["value"]
        made.top_k = parse_top_k(top_k, len(classes), kept)
    if only_classes is not None:
        made.only = read_only(only_classes, classes)
    if groups is not None:
        made.groups = read_groups(groups, classes)
    return made


def read_corrections(path: Path, classes: Sequence[str]) -> dict[str, int]:
    """Read class ids by key from a file of labels.

    Raises:
        LabelError: a label is not one of the classes.
    """
    rule = LabelRule(plain_names(classes))
    ids = {}
    for key, value in load_labels(path).items():
        ids[key], reason = rule.from_value(value)
        if reason is not None:
            raise LabelError("wrong label", where=f"{path}[{key}]", expected="a class", got=reason)
    return ids


def read_keys(path: Path) -> frozenset[str]:
    """Read keys from a text file (one per line) or from the column `key` of a CSV or Parquet file.

    Raises:
        UsageError: the file cannot be read, or holds no key.
    """
    try:
        if path.suffix.lower() in (".parquet", ".pq"):
            keys = pq.read_table(path, columns=["key"])["key"].to_pylist()
        else:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
            is_csv = path.suffix.lower() == ".csv"
            keys = [row["key"] for row in csv.DictReader(lines)] if is_csv else [line for line in lines if line.strip()]
    except (OSError, KeyError, UnicodeDecodeError, csv.Error, pa.ArrowException) as error:
        wanted = "keys, one per line, or a column `key`"
        raise UsageError("cannot read keys", where=str(path), expected=wanted, got=type(error).__name__) from None
    if not keys:
        raise UsageError("no keys", where=str(path), expected="keys, one per line, or a column `key`")
    return frozenset(map(str, keys))


def read_class_map(
    text: str, classes: Sequence[str], models: Sequence[str], *, known: Mapping[str, Array]
) -> dict[str, Array]:
    """Read a label map `[NAME=]FILE`; return, by model, the meant class of every predicted class.

    Classes that the file does not mention keep their meaning.

    Raises:
        UsageError: no such model, two maps for one model, or a map by position.
        ClassError: the file names an unknown class.
    """
    name, source = split_label_map(text)
    if source == BY_POSITION:
        raise UsageError(
            "the parts hold classes, not positions",
            where=f"--label-map {text}",
            expected="a file: JSON from predicted class to meant class",
        )
    if name and name not in models:
        raise UsageError("no such model", where=f"--label-map {text}", expected=" or ".join(models), got=name)
    targets = [name] if name else list(models)
    if any(target in known for target in targets):
        raise UsageError("two label maps for one model", where=f"--label-map {text}")
    known_classes = NameIndex(plain_names(classes), classes)
    class_map = np.arange(len(classes), dtype=np.int64)
    for predicted, meant in read_label_map(source).items():
        row = known_classes.look_up(predicted, where=source, kind="data set class")
        class_map[row] = known_classes.look_up(meant, where=source, kind="data set class")
    return dict.fromkeys(targets, class_map)


def parse_top_k(text: str, num_classes: int, kept: int | None) -> tuple[int, ...]:
    """Parse `3` or `1,3,10` into ascending numbers that include 1.

    Raises:
        UsageError: the text is not a list of numbers, or one exceeds the classes or the `kept` top k of the parts.
    """
    try:
        wanted = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        wanted = ()
    if not wanted or wanted[0] < 1:
        raise UsageError("wrong value", where="--top-k", expected="numbers from 1 (3 or 1,3,10)", got=text)
    if wanted[-1] > num_classes:
        limit = f"at most {num_classes}, the number of classes"
        raise UsageError("wrong value", where="--top-k", expected=limit, got=text)
    if kept is not None and wanted[-1] > kept:
        raise UsageError(
            "k exceeds the top k of the parts",
            where="--top-k",
            expected=f"at most {kept}",
            got=str(wanted[-1]),
            next_step="A run with --save logits or a larger --top-k keeps more.",
        )
    return tuple(sorted({1, *wanted}))


def read_only(text: str, classes: Sequence[str]) -> Array:
    """Return the sorted ids of the classes named in a file (one per line) or in the text itself (`cat,dog`).

    Raises:
        ClassError: no class is named, or an unknown one.
    """
    path = Path(text)
    names = path.read_text(encoding="utf-8-sig").splitlines() if path.is_file() else text.split(",")
    names = [name.strip() for name in names if name.strip()]
    if not names:
        raise ClassError("no classes", where=f"--only-classes {text}", expected="names or ids")
    index = NameIndex(plain_names(classes), classes)
    return np.unique([index.look_up(name, where="--only-classes", kind="data set class") for name in names])
