"""What `vitscore metrics` is asked to count otherwise: other labels, classes, keys, k, from the parts alone.

    rows of a part ─► recount ─► rows ─► fold

Where the logits were saved, everything is computed anew from them, as the run would have. Without them a figure that
the parts do not determine (the probability of a corrected label outside the top k, say) is left out, not guessed. No
model and no torch here; nothing is written. Axes: B rows, K classes, T the k of top-k.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from vitscore.classes.groups import Groups, read_groups
from vitscore.classes.label_maps import BY_POSITION, NameIndex, read_label_map, split_label_map
from vitscore.classes.names import plain_names
from vitscore.errors import ClassError, LabelError, UsageError
from vitscore.kernels.rows import score_rows
from vitscore.rundir.rows import FIGURES, ModelRows, Rows
from vitscore.shards.labels import LabelRule, load_labels

Array: TypeAlias = npt.NDArray[Any]


@dataclass
class Recount:
    """Changes to the rows of a run's parts, and how many rows each one met."""

    num_classes: int
    has_logits: bool = False
    labels: dict[str, int] | None = None
    """Corrected labels, by key."""
    keys: frozenset[str] | None = None
    maps: dict[str, Array] = field(default_factory=dict)
    """By model: for each class that it predicted the class that it stands for."""
    top_k: tuple[int, ...] | None = None
    only: Array | None = None
    groups: Groups | None = None
    num_rows: int = 0
    num_labels_given: int = 0
    num_labels_changed: int = 0
    num_labels_of_bad: int = 0

    @property
    def figures(self) -> tuple[str, ...]:
        """The columns that are needed."""
        return (*FIGURES, "logits") if self.has_logits else (*FIGURES, "topk_prob")

    def told(self) -> dict[str, Any]:
        """What was changed, for `recount` of the document."""
        told: dict[str, Any] = {"samples": self.num_rows, "from_logits": self.has_logits}
        if self.labels is not None:
            told["labels"] = {
                "given": len(self.labels),
                "found": self.num_labels_given,
                "changed": self.num_labels_changed,
                "of_bad_samples": self.num_labels_of_bad,
            }
        if self.keys is not None:
            told["keys"] = len(self.keys)
        if self.maps:
            told["label_maps"] = sorted(self.maps)
        if self.only is not None:
            told["classes"] = len(self.only)
        return told

    def check(self) -> None:
        """Judge at the end what only all rows can tell.

        Raises:
            LabelError: no sample has one of the given keys.
        """
        if self.keys is not None and not self.num_rows:
            raise LabelError(
                "no sample left", where="--keys", expected="keys of the parts", got=f"{len(self.keys)} others"
            )
        if self.labels is not None and not self.num_labels_given:
            got = f"{len(self.labels)} other keys"
            raise LabelError("no sample has one of these keys", where="--labels", expected="keys of the parts", got=got)

    def apply(self, rows: Rows) -> Rows:
        """The rows as they are to be counted."""
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
                # Several classes to one: their joint probability is not in the parts, only which one came first.
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
    """Labels with those that are given by key, and which rows these are."""
    given = [labels.get(key) for key in keys.to_pylist()]
    is_given_B = np.array([label is not None for label in given], bool)
    labels_B = labels_B.copy()
    labels_B[is_given_B] = [label for label in given if label is not None]
    return labels_B, is_given_B


def _mapped(class_map: Array, ids: Array) -> Array:
    """Ids through a map; -1 stays."""
    return np.append(class_map, -1)[ids].astype(np.int32)


def _logprobs(model: ModelRows, labels_B: Array, same_B: Array) -> Array:
    """Log-probabilities of labels: as they were where nothing changed, else from the top k, else not known."""
    assert model.label_logprob is not None
    found_B = np.full(len(labels_B), np.nan, np.float32)
    if model.topk is not None and model.topk_prob is not None:
        is_label_BT = (model.topk == labels_B[:, None]) & (labels_B[:, None] >= 0)
        with np.errstate(divide="ignore"):
            logs_BT = np.where(is_label_BT & (model.topk_prob > 0), np.log(model.topk_prob), np.nan)
        has_label_B = ~np.isnan(logs_BT).all(axis=1)
        found_B[has_label_B] = np.nanmax(logs_BT[has_label_B], axis=1)
    return np.where(same_B, model.label_logprob, found_B)


