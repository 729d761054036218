"""The ledger, proved again: the parts against the metrics, and the shards against the parts.

    parts ─► fold ─► the bytes of metrics.json and of the confusion files
    shards ─► index ─► number, keys, order, bytes, fault, labels and reasons of every part

`vitscore metrics DIR --check` ends here. The parts say of themselves how many samples their shards hold; whether that
is so, only the shards can tell, so each is opened and indexed anew. Labels are read again, images are not: what a model
predicted is proved only as far as the metrics depend on it. Needs no model and no torch.
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
    """What was proved."""

    shards: int
    samples: int
    scored: int
    bad: int
    has_labels: bool
    """Whether labels were derived again; not where the file of `--labels` is gone."""

    @property
    def document(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def lines(self) -> list[str]:
        lines = [f"{self.shards:,} shards, {self.samples:,} samples: every sample is in one part, once"]
        lines.append(f"{self.scored:,} scored and {self.bad:,} bad; metrics.json and the confusion files are theirs")
        return lines if self.has_labels else [*lines, "labels were not checked: the file of --labels is not there"]


def check_run(
    folder: Path, *, shards: Sequence[str] = (), allow_pipe: bool = False, cache_dir: Path | None = None
) -> Checked:
    """Prove the ledger of the finished run in `folder`; remote shards are fetched anew.

    Args:
        folder: the run's.
        shards: where its shards are now; by default where run.json says, which keeps URLs without secrets.
        allow_pipe: whether `shards` may be commands.
        cache_dir: where remote and compressed shards lie while they are read.

    Raises:
        UsageError: there is no run, or `shards` names none.
        SetupError: a shard cannot be reached.
        LedgerError: the first difference, and the shard or file that has it.
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
    """The run's parts; unlike a fold, which passes over what is not of this run, a proof wants nothing else there."""
    for path in sorted((folder / "parts").glob("*.parquet")):
        footer = read_footer(path) if PART_NAME.fullmatch(path.name) else None
        if footer is None:
            raise _difference("not a part", str(path), "a whole part of this run", "another kind of file")
        if footer.identity != record["identity_hash"]:
            wanted, got = record["identity_hash"][:12], footer.identity[:12]
            raise _difference("part of another run", f"{footer.shard} in {path}", f"identity {wanted}", got)
    return finished_parts(folder / "parts", record["identity_hash"])


def _check_files(folder: Path, folded: Folded) -> None:
    """The files of figures are, byte for byte, what the parts come to."""
    wanted = {"metrics.json": json_bytes(folded.document)}
    wanted |= {f"confusion_{name}.npz": confusion_bytes(confusion) for name, confusion in folded.confusions.items()}
    for name, content in wanted.items():
        try:
            found = (folder / name).read_bytes()
        except OSError as error:
            raise _difference("file cannot be read", str(folder / name), "a file", error.strerror or "none") from None
        if found != content:
            what = _first_difference(content, found) if name == "metrics.json" else "other counts"
            raise LedgerError(
                "not what the parts come to",
                where=str(folder / name),
                got=what,
                next_step=f"`vitscore metrics {folder}` writes it again from the parts.",
            )


def _first_difference(wanted: bytes, found: bytes) -> str:
    """Where two documents differ first: a dotted name and both values."""
    try:
        there, here = _leaves(json.loads(found)), _leaves(json.loads(wanted))
    except ValueError:
        return "no JSON"
    for name in [*here, *there]:
        if name not in there or name not in here or there[name] != here[name]:
            return f"{name} {there.get(name, 'missing')} instead of {here.get(name, 'nothing')}"
    return "the same figures in other bytes"


def _leaves(value: Any, name: str = "") -> dict[str, Any]:
    """A document's values by dotted names."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    below = {inner: leaf for key, each in items for inner, leaf in _leaves(each, f"{name}.{key}".strip(".")).items()}
    return below or {name: value}


def _check_listing(listed: Sequence[Mapping[str, Any]], parts: Mapping[int, tuple[Path, Footer]]) -> None:
    """Every shard of the list has its part; that no other is there, the fold has seen."""
    for position, row in enumerate(listed):
        if row["ordinal"] != position:
            raise _difference("shards.parquet has a gap", row["name"], f"number {position}", str(row["ordinal"]))
        if position not in parts:
            raise LedgerError("shard has no part", where=row["name"], next_step="The run's own command goes on.")


def _find_shards(
    listed: Sequence[Mapping[str, Any]], specs: Sequence[str], *, split: str, allow_pipe: bool
) -> list[Shard]:
    """The shards of the run, where they are now: by name, else by base name where it is unique."""
    try:
        found = locate(specs, split=split, allow_pipe=allow_pipe).shards
    except UsageError as error:
        raise UsageError(
            "shards cannot be found",
            where=", ".join(map(public_spec, specs)),
            got=str(error).rstrip("."),
            next_step="Name them with --shards.",
        ) from None
    names = [row["name"] for row in listed]
    places = []
    for name, shards in zip(names, find_again(names, found), strict=True):
        if len(shards) != 1:
            got = "none" if not shards else f"{len(shards)} of that name"
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
    """How the run read labels; None where its file of labels is gone."""
    options = record["options"]
    overrides = None
    if options["labels"]:
        path = Path(options["labels"])
        if not path.is_file():
            return None
        if (found := digest_file(path)) != (wanted := record["identity"]["labels"]):
            raise _difference("labels have changed", str(path), f"sha256 {wanted[:12]}", found[:12])
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
    """Index a shard again and compare its part; returns how many samples the limit leaves to the next."""
    labels = rule or LabelRule(None)
    with OpenShard(place, image_key=image_key, labels=labels, will_read=False, cache=cache) as opened:
        _require_reached(footer, opened)
        if opened.fault != footer.fault:
            hint = (
                f"Looked for at {public_spec(place.path)}; name the shards with --shards."
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
            raise _difference("number of samples", footer.shard, f"{num_rows}, as in the shard", str(footer.expected))
        table = pq.read_table(path, columns=["key", "label", "reason"])
        _check_keys(footer, opened.keys[:num_rows], table["key"].to_pylist())
        if rule is not None:
            _check_labels(footer, opened, table)
    return None if left is None else left - num_rows


def _require_reached(footer: Footer, opened: OpenShard) -> None:
    """What was not there to be read, then or now, proves nothing."""
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
            next_step="The run's own command scores it now.",
        )


def _check_keys(footer: Footer, expected: Sequence[str], found: Sequence[str]) -> None:
    for row, (there, here) in enumerate(zip(expected, found, strict=True)):
        if there != here:
            raise _difference("keys differ", f"{footer.shard}, sample {row}", there, here)


def _check_labels(footer: Footer, opened: OpenShard, table: pa.Table) -> None:
    """Labels, and the reasons that stand before any image is decoded."""
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
