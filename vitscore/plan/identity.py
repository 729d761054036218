"""What makes two runs the same run.

A run may be resumed by the command that started it, and by no other: the identity is everything that can change a
prediction or its place in the ledger. It holds no time, no path and no machine, so a folder can move.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def digest(value: Any) -> str:
    """A sha256 of a JSON value, independent of the order of keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def digest_file(path: Path) -> str:
    """A sha256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def corpus_fingerprint(names: Sequence[str], sizes: Sequence[int | None], etags: Sequence[str | None]) -> str:
    """Shard names below their common root, sizes, and ETags where a store gave them; the order counts."""
    rows = zip(names, sizes, etags, strict=True)
    return digest([[name, size] if etag is None else [name, size, etag] for name, size, etag in rows])


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Each setting in which two identities differ, in words: `precision: fp32 there, bf16 here`."""
    found: list[str] = []
    for key in sorted({*old, *new}):
        there, here = old.get(key), new.get(key)
        if there == here:
            continue
        if isinstance(there, Mapping) and isinstance(here, Mapping):
            found.extend(differences(there, here, f"{prefix}{key}."))
        else:
            found.append(f"{prefix}{key}: {shorten(there)} there, {shorten(here)} here")
    return found


def shorten(value: Any) -> str:
    """A value for a message: hashes by their first digits, nothing as `none`."""
    if value is None:
        return "none"
    if isinstance(value, Mapping):
        return "set"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    is_hash = len(text) == 64 and all(c in "0123456789abcdef" for c in text)
    return text[:12] if is_hash else text if len(text) <= 60 else text[:57] + "..."
