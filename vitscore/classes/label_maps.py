"""`--label-map [NAME=]FILE|by-position`: people's own word on which head class means which class of the data set.

Part of `classes.py`'s matching. A map is for heads whose names do not fit, or that tell apart what the data set
does not (several head classes to one class, joined by logsumexp of their logits). Head classes that the map does not
mention still match by name. Maps never apply to zero-shot models: their head is the classes.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from vitscore.classes.names import fold, match_names, name_with_nearest, plain_names
from vitscore.errors import ClassError, UsageError

BY_POSITION: Literal["by-position"] = "by-position"
LabelMap = Literal["by-position"] | Mapping[str, str | int]


class HasKind(Protocol):
    """What is asked of a checkpoint here."""

    @property
    def kind(self) -> str: ...


def parse_label_maps(texts: Sequence[str], models: Mapping[str, HasKind]) -> dict[str, LabelMap]:
    """Label maps by model name; one without a name is for every classifier that has none of its own.

    Raises:
        UsageError: a name that is no classifier of this run, or two maps for one model.
        ClassError: a file that is no map.
    """
    maps: dict[str, LabelMap] = {}
    for_all: LabelMap | None = None
    for text in texts:
        name, source = split_label_map(text)
        label_map: LabelMap = BY_POSITION if source == BY_POSITION else read_label_map(source)
        if name in maps or (not name and for_all is not None):
            raise UsageError("two label maps for one model", where=f"--label-map {text}")
        if not name:
            for_all = label_map
        else:
            _require_classifier(name, models, text)
            maps[name] = label_map
    if for_all is not None:
        classifiers = [name for name, model in models.items() if model.kind == "classifier"]
        if not classifiers:
            raise UsageError(
                "label map without a classifier", where="--label-map", next_step="Zero-shot models need none."
            )
        maps = dict.fromkeys(classifiers, for_all) | maps
    return maps


def split_label_map(text: str) -> tuple[str, str]:
    """`NAME=FILE` in two; the name is empty where there is none."""
    match = re.fullmatch(r"([A-Za-z0-9._-]+)=(.*)", text, re.DOTALL)
    return (match[1], match[2]) if match else ("", text)


def _require_classifier(name: str, models: Mapping[str, HasKind], text: str) -> None:
    if name not in models:
        raise UsageError("no such model", where=f"--label-map {text}", expected=" or ".join(models), got=name)
    if models[name].kind != "classifier":
        raise UsageError(
            "label map for a zero-shot model",
            where=f"--label-map {text}",
            next_step="Its head is the classes: leave the map out, or change --templates.",
        )


def read_label_map(path: str | Path) -> dict[str, str | int]:
    """A JSON object from head class (name or id) to data set class (name or id).

    Raises:
        UsageError: the file cannot be read.
        ClassError: it holds something else, or one head class twice.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError("cannot read label map", where=str(path), got=type(error).__name__) from error
    try:
        pairs = json.loads(text, object_pairs_hook=_Pairs)
    except ValueError as error:
        raise ClassError("bad label map", where=str(path), expected="JSON", got=str(error)) from error
    if not isinstance(pairs, _Pairs) or not all(type(target) in (str, int) for _, target in pairs):
        raise ClassError("bad label map", where=str(path), expected="an object from head class to data set class")
    label_map = dict(pairs)
    if len(label_map) < len(pairs):
        repeated = next(head for head, _ in pairs if sum(head == other for other, _ in pairs) > 1)
        raise ClassError("head class twice", where=f"{path}[{repeated}]", next_step="Name its second one by its id.")
    return label_map


class _Pairs(list[tuple[str, Any]]):
    """A JSON object with its repeated keys kept."""


def match_by_map(
    head_names: Sequence[str] | None,
    classes: Sequence[str],
    *,
    label_map: Mapping[str, str | int],
    num_outputs: int,
    where: str,
) -> tuple[tuple[tuple[int, ...], ...], str]:
    """The head's ids for every class by a map, and a summary.

    Classes that the map leaves out are matched by name to head classes that it leaves out.

    Raises:
        ClassError: a name that neither side has, a head class with two targets, or a class without a head class.
    """
    plain, heads = plain_names(classes), list(head_names or [""] * num_outputs)
    known_heads, known_classes = NameIndex(heads), NameIndex(plain, classes)
    targets: dict[int, int] = {}
    for head, target in label_map.items():
        head_id = known_heads.look_up(head, where=where, kind="head class")
        class_id = known_classes.look_up(target, where=where, kind="data set class")
        if targets.setdefault(head_id, class_id) != class_id:
            raise ClassError("head class with two targets", where=f"{where}[{head}]", expected="one data set class")
    columns: defaultdict[int, list[int]] = defaultdict(list)
    for head_id, class_id in targets.items():
        columns[class_id].append(head_id)
    num_mapped = len(columns)
    left_heads = [head_id for head_id in range(len(heads)) if head_id not in targets]
    left_classes = [class_id for class_id in range(len(classes)) if class_id not in columns]
    by_name, _ = match_names([heads[index] for index in left_heads], [plain[index] for index in left_classes])
    for ours, theirs in by_name.items():
        columns[left_classes[ours]].append(left_heads[theirs])
    missing = [plain[class_id] for class_id in range(len(classes)) if class_id not in columns]
    if missing:
        raise ClassError(
            "cannot match the classes",
            where=where,
            expected="at least one head class for every class",
            got=f"none for {name_with_nearest(missing, [heads[index] for index in left_heads])}",
            next_step="Add them to the map.",
        )
    summary = f"by map: {len(targets)} head classes to {num_mapped} of {len(classes)}"
    if by_name:
        summary += f", {len(by_name)} by name"
    return tuple(tuple(sorted(columns[index])) for index in range(len(classes))), summary


class NameIndex:
    """Class ids by what people write: a name, a display name, a folded name, or an id in digits.

    Args:
        names: the classes' names; empty ones for a head without names.
        shown: how they are displayed, where that differs.
    """

    def __init__(self, names: Sequence[str], shown: Sequence[str] = ()) -> None:
        self._names = names
        self._has_names = any(names)
        self._by_name, self._by_display, self._by_fold = _ids_of(names), _ids_of(shown), _ids_of(map(fold, names))

    def look_up(self, name: str | int, *, where: str, kind: str) -> int:
        """The id that `name` stands for.

        Raises:
            ClassError: there is none, or more than one.
        """
        text = str(name)
        for ids in (self._by_name.get(text), self._by_display.get(text), self._by_fold.get(fold(text))):
            if not isinstance(name, int) and ids:
                if len(ids) > 1:
                    raise ClassError(
                        f"ambiguous {kind}", where=f"{where}[{text}]", got=f"ids {ids}", next_step="Name its id."
                    )
                return ids[0]
        # A head without names still has transformers' own, LABEL_0 on.
        digits = text if self._has_names else text.removeprefix("LABEL_")
        if digits.isdecimal() and int(digits) < len(self._names):
            return int(digits)
        raise ClassError(
            f"unknown {kind}",
            where=where,
            expected=f"a name, or an id in 0..{len(self._names) - 1}",
            got=name_with_nearest([text], [known for known in self._names if known]),
        )


def _ids_of(names: Iterable[str]) -> dict[str, list[int]]:
    ids: defaultdict[str, list[int]] = defaultdict(list)
    for index, name in enumerate(names):
        if name:
            ids[name].append(index)
    return dict(ids)
