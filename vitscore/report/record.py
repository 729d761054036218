"""The end of the page: the ledger with its reasons, and how the figures were made, from run.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vitscore.metrics.notation import percent
from vitscore.report.data import Findings

KNOWN = {"schema", "identity", "identity_hash", "options", "choices", "classes", "classes_source", "templates"}
KNOWN |= {"models", "corpus", "versions", "hardware", "sessions"}
"""Entries of run.json that the page lays out; it lists the others name by name."""
SHOWN_SHARDS = 50
SESSION_COLUMNS = {name: name for name in ("started", "ended", "launcher", "ranks", "images")} | {
    "images_per_s": "images/s",
    "waiting_s": "seconds waiting",
    "rows_again_in_fp32": "again in fp32",
    "peak_rss_bytes": "peak memory",
    "stopped_by": "stopped by",
}


@dataclass(frozen=True)
class Table:
    """A table whose first column names its rows."""

    caption: str
    heads: Sequence[str]
    rows: Sequence[Sequence[Any]]
    kind: str = "plain"
    """Its class in page.css; `facts` shows no heads."""


@dataclass(frozen=True)
class Ledger:
    """Samples and shards that are bad."""

    reasons: Table
    shards: Table
    examples: Table


@dataclass(frozen=True)
class Record:
    """How the figures were made; `details` are folded away under their titles."""

    choices: list[Table]
    machine: list[Table]
    sessions: list[Table]
    details: list[tuple[str, Table]]


def ledger(findings: Findings) -> Ledger:
    counted = findings.document["ledger"]
    reasons = [(why, f"{n:,}", f"{percent(n / counted['expected'], 2)}%") for why, n in counted["reasons"].items()]
    shards = list(counted["shards"]["bad"].items())
    more = f" The first {SHOWN_SHARDS} of {len(shards):,}." if len(shards) > SHOWN_SHARDS else ""
    title = f"Bad shards; their readable samples are scored.{more}"
    examples = "Bad samples, up to 20 for each reason; the parts hold all of them."
    return Ledger(
        Table("Reasons for bad samples.", ("reason", "samples", "of all"), reasons),
        Table(title, ("shard", "reason"), shards[:SHOWN_SHARDS]),
        Table(examples, ("key", "shard", "reason"), findings.chosen.bad),
    )


def record(findings: Findings) -> Record:
    """Models, choices with their reasons, hardware, versions, sessions and options; then the rest of run.json."""
    kept = findings.record
    hardware = [(name.removesuffix("_bytes").replace("_", " "), text) for name, text in texts(kept.get("hardware", {}))]
    details = [("All options", options_table(kept))]
    for name in sorted(kept.keys() - KNOWN):
        rest = Table(f"From run.json: {name}.", ("", ""), leaves(kept[name]))
        details.append((name.replace("_", " "), rest))
    return Record(
        [models_table(kept), choices_table(kept)],
        [facts("Hardware", hardware), facts("Versions", texts(kept.get("versions", {})))],
        [sessions_table(kept), audit_table(kept)],
        details,
    )


def facts(caption: str, rows: Sequence[tuple[str, str]]) -> Table:
    return Table(caption, ("", ""), rows, kind="facts")


def texts(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(name, value_text(name, value)) for name, value in values.items()]


def models_table(record: Mapping[str, Any]) -> Table:
    rows = []
    for name, entry in record.get("models", {}).items():
        source, parameters = entry.get("checkpoint", "–"), value_text("", entry.get("parameters"))
        digest = str(entry.get("fingerprint") or "–")[:12]
        rows.append((name, source, entry.get("kind", "–"), parameters, entry.get("matching", "–"), digest))
    heads = ("model", "checkpoint", "kind", "parameters", "head to classes", "sha256")
    return Table("Models, and how their heads were matched to the classes.", heads, rows)


def choices_table(record: Mapping[str, Any]) -> Table:
    rows = [
        (name.replace("_", " "), value_text(name, choice.get("value")), choice.get("reason", ""))
        for name, choice in record.get("choices", {}).items()
    ]
    return Table("Automatic choices and their reasons.", ("setting", "value", "reason"), rows)


def sessions_table(record: Mapping[str, Any]) -> Table:
    sessions = record.get("sessions", [])
    keys = [key for key in SESSION_COLUMNS if any(session.get(key) is not None for session in sessions)]
    rows = [[value_text(key, session.get(key)) for key in keys] for session in sessions if keys]
    return Table("Sessions of the run; times are UTC.", [SESSION_COLUMNS[key] for key in keys], rows)


def audit_table(record: Mapping[str, Any]) -> Table:
    """Differences that the run's preprocessing and precision made, as the last audited session measured them."""
    audits = [session["audit"] for session in record.get("sessions", []) if session.get("audit")]
    rows = []
    for name, audit in (audits[-1] if audits else {}).items():
        for kind, other in (("against_processor", "transformers' own pixels"), ("against_fp32", "fp32")):
            if (figures := audit.get(kind)) is not None:
                levels = f"{figures['mean_levels']:.2f}" if "mean_levels" in figures else "–"
                differs = f"{figures['top1_differs']:,} of {audit['images']:,}"
                rows.append((name, other, levels, differs, f"{figures['largest_prob_difference']:.2g}"))
    heads = ("model", "against", "mean difference, of 255 levels", "another answer", "largest change of a probability")
    return Table("Effect of preprocessing and precision on the first images of the run.", heads, rows)


def options_table(record: Mapping[str, Any]) -> Table:
    rows = texts(record.get("options", {})) + texts(record.get("corpus", {}))
    rows += [("templates", value) for value in record.get("templates") or ()]
    rows += [(name, record[name]) for name in ("classes_source", "identity_hash") if name in record]
    caption = "Options as given; a dash is a default or an automatic choice."
    return Table(caption, ("option", "value"), rows, kind="facts")


def value_text(name: str, value: Any) -> str:
    """A recorded value in readable form."""
    if value is None or value == []:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if name.endswith("bytes") and isinstance(value, int):
        return f"{value / 2**30:.1f} GiB" if value >= 2**29 else f"{value / 2**20:.1f} MiB"
    if isinstance(value, int | float):
        return f"{value:,}" if isinstance(value, int) else f"{value:,.2f}"
    if isinstance(value, list):
        return ", ".join(str(item) for item in value)
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {value_text('', inner)}" for key, inner in value.items())
    return str(value).replace("T", " ").replace("Z", "") if name in ("started", "ended") else str(value)


def leaves(value: Any, name: str = "") -> list[tuple[str, str]]:
    """A nested value as dotted names and texts."""
    if isinstance(value, Mapping) and value:
        return [leaf for key, inner in value.items() for leaf in leaves(inner, f"{name}.{key}".strip("."))]
    if isinstance(value, list) and any(isinstance(item, Mapping | list) for item in value):
        return [leaf for index, inner in enumerate(value) for leaf in leaves(inner, f"{name}.{index}".strip("."))]
    return [(name, value_text(name.rpartition(".")[2], value))]
