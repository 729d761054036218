"""The end of the page: the ledger with its reasons, and how the figures were made, from run.json."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from vitscore.metrics.notation import percent
from vitscore.report.data import Findings

KNOWN = {
    "schema",
    "identity",
    "identity_hash",
    "options",
    "choices",
    "classes",
    "classes_source",
    "templates",
    "models",
    "corpus",
    "versions",
    "hardware",
    "sessions",
}
SHOWN_SHARDS = 50
SESSION_COLUMNS = {
    "started": "started",
    "ended": "ended",
    "launcher": "launcher",
    "ranks": "ranks",
    "images": "images",
    "images_per_s": "images/s",
    "waiting_s": "seconds waiting",
    "rows_again_in_fp32": "again in fp32",
    "peak_rss_bytes": "peak memory",
    "stopped_by": "stopped by",
}


def ledger_section(findings: Findings) -> str:
    ledger = findings.document["ledger"]
    counts = [
        ("in the shards", ledger["expected"]),
        ("scored", ledger["scored"]),
        ("bad", ledger["bad"]),
        ("without a label", ledger["unlabelled"]),
        ("counted twice", ledger["duplicates"]),
    ]
    shards = ledger["shards"]
    items = "".join(f"<div><dt>{title}</dt><dd>{number:,}</dd></div>" for title, number in counts)
    items += f"<div><dt>shards done</dt><dd>{shards['done']:,} of {shards['expected']:,}</dd></div>"
    body = f'<dl class="counts">{items}</dl>'
    if ledger["reasons"]:
        rows = ([reason, f"{n:,}", f"{percent(n / ledger['expected'], 2)}%"] for reason, n in ledger["reasons"].items())
        body += table("Why samples are bad.", ("reason", "samples", "of all"), rows)
    else:
        body += "<p>Every sample of the shards was scored.</p>" if ledger["expected"] else ""
    if shards["bad"]:
        listed = list(shards["bad"].items())[:SHOWN_SHARDS]
        more = f" The first {SHOWN_SHARDS} of {len(shards['bad']):,}." if len(shards["bad"]) > SHOWN_SHARDS else ""
        body += table(f"Bad shards: what could be read of them is scored.{more}", ("shard", "reason"), listed)
    if findings.chosen.bad:
        rows = ([sample.key, sample.shard, sample.reason] for sample in findings.chosen.bad)
        examples = table(
            "Bad samples, up to 20 of each reason; all of them are in the parts.", ("key", "shard", "reason"), rows
        )
        body += f"<details><summary>Bad samples by key</summary>{examples}</details>"
    return body


def table(caption: str, heads: Sequence[str], rows: Iterable[Sequence[Any]], *, kind: str = "") -> str:
    """A table whose first column names its rows; all is escaped here."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in heads)
    body = ""
    for first, *rest in rows:
        cells = "".join(f"<td>{escape(str(cell))}</td>" for cell in rest)
        body += f'<tr><th scope="row">{escape(str(first))}</th>{cells}</tr>'
    label = escape(caption.split(".")[0])
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{label}"><table class="{kind or "plain"}">'
        f"<caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def record_section(findings: Findings) -> str:
    """Models, choices with their reasons, options, versions, hardware, starts; and whatever else run.json has."""
    record = findings.record
    body = models_table(record) + choices_table(record)
    hardware = [
        (name.removesuffix("_bytes").replace("_", " "), value_text(name, value))
        for name, value in record.get("hardware", {}).items()
    ]
    versions = [(name, value_text(name, value)) for name, value in record.get("versions", {}).items()]
    body += (
        '<div class="pair">'
        + "".join(
            table(caption, ("", ""), rows, kind="facts")
            for caption, rows in (("Hardware", hardware), ("Versions", versions))
            if rows
        )
        + "</div>"
    )
    body += sessions_table(record) + audit_table(record)
    options = [(name, value_text(name, value)) for name, value in record.get("options", {}).items()]
    options += [(name, value_text(name, value)) for name, value in record.get("corpus", {}).items()]
    options += [("templates", value) for value in record.get("templates") or ()]
    options += [(name, record[name]) for name in ("classes_source", "identity_hash") if name in record]
    body += folded(
        "All options",
        table(
            "As they were given; none is a default or an automatic choice.", ("option", "value"), options, kind="facts"
        ),
    )
    for name in sorted(record.keys() - KNOWN):
        body += folded(name.replace("_", " "), table(f"As run.json has it: {name}.", ("", ""), leaves(record[name])))
    return body


def folded(title: str, content: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{content}</details>"


def models_table(record: Mapping[str, Any]) -> str:
    rows = [
        (
            name,
            entry.get("checkpoint", "–"),
            entry.get("kind", "–"),
            value_text("", entry.get("parameters")),
            entry.get("matching", "–"),
            str(entry.get("fingerprint") or "–")[:12],
        )
        for name, entry in record.get("models", {}).items()
    ]
    heads = ("model", "checkpoint", "kind", "parameters", "head to classes", "sha256")
    return table("The models, and how their heads were matched to the classes.", heads, rows) if rows else ""


def choices_table(record: Mapping[str, Any]) -> str:
    rows = [
        (name.replace("_", " "), value_text(name, choice.get("value")), choice.get("reason", ""))
        for name, choice in record.get("choices", {}).items()
    ]
    return table("What was chosen, and why.", ("setting", "value", "reason"), rows) if rows else ""


def sessions_table(record: Mapping[str, Any]) -> str:
    sessions = record.get("sessions", [])
    keys = [key for key in SESSION_COLUMNS if any(session.get(key) is not None for session in sessions)]
    rows = [[value_text(key, session.get(key)) for key in keys] for session in sessions]
    heads = [SESSION_COLUMNS[key] for key in keys]
    return table("Starts of the run; times are UTC.", heads, rows) if rows and keys else ""


def audit_table(record: Mapping[str, Any]) -> str:
    """What the run's preprocessing and precision changed, by the last start that looked."""
    audits = [session["audit"] for session in record.get("sessions", []) if session.get("audit")]
    if not audits:
        return ""
    rows = []
    for name, found in audits[-1].items():
        for kind, what in (("against_processor", "transformers' own pixels"), ("against_fp32", "fp32")):
            if (other := found.get(kind)) is not None:
                levels = f"{other['mean_levels']:.2f}" if "mean_levels" in other else "–"
                differs = f"{other['top1_differs']:,} of {found['images']:,}"
                rows.append((name, what, levels, differs, f"{other['largest_prob_difference']:.2g}"))
    heads = ("model", "against", "mean difference, of 255 levels", "another answer", "largest change of a probability")
    return table("What preprocessing and precision changed, on the first images of the run.", heads, rows)


def value_text(name: str, value: Any) -> str:
    """A recorded value as people write it."""
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
