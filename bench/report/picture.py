"""bench.svg and bench.html: the ceilings of the stages, the whole run between its bound and its peers, on one axis.

Reads a folder of benches through stages.py; drawing.py draws. Stages that were not measured are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from vitscore.bench.harness.record import Record, read_all
from vitscore.bench.harness.timing import Figure
from vitscore.bench.report import stages
from vitscore.bench.report.compare import figures_in
from vitscore.bench.report.drawing import Bar, Group, draw, number
from vitscore.bench.report.stages import Rate, Records, as_figure
from vitscore.errors import UsageError
from vitscore.system.durable import make_folder_durably, write_bytes_durably, writing

PIPELINE = "pipeline"
"""In the name of the peer that the first sentence compares with."""


def write_pictures(folder: Path, output: Path) -> list[str]:
    """Draw a folder of benches; returns the files' names, none where there is no rate to draw.

    Raises:
        UsageError: the folder holds no bench.
        SetupError: the pictures cannot be written.
    """
    records = read_all(folder)
    groups = list(groups_of(records))
    if not groups:
        return []
    title, mark, written = conclusion(records), mark_of(records), notes(records)
    drawn = draw(groups, title=title, unit="images/s", notes=written, mark=mark)
    # The page says itself what machine it was, and has its own margins.
    inner = draw(groups, title=title, unit="images/s", notes=written[1:], mark=mark, margin=0)
    with writing(output):
        make_folder_durably(output)
        write_bytes_durably(output / "bench.svg", drawn.encode())
        write_bytes_durably(output / "bench.html", page(records, groups, inner).encode())
    return ["bench.svg", "bench.html"]


def groups_of(records: Records) -> Iterator[Group]:
    """The stages in the order of the flow, then the whole run; only what was measured."""
    for title, bars in (
        ("Reading", reading_bars(records)),
        ("Decoding", decoding_bars(records)),
        ("Forward, each model at its best", forward_bars(records)),
        ("Whole run", whole_bars(records)),
    ):
        drawable = tuple(bar for bar in bars if bar.figure["low"] > 0)
        if drawable:
            yield Group(title, drawable)


def optional(read: Any, *arguments: Any) -> Rate | None:
    """A rate, or None where it was not measured."""
    try:
        found: Rate = read(*arguments)
    except UsageError:
        return None
    return found


def reading_bars(records: Records) -> Iterator[Bar]:
    ours = optional(stages.reading, records)
    if ours is None:
        return
    yield Bar("vitscore", ours.figure)
    yield from peers(ours.record.result[stages.reading_key(ours.record)], "vitscore")


def decoding_bars(records: Records) -> Iterator[Bar]:
    """Ours at its best; the others on as many threads."""
    ours = optional(stages.decoding, records)
    if ours is None:
        return
    yield Bar(ours.name if ours.name.startswith("vitscore") else f"vitscore, {ours.name}", ours.figure)
    rates = ours.record.result.get("images_per_s", {})
    threads = max((int(match[1]) for key in rates if (match := stages.OURS.fullmatch(key))), default=0)
    ending = f", {threads} thread{'s' if threads > 1 else ''}"
    yield from peers({key: found for key, found in rates.items() if key.endswith(ending)}, ours.name)


def forward_bars(records: Records) -> Iterator[Bar]:
    if "forward" in records:
        for found in stages.forwards(records).values():
            yield Bar(found.name, found.figure)


def whole_bars(records: Records) -> Iterator[Bar]:
    for label, kind, read in (
        ("bound: its stages measured alone", "bound", stages.bound),
        ("vitscore run, its loop", "ours", stages.loop),
        ("vitscore run, start included", "ours", stages.whole),
    ):
        found = optional(read, records)
        if found is not None:
            yield Bar(label, found.figure, kind)
    if "whole" in records:
        yield from whole_peers(records["whole"])


def whole_peers(record: Record) -> Iterator[Bar]:
    """Other tools' whole runs: every `images_per_s` that is not ours, by the key above it."""
    for path, found in figures_in(record.result):
        if len(path) == 2 and path[1] == "images_per_s" and path[0] != "vitscore":
            owner = "transformers' " if path[0].startswith(PIPELINE) else ""
            yield Bar(owner + path[0], found, "peer")


