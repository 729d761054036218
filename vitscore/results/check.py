"""Verify a finished run: its metrics against the parts, and the parts against the shards.

    parts ─► fold ─► the bytes of metrics.json and of the confusion files
    shards ─► index ─► number, keys, order, bytes, fault, labels and reasons of every part

This is `vitscore metrics DIR --check`. A part records how many samples its shard holds; only the shard can confirm it,
so every shard is opened and indexed again. Labels are read again, images are not, so predictions are verified only as
far as the metrics depend on them. Needs no model and no torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vitscore.errors import LedgerError, SetupError, UsageError
from vitscore.metrics.fold import Folded, confusion_bytes, refold
from vitscore.plan.identity import digest_file
from vitscore.rundir.folder import require_record
from vitscore.rundir.parts import PART_NAME, Footer, finished_parts, read_footer
from vitscore.shards.labels import LabelRule, load_labels
from vitscore.shards.locate import locate
from vitscore.shards.reasons import LABEL_REASONS, MISSING, UNREACHABLE, reason_kind
from vitscore.shards.redaction import public_spec
from vitscore.shards.remote.cache import Cache
from vitscore.shards.samples import OpenShard
from vitscore.shards.shard import Shard, find_again
from vitscore.system.durable import json_bytes

ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class Checked:
    """Totals of a verified run."""

    shards: int
    samples: int
    scored: int
    bad: int
    has_labels: bool
    """Whether labels were verified; they cannot be if the `--labels` file is missing."""

    @property
    def document(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def lines(self) -> list[str]:
        lines = [f"{self.shards:,} shards, {self.samples:,} samples: every sample is in the parts exactly once"]
        lines.append(f"{self.scored:,} scored and {self.bad:,} bad; metrics.json and the confusion files match")
        return lines if self.has_labels else [*lines, "labels were not checked: the --labels file is missing"]


def check_run(
    folder: Path, *, shards: Sequence[str] = (), allow_pipe: bool = False, cache_dir: Path | None = None
) -> Checked:
    """Verify the finished run in `folder`; remote shards are fetched again.

    Args:
        folder: the run's folder.
        shards: where its shards are now; by default as recorded in run.json, which keeps URLs without secrets.
        allow_pipe: whether `shards` may be commands.
        cache_dir: folder for remote and compressed shards while they are read.

    Raises:
        UsageError: the folder holds no run, or `shards` names no shard.
        SetupError: a shard cannot be reached.
        LedgerError: there is a difference; the error names the first one and its shard or file.
    """
    record = require_record(folder)
    parts = _parts_of(folder, record)
    folded = refold(folder, parts=parts)
    _check_files(folder, folded)
    options = record["options"]
    listed = pq.read_table(folder / "shards.parquet").sort_by("ordinal").to_pylist()
    _check_listing(listed, parts)
    named = tuple(shards) or tuple(options["shards"])
    places = _find_shards(listed, named, split=options["split"], allow_pipe=allow_pipe)
    cache = Cache(cache_dir)
    rule = _label_rule(record)
    left = options["limit"]
    for row, place in zip(listed, places, strict=True):
        path, footer = parts[row["ordinal"]]
        left = _check_shard(path, footer, place, rule, cache=cache, image_key=options["image_key"], left=left)
    ledger = folded.document["ledger"]
    return Checked(len(listed), ledger["expected"], ledger["scored"], ledger["bad"], has_labels=rule is not None)


def _parts_of(folder: Path, record: Mapping[str, Any]) -> dict[int, tuple[Path, Footer]]:
    """Return the run's parts; unlike a fold, which ignores them, refuse files that are not parts of this run."""
    for path in sorted((folder / "parts").glob("*.parquet")):
        footer = read_footer(path) if PART_NAME.fullmatch(path.name) else None
        if footer is None:
            raise _difference("not a part", str(path), "a whole part of this run", "another kind of file")
        if footer.identity != record["identity_hash"]:
            wanted, got = record["identity_hash"][:12], footer.identity[:12]
            raise _difference("part of another run", f"{footer.shard} in {path}", f"identity {wanted}", got)
    return finished_parts(folder / "parts", record["identity_hash"])


def _check_files(folder: Path, folded: Folded) -> None:
    """Check that metrics.json and the confusion files are, byte for byte, the result of folding the parts."""
    wanted = {"metrics.json": json_bytes(folded.document)}
    wanted |= {f"confusion_{name}.npz": confusion_bytes(confusion) for name, confusion in folded.confusions.items()}
    for name, content in wanted.items():
        try:
            stored = (folder / name).read_bytes()
        except OSError as error:
            raise _difference("file cannot be read", str(folder / name), "a file", error.strerror or "none") from None
        if stored != content:
            got = _first_difference(content, stored) if name == "metrics.json" else "other counts"
            raise LedgerError(
                "file does not match the parts",
                where=str(folder / name),
                got=got,
                next_step=f"`vitscore metrics {folder}` writes it again from the parts.",
            )


def _first_difference(wanted: bytes, stored: bytes) -> str:
    """Describe the first difference of two JSON documents: a dotted name and both values."""
    try:
        got, expected = _leaves(json.loads(stored)), _leaves(json.loads(wanted))
    except ValueError:
        return "no JSON"
    for name in [*expected, *got]:
        if name not in got or name not in expected or got[name] != expected[name]:
            return f"{name} {got.get(name, 'missing')} instead of {expected.get(name, 'nothing')}"
    return "the same figures in other bytes"


