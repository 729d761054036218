"""Shards and corpora as values: names, paths and sizes.

`locate` makes them from the arguments of a command; nothing is opened here.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vitscore.shards.redaction import is_remote, public_name

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class Shard:
    """One shard: its place in the list, its name as listed, the path to open, and its size where it was seen.

    The path of a remote shard may hold secrets and is never told; the name has none.
    """

    ordinal: int
    name: str
    path: str = field(repr=False)
    num_bytes: int | None
    etag: str | None = None


@dataclass(frozen=True)
class Corpus:
    """The shards of a run, and the class names and templates that came with them.

    Where several side files differ, the names are None and the source says which files differ.
    """

    shards: tuple[Shard, ...]
    classes: tuple[str, ...] | None
    classes_source: str | None
    templates: tuple[str, ...] | None
    templates_source: str | None


def readable_name(name: str) -> str:
    """Return a name that can be written as UTF-8, with other bytes as backslash escapes."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def corpus_names(shards: Sequence[Shard]) -> list[str]:
    """The shards' names below the folder they share: the same wherever the corpus lies."""
    paths = [location_of(shard.path) for shard in shards]
    if not paths:
        return []
    root = os.path.commonpath([os.path.dirname(path) for path in paths])
    return [readable_name(os.path.relpath(path, root).replace(os.sep, "/")) for path in paths]


def find_again(names: Sequence[str], shards: Sequence[Shard]) -> list[list[Shard]]:
    """For each name of an older list the shards that may be it: the one of that name, else those of its base name."""
    by_name = {shard.name: [shard] for shard in shards}
    by_base: dict[str, list[Shard]] = {}
    for shard in shards:
        by_base.setdefault(_base_name(shard.name), []).append(shard)
    return [by_name.get(name) or by_base.get(_base_name(name), []) for name in names]


def _base_name(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2]


def location_of(path: str) -> str:
    """Identify a shard by an absolute path; a URL's scheme and host are its first folders."""
    return f"/{public_name(path).replace('://', '/')}" if is_remote(path) else os.path.abspath(path)