def peers(rates: Mapping[str, Any], ours: str) -> Iterator[Bar]:
    """Everything in a table of rates but ours."""
    for name, found in rates.items():
        if name != ours:
            yield Bar(name, as_figure(found, "images/s"), "ours" if name.startswith("vitscore") else "peer")


def mark_of(records: Records) -> Bar | None:
    """The whole run's loop, to be seen against every stage's ceiling."""
    found = optional(stages.loop, records)
    return None if found is None else Bar(f"whole run {number(found.value)}", found.figure)


def conclusion(records: Records) -> str:
    """One sentence: what a whole run reaches, of its bound and against the peer."""
    loop, bound, whole = (optional(read, records) for read in (stages.loop, stages.bound, stages.whole))
    if loop is None or whole is None:
        return "What the stages reach on this machine."
    text = f"A whole run scores {number(loop.value)} images/s"
    if bound is not None:
        text += f", {loop.value / bound.value:.2f} of what its stages allow"
    for peer in whole_peers(whole.record):
        if PIPELINE in peer.label:
            times = whole.value / peer.figure["median"]
            return f"{text}; start included it is {times:.1f} times as fast as {peer.label}."
    return f"{text}."


def notes(records: Records) -> list[str]:
    """Machine and dates; what the whiskers mean."""
    machines = dict.fromkeys(record.machine for record in records.values())
    dates = sorted({record.date for record in records.values()})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    quick = "; measured with --quick, from small counts" if any(record.is_quick for record in records.values()) else ""
    machine = f"{' and '.join(machines)}; {when}{quick}"
    return [machine, "Bars: median of the rounds; whiskers: lowest and highest round."]


STYLE = """
.picture { overflow-x: auto; margin-top: 2rem; }
.picture svg { display: block; width: 100%; min-width: 44rem; }
"""


def page(records: Records, groups: Sequence[Group], drawn: str) -> str:
    """One HTML file: the sentence, the picture, every rate as a table, hardware and versions."""
    css = (files("vitscore.report") / "page.css").read_text(encoding="utf-8")
    first = next(iter(records.values()))
    versions = table("Versions", ("", ""), [(name, str(found)) for name, found in first.versions.items() if found])
    hardware = table("Hardware", ("", ""), [(name, show(found)) for name, found in first.hardware.items()])
    started = [(name, record.started, record.machine) for name, record in records.items()]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><title>vitscore bench</title>'
        f"<style>{css}{STYLE}</style></head>"
        f'<body><main class="wide"><p class="kicker">vitscore bench</p><h1>{escape(conclusion(records))}</h1>'
        f'<p class="deck">{escape(notes(records)[0])}</p>'
        f'<figure class="picture" tabindex="0">{drawn}</figure>'
        f"<section><h2>Rates</h2>{rates_table(groups)}</section>"
        f"<section><h2>Measured</h2>{table('When and where', ('bench', 'started', 'machine'), started)}"
        f'<div class="pair">{hardware}{versions}</div></section>'
        "<footer>Made by vitscore bench; the JSON beside this file has every round.</footer></main></body></html>\n"
    )


def rates_table(groups: Sequence[Group]) -> str:
    rows = [
        (
            f"{group.title}: {bar.label}",
            number(bar.figure["median"]),
            spread(bar.figure),
            str(len(bar.figure["rounds"])),
        )
        for group in groups
        for bar in group.bars
    ]
    return table("Images a second.", ("", "median", "lowest to highest", "rounds"), rows)


def spread(figure: Figure) -> str:
    return f"{number(figure['low'])} to {number(figure['high'])}" if len(figure["rounds"]) > 1 else ""


def table(caption: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in heads)
    body = "".join(
        f'<tr><th scope="row">{escape(first)}</th>' + "".join(f"<td>{escape(cell)}</td>" for cell in rest) + "</tr>"
        for first, *rest in rows
    )
    top = f"<thead><tr>{head}</tr></thead>" if any(heads) else ""
    body = f"<caption>{escape(caption)}</caption>{top}<tbody>{body}</tbody>"
    kind = "plain" if top else "facts"
    return f'<div class="scroll" tabindex="0"><table class="{kind}">{body}</table></div>'


def show(value: Any) -> str:
    return (", ".join(map(str, value)) or "none") if isinstance(value, list) else str(value)