def _leaves(value: Any, name: str = "") -> dict[str, Any]:
    """Return a document's leaf values by dotted name."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    leaves = {path: leaf for key, item in items for path, leaf in _leaves(item, f"{name}.{key}".strip(".")).items()}
    return leaves or {name: value}


def _check_listing(listed: Sequence[Mapping[str, Any]], parts: Mapping[int, tuple[Path, Footer]]) -> None:
    """Check that every listed shard has a part; the fold has checked that there are no others."""
    for position, row in enumerate(listed):
        if row["ordinal"] != position:
            raise _difference("shards.parquet has a gap", row["name"], f"number {position}", str(row["ordinal"]))
        if position not in parts:
            raise LedgerError("shard has no part", where=row["name"], next_step="The run's command scores it.")


def _find_shards(
    listed: Sequence[Mapping[str, Any]], specs: Sequence[str], *, split: str, allow_pipe: bool
) -> list[Shard]:
    """Return where the run's shards are now, matched by name, or by base name if that is unique."""
    try:
        located = locate(specs, split=split, allow_pipe=allow_pipe).shards
    except UsageError as error:
        raise UsageError(
            "shards cannot be found",
            where=", ".join(map(public_spec, specs)),
            got=str(error).rstrip("."),
            next_step="Name them with --shards.",
        ) from None
    names = [row["name"] for row in listed]
    places = []
    for name, shards in zip(names, find_again(names, located), strict=True):
        if len(shards) != 1:
            got = f"{len(shards)} of that name" if shards else "none"
            raise LedgerError(
                "shard cannot be found",
                where=name,
                expected="one shard",
                got=got,
                next_step="Name the run's shards with --shards.",
            )
        places.append(shards[0])
    return places


def _label_rule(record: Mapping[str, Any]) -> LabelRule | None:
    """Return the rule by which the run read labels; None if its `--labels` file is missing."""
    options = record["options"]
    overrides = None
    if options["labels"]:
        path = Path(options["labels"])
        if not path.is_file():
            return None
        if (digest := digest_file(path)) != (wanted := record["identity"]["labels"]):
            raise _difference("labels have changed", str(path), f"sha256 {wanted[:12]}", digest[:12])
        overrides = load_labels(path)
    return LabelRule(record["classes"], label_key=options["label_key"], overrides=overrides)


def _check_shard(
    path: Path,
    footer: Footer,
    place: Shard,
    rule: LabelRule | None,
    *,
    cache: Cache,
    image_key: str | None,
    left: int | None,
) -> int | None:
    """Index a shard again and compare its part; return how much of the limit is left for the next shards."""
    labels = rule or LabelRule(None)
    with OpenShard(place, image_key=image_key, labels=labels, will_read=False, cache=cache) as opened:
        _require_reached(footer, opened)
        if opened.fault != footer.fault:
            hint = (
                f"It was expected at {public_spec(place.path)}; name the shards with --shards."
                if opened.fault == MISSING
                else ""
            )
            raise LedgerError(
                "shard has changed",
                where=footer.shard,
                expected=footer.fault or "no fault",
                got=opened.fault or "no fault",
                next_step=hint,
            )
        if opened.num_bytes != footer.num_bytes:
            got = f"{opened.num_bytes}"
            raise _difference("shard has changed", footer.shard, f"{footer.num_bytes} bytes", got)
        num_rows = opened.num_samples if left is None else min(left, opened.num_samples)
        if num_rows != footer.expected:
            wanted = f"{num_rows}, as in the shard"
            raise _difference("number of samples differs", footer.shard, wanted, str(footer.expected))
        table = pq.read_table(path, columns=["key", "label", "reason"])
        _check_keys(footer, opened.keys[:num_rows], table["key"].to_pylist())
        if rule is not None:
            _check_labels(footer, opened, table)
    return None if left is None else left - num_rows


def _require_reached(footer: Footer, opened: OpenShard) -> None:
    """Refuse a shard that is unreachable now or was when it was scored, since nothing can be verified."""
    if reason_kind(opened.fault or "") == UNREACHABLE:
        raise SetupError(
            "shard cannot be reached",
            where=opened.shard.name,
            got=opened.fault or "",
            next_step="Name the shards with --shards, with the credentials that they need.",
        )
    if reason_kind(footer.fault or "") == UNREACHABLE:
        raise LedgerError(
            "shard was not reached",
            where=footer.shard,
            got=footer.fault or "",
            next_step="The run's command tries it again.",
        )


def _check_keys(footer: Footer, expected: Sequence[str], stored: Sequence[str]) -> None:
    for row, (wanted, got) in enumerate(zip(expected, stored, strict=True)):
        if wanted != got:
            raise _difference("keys differ", f"{footer.shard}, sample {row}", wanted, got)


def _check_labels(footer: Footer, opened: OpenShard, table: pa.Table) -> None:
    """Compare labels, and the reasons that do not depend on decoding."""
    labels, reasons = table["label"].to_numpy(), table["reason"].to_pylist()
    for start in range(0, len(labels), ROWS_AT_ONCE):
        stop = min(start + ROWS_AT_ONCE, len(labels))
        expected, derived = opened.read_labels(start, stop)
        for offset in np.flatnonzero(expected != labels[start:stop]).tolist():
            where = f"{footer.shard}[{opened.keys[start + offset]}]"
            raise _difference("label differs", where, str(expected[offset]), str(labels[start + offset]))
        for row, wanted in enumerate(derived, start=start):
            got = reasons[row]
            is_label = got is not None and reason_kind(got) in LABEL_REASONS
            if (wanted is not None and wanted != got) or (wanted is None and is_label):
                where = f"{footer.shard}[{opened.keys[row]}]"
                raise _difference("reason differs", where, wanted or "none", got or "none")


def _difference(what: str, where: str, expected: str, got: str) -> LedgerError:
    return LedgerError(what, where=where, expected=expected, got=got)
