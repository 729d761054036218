"""Identity of a run: everything that can change a prediction or its place in the ledger.

A run is resumed only by a command with the same identity. The identity contains no time, path or machine, so that a
run's folder can be moved.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def digest(value: Any) -> str:
    """Return the sha256 of a JSON value, independent of the order of keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def digest_file(path: Path) -> str:
    """Return the sha256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def corpus_fingerprint(names: Sequence[str], sizes: Sequence[int | None], etags: Sequence[str | None]) -> str:
    """Return a digest of shard names below their common root, sizes and known ETags; the order of shards matters."""
    rows = zip(names, sizes, etags, strict=True)
    return digest([[name, size] if etag is None else [name, size, etag] for name, size, etag in rows])


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """List the settings in which two identities differ, in words: `precision: fp32 there, bf16 here`."""
    lines: list[str] = []
    for key in sorted({*old, *new}):
        there, here = old.get(key), new.get(key)
        if there == here:
            continue
        if isinstance(there, Mapping) and isinstance(here, Mapping):
            lines.extend(differences(there, here, f"{prefix}{key}."))
        else:
            lines.append(f"{prefix}{key}: {shorten(there)} there, {shorten(here)} here")
    return lines


def shorten(value: Any) -> str:
    """Format a value for a message: hashes by their first digits, None as `none`."""
    if value is None:
        return "none"
    if isinstance(value, Mapping):
        return "set"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    is_hash = len(text) == 64 and all(c in "0123456789abcdef" for c in text)
    return text[:12] if is_hash else text if len(text) <= 60 else text[:57] + "..."
