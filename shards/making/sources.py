"""Turn image folders and CSV files into a list of samples to write.

First stage of making shards, before the writer. Image files are copied byte for byte; listing them reads names and
sizes, and opens no image.

Keys are unique and valid by webdataset's rule: the file's path relative to the source, without its extension
(`cat/0001`, `cat/extra/0002`). Dots in the base name and control characters become `_`, and so does a leading `__`. If
two files would have the same key, the later one in sorted order gets the suffix `-2`, `-3` and so on.
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from vitscore.errors import DataError, LabelError, UsageError
from vitscore.shards.labels import LabelRule
from vitscore.shards.unusable import is_image_file

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_LEADING_UNDERSCORES = re.compile(r"^__+")


class ImageSource(Protocol):
    """The source of a sample's encoded image; pickled and sent to the process that writes the shard."""

    @property
    def num_bytes(self) -> int: ...
    @property
    def fingerprint(self) -> str: ...
    def read(self) -> bytes: ...


@dataclass(frozen=True, slots=True)
class FileImage:
    """An image file, copied byte for byte."""

    path: str
    num_bytes: int
    modified_ns: int

    @property
    def fingerprint(self) -> str:
        return f"{self.num_bytes} {self.modified_ns}"

    def read(self) -> bytes:
        with open(self.path, "rb") as stream:
            return stream.read()


@dataclass(frozen=True, slots=True)
class Sample:
    """One sample to write; `label` is its class id, or None."""

    key: str
    extension: str
    image: ImageSource
    label: int | None


@dataclass(frozen=True)
class Source:
    """All samples of a source in order, and the class names if known."""

    kind: str
    samples: list[Sample]
    classes: tuple[str, ...] | None
    notes: tuple[str, ...] = ()


def read_image_folder(folder: str, *, classes: Sequence[str] | None = None) -> Source:
    """List a folder with one subfolder per class, sorted like torchvision's ImageFolder, or a folder of loose images.

    Images directly in the folder are unlabelled; they are skipped if class folders hold images.

    Args:
        folder: the folder; class folders may be nested.
        classes: class names in order of their ids; None takes the folders' names in sorted order.

    Raises:
        LabelError: a class folder is not among `classes`.
        UsageError: the folder holds no images.
    """
    root = Path(folder)
    names = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    chosen = tuple(classes) if classes is not None else tuple(names)
    ids = {name: class_id for class_id, name in enumerate(chosen)}
    unknown = [name for name in names if name not in ids]
    if unknown:
        raise LabelError(
            "folder is not a class",
            where=str(root / unknown[0]),
            expected=f"one of {len(ids)} class names",
            got=unknown[0],
        )
    keys = _Keys()
    skipped = _Skipped()
    samples = []
    for name in names:
        for path, parts in _image_files(root / name, (name,), skipped):
            samples.append(_file_sample(path, parts, ids[name], keys))
    loose = [entry for entry in sorted(os.listdir(root)) if is_image_file(entry) and (root / entry).is_file()]
    if samples:
        skipped.loose = len(loose)
    else:
        chosen = tuple(classes) if classes is not None else ()
        samples = [_file_sample(str(root / name), (name,), None, keys) for name in loose]
    if not samples:
        raise UsageError("no images", where=folder, expected="images, in one folder per class or loose", got="none")
    return Source("image folder", samples, chosen or None, skipped.notes())