def join_logits(logits_BK: Array, class_map: Array) -> tuple[Array, Array]:
    """Logits of the classes that a map leads to, several joined by logsumexp; and which classes it leaves empty."""
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
    # A finite logit whose probability is nothing: the kernel takes an infinite one for a fault.
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
    """What the flags of `vitscore metrics` ask for; None where they ask for nothing.

    Args:
        record: the run's run.json.
        labels: CSV or Parquet (key, label).
        keys: a text file of keys, one a line, or CSV or Parquet with a column `key`.
        label_maps: `[NAME=]FILE`: JSON from the class that was predicted to the class that is meant.
        top_k: numbers and commas.
        only_classes: a file of class names, or names and commas.
        groups: see groups.py.

    Raises:
        VitscoreError: a file or a value is at fault.
    """
    if not any((labels, keys, label_maps, top_k, only_classes, groups)):
        return None
    classes = list(record["classes"])
    has_logits = "logits" in record.get("options", {}).get("save", ())
    made = Recount(len(classes))
    # Logits are long: they are read only where something depends on them.
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
    """Class ids by key, from a file of labels.

    Raises:
        LabelError: a label is not a class.
    """
    rule = LabelRule(plain_names(classes))
    ids = {}
    for key, value in load_labels(path).items():
        ids[key], reason = rule.from_value(value)
        if reason is not None:
            raise LabelError("wrong label", where=f"{path}[{key}]", expected="a class", got=reason)
    return ids


def read_keys(path: Path) -> frozenset[str]:
    """Keys, one a line, or the column `key` of a CSV or Parquet file.

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
        wanted = "keys, one a line, or a column `key`"
        raise UsageError("cannot read keys", where=str(path), expected=wanted, got=type(error).__name__) from None
    if not keys:
        raise UsageError("no keys", where=str(path), expected="keys, one a line, or a column `key`")
    return frozenset(map(str, keys))


def read_class_map(
    text: str, classes: Sequence[str], models: Sequence[str], *, known: Mapping[str, Array]
) -> dict[str, Array]:
    """A map `[NAME=]FILE` by model: for each class that was predicted the class that is meant; others stay.

    Raises:
        UsageError: no such model, two maps for one, or a map by position.
        ClassError: a class that there is not.
    """
    name, source = split_label_map(text)
    if source == BY_POSITION:
        raise UsageError(
            "the parts hold classes, not positions",
            where=f"--label-map {text}",
            expected="a file: JSON from the class that was predicted to the class that is meant",
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
    """`3` or `1,3,10`.

    Raises:
        UsageError: no such numbers, or more than the parts hold.
    """
    try:
        wanted = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        wanted = ()
    if not wanted or wanted[0] < 1:
        raise UsageError("wrong value", where="--top-k", expected="numbers from 1 (3 or 1,3,10)", got=text)
    if wanted[-1] > num_classes:
        raise UsageError("wrong value", where="--top-k", expected=f"at most {num_classes}, the classes", got=text)
    if kept is not None and wanted[-1] > kept:
        raise UsageError(
            "k is not in the parts",
            where="--top-k",
            expected=f"at most {kept}",
            got=str(wanted[-1]),
            next_step="A run with --save logits or a larger --top-k keeps more.",
        )
    return tuple(sorted({1, *wanted}))


def read_only(text: str, classes: Sequence[str]) -> Array:
    """Ids of the classes in a file (one a line) or in the text itself (`cat,dog`), sorted.

    Raises:
        ClassError: there is no such class.
    """
    path = Path(text)
    names = path.read_text(encoding="utf-8-sig").splitlines() if path.is_file() else text.split(",")
    names = [name.strip() for name in names if name.strip()]
    if not names:
        raise ClassError("no classes", where=f"--only-classes {text}", expected="names or ids")
    index = NameIndex(plain_names(classes), classes)
    return np.unique([index.look_up(name, where="--only-classes", kind="data set class") for name in names])
