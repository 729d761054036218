"""Class names and prompt templates: the text files that lie beside shards.

Used by the search for shards, and for the files that a user names. One name a line, UTF-8; the line's number is the
class id, so an empty line among names is an error, not skipped. It matches nothing to anything.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from vitscore.errors import ClassError, UsageError

CLASSES_FILES = ("classes.txt", "classnames.txt")
TEMPLATES_FILES = ("templates.txt", "zeroshot_classification_templates.txt")


def read_classes(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """Read class names in order of their ids: a text file, one a line, or a JSON list of strings.

    Raises:
        UsageError: there is no such file.
        ClassError: it is empty, not text, or has an empty line among its names.
    """
    if Path(path).suffix.lower() == ".json":
        return _read_json_list(path)
    lines = _read_lines(path)
    for number, line in enumerate(lines, start=1):
        if not line:
            raise ClassError(
                "class name missing",
                where=f"{path}, line {number}",
                expected="one class name a line",
                got="an empty line",
                next_step="A class's id is its line's number, so no line can be left out.",
            )
    if not lines:
        raise ClassError("no class names", where=str(path), expected="one class name a line", got="an empty file")
    return tuple(lines)


def read_templates(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """Read prompt templates, one a line; empty lines are skipped.

    Raises:
        UsageError: there is no such file, or a template has no place for the class name.
        ClassError: it is not text, or has no template.
    """
    is_json = Path(path).suffix.lower() == ".json"
    templates = _read_json_list(path) if is_json else tuple(line for line in _read_lines(path) if line)
    for number, template in enumerate(templates, start=1):
        if "{c}" not in template and "{}" not in template:
            raise UsageError(
                "template without a place for the class",
                where=f"{path}, template {number}",
                expected="{c} or {} in it",
                got=repr(template),
            )
    if not templates:
        raise ClassError("no templates", where=str(path), expected="one template a line", got="an empty file")
    return templates


def find_side_file(folder: Path, names: tuple[str, ...]) -> Path | None:
    """The first of the named files that a folder has."""
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _read_text(path: str | os.PathLike[str]) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ClassError("names cannot be read", where=str(path), expected="UTF-8 text", got=str(error)) from error
    except OSError as error:
        raise UsageError("file cannot be read", where=str(path), got=error.strerror or str(error)) from error


def _read_lines(path: str | os.PathLike[str]) -> list[str]:
    """Stripped lines, without the empty ones at the end."""
    # Not splitlines: a name may hold characters that Unicode counts as line ends.
    lines = [line.strip() for line in _read_text(path).split("\n")]
    while lines and not lines[-1]:
        lines.pop()
    return lines


def _read_json_list(path: str | os.PathLike[str]) -> tuple[str, ...]:
    try:
        document = json.loads(_read_text(path))
    except ValueError as error:
        raise ClassError("names cannot be read", where=str(path), expected="JSON", got=str(error)) from error
    if not isinstance(document, list) or not all(isinstance(name, str) and name.strip() for name in document):
        raise ClassError("names cannot be read", where=str(path), expected="a JSON list of non-empty strings")
    if not document:
        raise ClassError("no names", where=str(path), expected="a JSON list of strings", got="an empty list")
    return tuple(name.strip() for name in document)
