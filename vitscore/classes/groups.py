"""`--groups FILE`: superclasses, scored beside the classes.

A JSON object, from group to a list of its classes or from class to group; classes by name or id. A class without a
group stands for itself, under its own name. No model and no torch here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from vitscore.classes.label_maps import NameIndex
from vitscore.classes.names import plain_names
from vitscore.errors import ClassError, UsageError

Array: TypeAlias = npt.NDArray[Any]


@dataclass(frozen=True)
class Groups:
    """Superclasses: their names, and for every class the id of its group."""

    names: tuple[str, ...]
    of_class: Array

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Groups | None:
        """The groups of a run, from its run.json; None where it has none."""
        groups = record.get("groups")
        return cls(tuple(groups["names"]), np.array(groups["of_class"], np.int64)) if groups else None

    def to_record(self) -> dict[str, Any]:
        return {"names": list(self.names), "of_class": self.of_class.tolist()}


def read_groups(path: str | Path, classes: Sequence[str]) -> Groups:
    """Read a file of groups.

    Args:
        path: the file.
        classes: the data set's classes, as shown.

    Raises:
        UsageError: the file cannot be read.
        ClassError: it holds something else, an unknown class, or a class in two groups.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError("cannot read groups", where=str(path), got=type(error).__name__) from error
    except ValueError as error:
        raise ClassError("bad groups", where=str(path), expected="JSON", got=str(error)) from error
    known, where = NameIndex(plain_names(classes), classes), str(path)
    names: dict[str, int] = {}
    group_of: dict[int, int] = {}
    for name, member in _members(content, where):
        class_id = known.look_up(member, where=where, kind="data set class")
        group_id = names.setdefault(name, len(names))
        if group_of.setdefault(class_id, group_id) != group_id:
            raise ClassError("class in two groups", where=f"{where}[{member}]", expected="one group")
    for class_id, name in enumerate(classes):
        if class_id not in group_of:
            if name in names:
                raise ClassError(
                    "class without a group",
                    where=f"{where}[{name}]",
                    next_step="It would stand for itself, but a group has its name: put it into a group.",
                )
            names[name] = group_of[class_id] = len(names)
    return Groups(tuple(names), np.array([group_of[index] for index in range(len(classes))], np.int64))


def _members(content: Any, where: str) -> list[tuple[str, str | int]]:
    """Pairs of group and class, from either form."""
    if isinstance(content, dict) and content:
        if all(isinstance(value, list) for value in content.values()):
            pairs = [(group, member) for group, members in content.items() for member in members]
        else:
            pairs = [(group, member) for member, group in content.items()]
        if all(type(group) is str and type(member) in (str, int) for group, member in pairs):
            return pairs
    raise ClassError("bad groups", where=where, expected="an object from group to its classes, or from class to group")
