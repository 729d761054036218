"""Recognise, sort and expand names of shards.

Shared by the searches for local and remote shards. Text in, text out; accesses no files.
"""

from __future__ import annotations

import re

from vitscore.errors import UsageError
from vitscore.shards.redaction import public_spec

SHARD_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
LIST_SUFFIXES = (".txt", ".list", ".lst")

_DIGITS = re.compile(r"(\d+)")


def natural_key(name: str) -> tuple[tuple[tuple[int, int | str], ...], str]:
    """Return a sort key that puts 2 before 10; names that differ only in leading zeros keep a fixed order."""
    parts = _DIGITS.split(name)
    return tuple((0, int(part)) if part.isdecimal() else (1, part) for part in parts if part), name


def is_shard_name(name: str) -> bool:
    return name.lower().endswith(SHARD_SUFFIXES)


def expand_braces(spec: str) -> list[str]:
    """Expand brace patterns such as `s-{000..127}.tar` and `{a,b}.tar`; other text is returned as one name.

    Raises:
        UsageError: the braces are unbalanced.
    """
    if "{" not in spec and "}" not in spec:
        return [spec]
    # A dependency of webdataset, imported here because only patterns need it.
    from braceexpand import braceexpand

    try:
        return list(braceexpand(spec))
    except ValueError:
        where, expected = public_spec(spec), "a pattern such as s-{000..127}.tar"
        raise UsageError("unbalanced braces", where=where, expected=expected) from None
