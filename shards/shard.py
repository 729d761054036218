"""Shards and corpora as values: names, paths and sizes.

`locate` creates them from the arguments of a command. Nothing is opened here.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field

from vitscore.shards.redaction import is_remote, public_name


@dataclass(frozen=True)
class Shard:
    """One shard: its position in the list, its name as listed, the path to open, and its size if known.

    The path of a remote shard may contain secrets and is never shown; the name contains none.
    """

    ordinal: int
    name: str
    path: str = field(repr=False)
    num_bytes: int | None
    etag: str | None = None


@dataclass(frozen=True)
class Corpus:
    """The shards of a run, with the class names and templates from their side files.

    If side files disagree, the names or templates are None and the source names the two files.
    """

    shards: tuple[Shard, ...]
    classes: tuple[str, ...] | None
    classes_source: str | None
    templates: tuple[str, ...] | None
    templates_source: str | None


def readable_name(name: str) -> str:
    """Return a name that can be encoded as UTF-8, with other bytes as backslash escapes."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def corpus_names(shards: Sequence[Shard]) -> list[str]:
    """Return the shards' names relative to their common folder, which stay the same if the corpus is moved."""
    paths = [location_of(shard.path) for shard in shards]
    if not paths:
        return []
    root = os.path.commonpath([os.path.dirname(path) for path in paths])
    return [readable_name(os.path.relpath(path, root).replace(os.sep, "/")) for path in paths]


def find_again(names: Sequence[str], shards: Sequence[Shard]) -> list[list[Shard]]:
    """Match the names of an older list: for each name, the shard with that name, else those with its base name."""
    by_name = {shard.name: [shard] for shard in shards}
    by_base: dict[str, list[Shard]] = {}
    for shard in shards:
        by_base.setdefault(_base_name(shard.name), []).append(shard)
    return [by_name.get(name) or by_base.get(_base_name(name), []) for name in names]


def _base_name(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2]


def location_of(path: str) -> str:
    """Return an absolute path that identifies a shard; for a URL, scheme and host are the first folders."""
    return f"/{public_name(path).replace('://', '/')}" if is_remote(path) else os.path.abspath(path)
