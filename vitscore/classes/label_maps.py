"""`--label-map [NAME=]FILE|by-position`: explicit maps from head classes to the data set's classes.

A map serves heads whose names do not match, or that are finer than the data set (several head classes for one class,
joined by logsumexp of their logits). Head classes that the map does not mention still match by name. Maps never apply
to zero-shot models, whose head is the classes. `matching` decides which way a head is matched.
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
    """A checkpoint of kind `classifier` or `zero-shot`."""

    @property
    def kind(self) -> str: ...


def parse_label_maps(texts: Sequence[str], models: Mapping[str, HasKind]) -> dict[str, LabelMap]:
    """Return label maps by model name; a map without a name applies to every classifier that no other map names.

    Raises:
        UsageError: a name is not a classifier of this run, or a model has two maps.
        ClassError: a file does not hold a map.
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
    """Split `NAME=FILE`; the name is empty if there is none."""
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
    """Read a JSON object from head class (name or id) to data set class (name or id).

    Raises:
        UsageError: the file cannot be read.
        ClassError: it does not hold such an object, or has a head class twice.
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
        raise ClassError("head class twice", where=f"{path}[{repeated}]", next_step="Name the second one by its id.")
    return label_map


class _Pairs(list[tuple[str, Any]]):
    """Items of a JSON object, including those with repeated keys."""


def match_by_map(
    head_names: Sequence[str] | None,
    classes: Sequence[str],
    *,
    label_map: Mapping[str, str | int],
    num_outputs: int,
    where: str,
) -> tuple[tuple[tuple[int, ...], ...], str]:
    """Return the head's ids for every class according to a map, and a summary.

    Classes that the map leaves out are matched by name to head classes that it leaves out.

    Raises:
        ClassError: a name is unknown, a head class has two targets, or a class has no head class.
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
    """Look-up of class ids by name, display name, folded name, or id in digits.

    Args:
        names: names of the classes; empty strings for a head without names.
        shown: display names, if they differ.
    """

    def __init__(self, names: Sequence[str], shown: Sequence[str] = ()) -> None:
        self._names = names
        self._has_names = any(names)
        self._by_name, self._by_display, self._by_fold = _ids_of(names), _ids_of(shown), _ids_of(map(fold, names))

    def look_up(self, name: str | int, *, where: str, kind: str) -> int:
        """Return the id of the class that `name` denotes.

        Raises:
            ClassError: no class or more than one matches.
        """
        text = str(name)
        for ids in (self._by_name.get(text), self._by_display.get(text), self._by_fold.get(fold(text))):
            if not isinstance(name, int) and ids:
                if len(ids) > 1:
                    raise ClassError(
                        f"ambiguous {kind}", where=f"{where}[{text}]", got=f"ids {ids}", next_step="Name its id."
                    )
                return ids[0]
        # transformers names the outputs of a head without names LABEL_0, LABEL_1, ...
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
