"""Text and JSON of `vitscore shards`: summaries, columns, sizes. Values in, text out; `cli.shards` prints it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vitscore.errors import UsageError
from vitscore.text.console import size_text

if TYPE_CHECKING:
    from vitscore.shards.listing import ShardSummary

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def summary_entry(summary: ShardSummary) -> dict[str, Any]:
    return {
        "shard": summary.name,
        "samples": summary.num_samples,
        "bytes": summary.num_bytes,
        "formats": summary.formats,
        "classes": len(summary.label_ids),
        "unlabelled": summary.num_unlabelled,
        "bad": summary.num_bad,
        "reasons": summary.reasons,
        "fault": summary.fault,
        "notes": list(summary.notes),
    }


def total_of(summaries: Sequence[ShardSummary], class_names: Sequence[str] | None) -> dict[str, Any]:
    """Return the totals over all shards, with the keys of `summary_entry`."""
    formats: dict[str, int] = {}
    for summary in summaries:
        for extension, count in summary.formats.items():
            formats[extension] = formats.get(extension, 0) + count
    return {
        "shards": len(summaries),
        "samples": sum(summary.num_samples for summary in summaries),
        "bytes": sum(summary.num_bytes or 0 for summary in summaries),
        "formats": dict(sorted(formats.items())),
        "classes": len(frozenset[int]().union(*(summary.label_ids for summary in summaries))),
        "class_names": len(class_names) if class_names is not None else None,
        "unlabelled": sum(summary.num_unlabelled for summary in summaries),
        "bad": sum(summary.num_bad for summary in summaries),
        "fault": None,
    }


def summary_cells(entry: dict[str, Any], name: str) -> list[str]:
    formats = " ".join(f"{extension}:{count}" for extension, count in entry["formats"].items())
    size = "-" if entry["bytes"] is None else size_text(entry["bytes"])
    figures = [str(entry["samples"]), size, formats or "-", str(entry["classes"]), str(entry["bad"])]
    return [name, *figures, entry["fault"] or ""]


def column_lines(header: list[str], rows: list[list[str]]) -> list[str]:
    """Return aligned plain text; the last column is omitted if it is empty in every row."""
    lines = [header, *([printable(cell) for cell in row] for row in rows)]
    if not any(row[-1] for row in rows):
        lines = [line[:-1] for line in lines]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    padded = ([cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines)
    return ["  ".join(cells).rstrip() for cells in padded]


def parse_size(text: str) -> int:
    """Return the number of bytes that `256MB`, `1.5GiB` or `100000` denotes.

    Raises:
        UsageError: the text is not a size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", text.upper())
    if match is None or match[2] not in _UNITS or float(match[1]) <= 0:
        raise UsageError("unknown size", where="--shard-size", expected="a size such as 256MB", got=text)
    return int(float(match[1]) * _UNITS[match[2]])


def printable(text: str) -> str:
    """Return `text` with control characters escaped: names come from data and must not control the terminal."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)
