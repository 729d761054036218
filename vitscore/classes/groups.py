"""`--groups FILE`: superclasses that are scored in addition to the classes.

The file is a JSON object from group to a list of its classes, or from class to group, with classes by name or id. A
class without a group forms a group under its own name. No model and no torch here.
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
    """Superclasses: their names, and the group id of every class."""

    names: tuple[str, ...]
    of_class: Array

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Groups | None:
        """Return the groups recorded in a run.json, or None if the run has none."""
        groups = record.get("groups")
        return cls(tuple(groups["names"]), np.array(groups["of_class"], np.int64)) if groups else None

    def to_record(self) -> dict[str, Any]:
        return {"names": list(self.names), "of_class": self.of_class.tolist()}


def read_groups(path: str | Path, classes: Sequence[str]) -> Groups:
    """Read a file of groups.

    Args:
        path: the file.
        classes: display names of the data set's classes.

    Raises:
        UsageError: the file cannot be read.
        ClassError: it does not hold groups, or has an unknown class, a class in two groups, or a class without a group
            whose name is a group's.
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
                    next_step="A group has the same name, so the class cannot form its own: add it to a group.",
                )
            names[name] = group_of[class_id] = len(names)
    return Groups(tuple(names), np.array([group_of[index] for index in range(len(classes))], np.int64))


def _members(content: Any, where: str) -> list[tuple[str, str | int]]:
    """Return pairs of group and class, from either form of the file."""
    if isinstance(content, dict) and content:
        if all(isinstance(value, list) for value in content.values()):
            pairs = [(group, member) for group, members in content.items() for member in members]
        else:
            pairs = [(group, member) for member, group in content.items()]
        if all(type(group) is str and type(member) in (str, int) for group, member in pairs):
            return pairs
    raise ClassError("bad groups", where=where, expected="an object from group to its classes, or from class to group")