def read_csv(file: str, *, classes: Sequence[str] | None = None) -> Source:
    """List the images of a CSV file with the columns `path,label`, with or without a header line.

    Paths are relative to the file. Without `classes`, the labels are ids if all of them are numbers; otherwise they are
    names, and ids follow their sorted order.

    Raises:
        UsageError: the file does not exist or has no rows.
        LabelError: a label is not a class.
        DataError: the file cannot be read, an image is missing, or a row has fewer than two columns.
    """
    rows = _csv_rows(file)
    texts = [label for _, _, label in rows if label]
    are_ids = all(re.fullmatch(r"[0-9]+", text) for text in texts)
    if classes is None and not are_ids:
        classes = sorted(set(texts))
        by_name = {name: class_id for class_id, name in enumerate(classes)}
    else:
        by_name = {}
    rule = LabelRule(classes)
    keys = _Keys()
    samples = []
    for line, path, text in rows:
        label: int | None = None
        if text:
            label, reason = (by_name[text], None) if by_name else rule.label("", text.encode())
            if reason is not None:
                raise LabelError(reason, where=f"{file}, line {line}")
        full = os.path.join(os.path.dirname(file), path)
        if not is_image_file(os.path.basename(path)) or not os.path.isfile(full):
            raise DataError("no such image", where=f"{file}, line {line}", expected="an image file", got=path)
        parts = tuple(part for part in Path(path).parts if part not in ("/", ".", "..", Path(path).anchor))
        samples.append(_file_sample(full, parts, label, keys))
    note = "the labels are ids without names, so no classes.txt was written; pass --classes to name them"
    notes = () if classes is not None or not texts else (note,)
    return Source("csv", samples, tuple(classes) if classes is not None else None, notes)


def _csv_rows(file: str) -> list[tuple[int, str, str]]:
    """Return (line, path, label) of every row except the header."""
    try:
        with open(file, newline="", encoding="utf-8-sig") as stream:
            reader = csv.reader(stream, skipinitialspace=True)
            rows = [(reader.line_num, row) for row in reader if row]
    except FileNotFoundError:
        raise UsageError("no such CSV file", where=file) from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError("cannot read the CSV", where=file, expected="path,label in UTF-8", got=str(error)) from error
    if rows and [cell.strip().lower() for cell in rows[0][1][:2]] == ["path", "label"]:
        rows = rows[1:]
    for line, row in rows:
        if len(row) < 2:
            raise DataError("row has fewer than two columns", where=f"{file}, line {line}", expected="path,label")
    if not rows:
        raise UsageError("no rows", where=file, expected="path,label")
    return [(line, row[0].strip(), row[1].strip()) for line, row in rows]


def _image_files(folder: Path, parts: tuple[str, ...], skipped: _Skipped) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield the image files below a folder and their path parts, in sorted order."""
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name.startswith("."):
            continue
        inner = (*parts, entry.name)
        if entry.is_dir():
            yield from _image_files(Path(entry.path), inner, skipped)
        elif is_image_file(entry.name):
            yield entry.path, inner
        else:
            skipped.others += 1


def _file_sample(path: str, parts: tuple[str, ...], label: int | None, keys: _Keys) -> Sample:
    try:
        status = os.stat(path)
    except OSError as error:
        raise DataError("cannot read the image", where=path, got=error.strerror or str(error)) from error
    stem, _, extension = parts[-1].rpartition(".")
    extension = "jpg" if extension.lower() in ("jpe", "jfif") else extension.lower()
    image = FileImage(path, status.st_size, status.st_mtime_ns)
    return Sample(keys.take((*parts[:-1], stem)), extension, image, label)


class _Keys:
    """Generator of valid and unique keys."""

    def __init__(self) -> None:
        self.taken: set[str] = set()

    def take(self, parts: Sequence[str]) -> str:
        folders, stem = parts[:-1], parts[-1].replace(".", "_")
        key = "/".join((*folders, stem)).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        key = _LEADING_UNDERSCORES.sub("_", _CONTROL.sub("_", key))
        unique, number = key, 1
        while unique in self.taken:
            number += 1
            unique = f"{key}-{number}"
        self.taken.add(unique)
        return unique


@dataclass
class _Skipped:
    """Counts of files that are not written, to report them."""

    others: int = 0
    loose: int = 0

    def notes(self) -> tuple[str, ...]:
        notes = [f"{self.others} files that are not images were skipped"] if self.others else []
        notes += [f"{self.loose} images outside class folders were skipped"] if self.loose else []
        return tuple(notes)
