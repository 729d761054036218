"""Explain why a folder holds no shards, and name the command that makes them.

Used by the search for shards if a folder contains no tar. Inspects only names, and at most 10,000 of them.
"""

from __future__ import annotations

import itertools
import os
import shlex
from collections.abc import Iterator
from pathlib import Path

from vitscore.errors import UsageError

CIFAR_FOLDERS = ("cifar-10-batches-bin", "cifar-100-binary", "cifar-10-batches-py", "cifar-100-python")
CIFAR_FILES = ("data_batch_1.bin", "test_batch.bin", "test.bin", "train.bin", "batches.meta", "fine_label_names.txt")
IMAGE_FILE_EXTENSIONS = frozenset("jpg jpeg jpe jfif png webp bmp tif tiff jp2 j2k gif avif ppm pgm pbm pnm".split())
MAX_NAMES_LOOKED_AT = 10_000


def is_image_file(name: str) -> bool:
    """Whether a file has the extension of an image format."""
    return not name.startswith(".") and name.rpartition(".")[2].lower() in IMAGE_FILE_EXTENSIONS and "." in name


def explain_unusable_folder(spec: str) -> UsageError:
    """Return the error for a folder without shards; if it holds images, with the command that makes shards of them."""
    folder = Path(spec)
    if _is_cifar(folder) or _holds_images(folder):
        output = f"{os.path.normpath(spec)}-shards"
        return UsageError(
            "folder holds images, not shards",
            where=spec,
            expected="*.tar",
            next_step=f"Make shards first: vitscore shards make {shlex.quote(spec)} -o {shlex.quote(output)}",
        )
    with_tars = sorted({file.parent.name for file in itertools.islice(folder.glob("*/*.tar"), MAX_NAMES_LOOKED_AT)})
    hint = f"Its subfolder {with_tars[0]} has some: pass {os.path.join(spec, with_tars[0])}." if with_tars else ""
    return UsageError("no shards in the folder", where=spec, expected="*.tar", got="none", next_step=hint)


def _is_cifar(folder: Path) -> bool:
    return any((folder / name).is_dir() for name in CIFAR_FOLDERS) or any(
        (folder / name).is_file() for name in CIFAR_FILES
    )


def _holds_images(folder: Path) -> bool:
    return any(is_image_file(name) for name in itertools.islice(_file_names(folder), MAX_NAMES_LOOKED_AT))


def _file_names(folder: Path) -> Iterator[str]:
    for _, folders, files in os.walk(folder):
        folders.sort()
        yield from files
