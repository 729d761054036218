"""Read class names and prompt templates from the text files beside shards.

Also used for files that a user passes. A file has one name per line in UTF-8; the line number is the class id, so an
empty line among class names is an error.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from vitscore.errors import ClassError, UsageError
from vitscore.shards.redaction import public_name

CLASSES_FILES = ("classes.txt", "classnames.txt")
TEMPLATES_FILES = ("templates.txt", "zeroshot_classification_templates.txt")


@dataclass(frozen=True)
class SideFile:
    """The name and content of a side file."""

    name: str
    data: bytes


def read_classes(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """Read class names in order of their ids from a text file, one per line, or from a JSON list of strings.

    Raises:
        UsageError: the file cannot be read.
        ClassError: the file is empty, is not text, or has an empty line among its names.
    """
    return parse_classes(_read(path))


def parse_classes(file: SideFile) -> tuple[str, ...]:
    """Return the class names in a file's content; raises ClassError like `read_classes`."""
    if file.name.lower().endswith(".json"):
        return _json_list(file)
    lines = _lines(file)
    for number, line in enumerate(lines, start=1):
        if not line:
            raise ClassError(
                "class name missing",
                where=f"{file.name}, line {number}",
                expected="one class name per line",
                got="an empty line",
                next_step="The line number is the class id, so every line needs a name.",
            )
    if not lines:
        raise ClassError("no class names", where=file.name, expected="one class name per line", got="an empty file")
    return tuple(lines)


def read_templates(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """Read prompt templates, one per line; empty lines are skipped.

    Raises:
        UsageError: the file cannot be read, or a template has no placeholder for the class name.
        ClassError: the file is not text or holds no templates.
    """
    return parse_templates(_read(path))


def parse_templates(file: SideFile) -> tuple[str, ...]:
    """Return the prompt templates in a file's content; raises the errors of `read_templates`."""
    is_json = file.name.lower().endswith(".json")
    templates = _json_list(file) if is_json else tuple(line for line in _lines(file) if line)
    for number, template in enumerate(templates, start=1):
        if "{c}" not in template and "{}" not in template:
            raise UsageError(
                "template has no placeholder for the class",
                where=f"{file.name}, template {number}",
                expected="{c} or {}",
                got=repr(template),
            )
    if not templates:
        raise ClassError("no templates", where=file.name, expected="one template per line", got="an empty file")
    return templates


def find_side_file(folder: Path | str, names: tuple[str, ...]) -> SideFile | None:
    """Return the first of the named files that exists in a folder; the folder may be a URL."""
    if isinstance(folder, Path):
        return next((_read(folder / name) for name in names if (folder / name).is_file()), None)
    from vitscore.shards.remote.stores import read_small

    for name in names:
        data = read_small(f"{folder}/{name}")
        if data is not None:
            return SideFile(f"{public_name(folder)}/{name}", data)
    return None


def _read(path: str | os.PathLike[str]) -> SideFile:
    try:
        return SideFile(str(path), Path(path).read_bytes())
    except OSError as error:
        raise UsageError("cannot read the file", where=str(path), got=error.strerror or str(error)) from error


def _text(file: SideFile) -> str:
    try:
        # Translate line ends as Python's text mode does.
        return file.data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise ClassError("names cannot be read", where=file.name, expected="UTF-8 text", got=str(error)) from error


def _lines(file: SideFile) -> list[str]:
    """Return the lines of a file, stripped, without empty ones at the end."""
    # Not splitlines: a name may contain characters that Unicode treats as line ends.
    lines = [line.strip() for line in _text(file).split("\n")]
    while lines and not lines[-1]:
        lines.pop()
    return lines


def _json_list(file: SideFile) -> tuple[str, ...]:
    try:
        document = json.loads(_text(file))
    except ValueError as error:
        raise ClassError("names cannot be read", where=file.name, expected="JSON", got=str(error)) from error
    if not isinstance(document, list) or not all(isinstance(name, str) and name.strip() for name in document):
        raise ClassError("names cannot be read", where=file.name, expected="a JSON list of non-empty strings")
    if not document:
        raise ClassError("no names", where=file.name, expected="a JSON list of strings", got="an empty list")
    return tuple(name.strip() for name in document)
