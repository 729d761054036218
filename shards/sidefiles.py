"""Class names and prompt templates: the text files that lie beside shards.

Used by the search for shards, and for the files that a user names. One name a line, UTF-8; the line's number is the
class id, so an empty line among names is an error, not skipped. It matches nothing to anything.
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
    """A file of names: what it is called, and its bytes."""

    name: str
    data: bytes


def read_classes(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """Read class names in order of their ids: a text file, one a line, or a JSON list of strings.

    Raises:
        UsageError: there is no such file.
        ClassError: it is empty, not text, or has an empty line among its names.
    """
    return parse_classes(_read(path))


def parse_classes(file: SideFile) -> tuple[str, ...]:
    """Class names, from a file that was read; raises what `read_classes` does."""
    if file.name.lower().endswith(".json"):
        return _json_list(file)
    lines = _lines(file)
    for number, line in enumerate(lines, start=1):
        if not line:
            raise ClassError(
                "class name missing",
                where=f"{file.name}, line {number}",
                expected="one class name a line",
                got="an empty line",
                next_step="A class's id is its line's number, so no line can be left out.",
            )
    if not lines:
        raise ClassError("no class names", where=file.name, expected="one class name a line", got="an empty file")
    return tuple(lines)


def read_templates(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """Read prompt templates, one a line; empty lines are skipped.

    Raises:
        UsageError: there is no such file, or a template has no place for the class name.
        ClassError: it is not text, or has no template.
    """
    return parse_templates(_read(path))


def parse_templates(file: SideFile) -> tuple[str, ...]:
    """Prompt templates, from a file that was read; raises what `read_templates` does."""
    is_json = file.name.lower().endswith(".json")
    templates = _json_list(file) if is_json else tuple(line for line in _lines(file) if line)
    for number, template in enumerate(templates, start=1):
        if "{c}" not in template and "{}" not in template:
            raise UsageError(
                "template without a place for the class",
                where=f"{file.name}, template {number}",
                expected="{c} or {} in it",
                got=repr(template),
            )
    if not templates:
        raise ClassError("no templates", where=file.name, expected="one template a line", got="an empty file")
    return templates


def find_side_file(folder: Path | str, names: tuple[str, ...]) -> SideFile | None:
    """The first of the named files that a folder has; the folder may be a URL."""
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
        raise UsageError("file cannot be read", where=str(path), got=error.strerror or str(error)) from error


def _text(file: SideFile) -> str:
    try:
        # Line ends as in a file that is opened as text.
        return file.data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise ClassError("names cannot be read", where=file.name, expected="UTF-8 text", got=str(error)) from error


def _lines(file: SideFile) -> list[str]:
    """Stripped lines, without the empty ones at the end."""
    # Not splitlines: a name may hold characters that Unicode counts as line ends.
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
