"""Convert labels, from tar members or a labels file, to class ids.

Sits between the tar's bytes and the rows. Integer text is an id, other text a class name. A missing label is -1 and
not a fault; a wrong or unreadable label yields a reason. Class names must match exactly.
"""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vitscore.errors import LabelError, UsageError
from vitscore.shards.reasons import (
    LABEL_AMBIGUOUS,
    LABEL_OUT_OF_RANGE,
    LABEL_UNKNOWN,
    LABEL_UNREADABLE,
    with_details,
)

NO_LABEL = -1
LabelValue = str | int
Outcome = tuple[int, str | None]

FIRST_NAME_ID = 1 << 30
"""Without classes, names get ids from here on in order of appearance, so that they differ from ids in the data."""
MAX_KEPT_OUTCOMES = 1 << 16
"""Limit of the cache of outcomes: most labels repeat, but JSON documents rarely do."""

_INTEGER = re.compile(r"[+-]?[0-9]+", re.ASCII)
_MISSING: Outcome = (NO_LABEL, None)


class LabelRule:
    """The rule that converts a sample's label to a class id.

    Args:
        classes: the data set's class names in order of their ids. None accepts every name and every id from 0 on, for
            inspecting shards whose classes are unknown.
        label_key: the extension of the member that holds the label as text (`cls`), or `json:FIELD` for a field of the
            sample's `json` member; `json:a.b` is field `b` of field `a` if there is no field `a.b`.
        overrides: labels by sample key; they take precedence over the tar's.
    """

    def __init__(
        self,
        classes: Sequence[str] | None,
        *,
        label_key: str = "cls",
        overrides: Mapping[str, LabelValue] | None = None,
    ) -> None:
        kind, colon, fieldname = label_key.partition(":")
        if (colon and (kind != "json" or not fieldname)) or not kind:
            raise UsageError("unknown label key", expected="an extension such as cls, or json:FIELD", got=label_key)
        self.extension = kind.lstrip(".").lower()
        self.field = fieldname if colon else None
        self.overrides = overrides or {}
        self.num_classes = len(classes) if classes is not None else None
        self.ids: dict[str, int] = {}
        self.ambiguous: dict[str, list[int]] = {}
        for class_id, name in enumerate(classes or ()):
            stripped = name.strip()
            if self.ids.setdefault(stripped, class_id) != class_id:
                self.ambiguous.setdefault(stripped, [self.ids[stripped]]).append(class_id)
        self._outcomes: dict[bytes, Outcome] = {}

    def label(self, key: str, raw: bytes | None) -> Outcome:
        """Return a sample's class id and None, or -1 and the reason why the label is invalid.

        A missing label gives -1 and None.

        Args:
            key: the sample's key, for the overrides.
            raw: the label member's bytes, or None if the sample has no such member.
        """
        if self.overrides and key in self.overrides:
            return self.from_value(self.overrides[key])
        if raw is None:
            return _MISSING
        outcome = self._outcomes.get(raw)
        if outcome is None:
            outcome = self.from_bytes(raw)
            if len(self._outcomes) < MAX_KEPT_OUTCOMES:
                self._outcomes[raw] = outcome
        return outcome

    def from_bytes(self, raw: bytes) -> Outcome:
        try:
            text = raw.decode("utf-8-sig")
        except UnicodeDecodeError:
            return NO_LABEL, with_details(LABEL_UNREADABLE, "not UTF-8 text")
        if self.field is None:
            return self.from_value(text)
        try:
            document = json.loads(text)
        except (ValueError, RecursionError) as error:
            return NO_LABEL, with_details(LABEL_UNREADABLE, f"not JSON: {error}")
        if not isinstance(document, dict):
            return NO_LABEL, with_details(LABEL_UNREADABLE, "the JSON is no object")
        value = _json_field(document, self.field)
        return _MISSING if value is None else self.from_value(value)

    def from_value(self, value: Any) -> Outcome:
        """Return the outcome of a label given as text or a number."""
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, int) and not isinstance(value, bool):
            return self.from_id(value)
        if not isinstance(value, str):
            return NO_LABEL, with_details(LABEL_UNREADABLE, f"{value!r} is neither a number nor a class name")
        text = value.strip()
        if _INTEGER.fullmatch(text):
            # Python refuses to convert thousands of digits, and no class id has twenty.
            return self.from_id(int(text)) if len(text) < 20 else (NO_LABEL, with_details(LABEL_OUT_OF_RANGE, text))
        return self.from_name(text)

    def from_id(self, class_id: int) -> Outcome:
        limit = FIRST_NAME_ID if self.num_classes is None else self.num_classes
        if 0 <= class_id < limit:
            return class_id, None
        return NO_LABEL, with_details(LABEL_OUT_OF_RANGE, f"expected 0..{limit - 1}, got {class_id}")

    def from_name(self, name: str) -> Outcome:
        if not name:
            return NO_LABEL, with_details(LABEL_UNREADABLE, "empty")
        if name in self.ambiguous:
            ids = ", ".join(map(str, self.ambiguous[name]))
            return NO_LABEL, with_details(LABEL_AMBIGUOUS, f"{name!r} names classes {ids}; give the id")
        if self.num_classes is None:
            return self.ids.setdefault(name, FIRST_NAME_ID + len(self.ids)), None
        if name not in self.ids:
            return NO_LABEL, with_details(LABEL_UNKNOWN, repr(name))
        return self.ids[name], None


def _json_field(document: dict[str, Any], fieldname: str) -> Any:
    if fieldname in document:
        return document[fieldname]
    value: Any = document
    for part in fieldname.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def load_labels(path: str | os.PathLike[str]) -> dict[str, LabelValue]:
    """Read a labels file: csv with a header, or parquet, with the columns `key` and `label`.

    For an empty label, the label in the tar applies. Other columns are ignored.

    Raises:
        UsageError: the file does not exist.
        LabelError: the file is neither csv nor parquet, a column is missing, or a key has two different labels.
    """
    file = Path(path)
    if not file.is_file():
        raise UsageError("no such labels file", where=str(path))
    is_parquet = file.suffix.lower() in (".parquet", ".pq")
    rows = _parquet_rows(file) if is_parquet else _csv_rows(file)
    labels: dict[str, LabelValue] = {}
    for key, value in rows:
        # NaN is what dataframes write for a missing number.
        if value is None or value == "" or value != value:
            continue
        if labels.setdefault(key, value) != value:
            raise LabelError("two labels for one key", where=f"{path}[{key}]", got=f"{labels[key]!r} and {value!r}")
    return labels


def _csv_rows(file: Path) -> list[tuple[str, Any]]:
    try:
        with open(file, newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream, skipinitialspace=True)
            _require_columns(file, reader.fieldnames or [])
            return [(row["key"], (row["label"] or "").strip()) for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise LabelError("labels cannot be read", where=str(file), expected="csv in UTF-8", got=str(error)) from error


def _parquet_rows(file: Path) -> list[tuple[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        _require_columns(file, pq.read_schema(file).names)
        table = pq.read_table(file, columns=["key", "label"])
    except pa.ArrowInvalid as error:
        raise LabelError("labels cannot be read", where=str(file), expected="parquet", got=str(error)) from error
    keys = map(str, table["key"].to_pylist())
    return list(zip(keys, table["label"].to_pylist(), strict=True))


def _require_columns(file: Path, names: Sequence[str]) -> None:
    if not {"key", "label"} <= set(names):
        got = ", ".join(names) or "none"
        raise LabelError("columns missing", where=str(file), expected="columns key and label", got=got)
