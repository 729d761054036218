"""Two benches of one name, figure by figure: what changed, and whether that is beyond the spread of the rounds.

A figure is a dict with a `median` (see timing.py); a plain number is a figure of a single round, which has no spread,
so that nothing can be said of a change. The ranges are compared and no test is made: with three to five rounds, ranges
that do not overlap are the most that can be asked for.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitscore.bench.harness.record import Record, read_all
from vitscore.bench.harness.timing import Figure, figure
from vitscore.errors import UsageError
from vitscore.text.console import cut

WIDTH = 80
UNITS = {"_per_s": "1/s", "_s": "s", "_bytes": "bytes", "ratio": "ratio"}
"""Of plain numbers, by the end of their names."""
Keys = tuple[str, ...]
"""The keys that lead to a figure."""


@dataclass(frozen=True)
class Change:
    """One figure on both sides."""

    path: Keys
    unit: str
    a: Figure
    b: Figure

    @property
    def percent(self) -> float | None:
        """From A to B; None where A is zero."""
        before: float = self.a["median"]
        return 100 * (self.b["median"] - before) / abs(before) if before else None

    @property
    def is_beyond(self) -> bool | None:
        """Whether the ranges of the rounds do not overlap; None where a side has a single round."""
        if min(len(self.a["rounds"]), len(self.b["rounds"])) < 2:
            return None
        return bool(self.a["high"] < self.b["low"] or self.b["high"] < self.a["low"])


@dataclass(frozen=True)
class Comparison:
    """One bench on both sides."""

    a: Record
    b: Record
    changes: tuple[Change, ...]
    only_a: tuple[Keys, ...]
    only_b: tuple[Keys, ...]
    notes: tuple[str, ...]
    """Return the other differences: hardware, versions, counts."""


def compare_files(a: Path, b: Path) -> list[Comparison]:
    """Compare two JSONs, or the benches that two folders both have.

    Raises:
        UsageError: a file is no bench's, or the two sides have no bench in common.
    """
    left, right = read_all(a), read_all(b)
    shared = [name for name in left if name in right]
    if not shared:
        raise UsageError("not the same bench", where=f"{a} and {b}", expected=", ".join(left), got=", ".join(right))
    return [compare(left[name], right[name]) for name in shared]


def compare(a: Record, b: Record) -> Comparison:
    left, right = dict(figures_in(a.result)), dict(figures_in(b.result))
    changes = [Change(path, found["unit"], found, right[path]) for path, found in left.items() if path in right]
    only_a, only_b = (tuple(path for path in one if path not in other) for one, other in ((left, right), (right, left)))
    return Comparison(a, b, tuple(changes), only_a, only_b, tuple(differences(a, b)))


def figures_in(value: Any, path: Keys = ()) -> Iterator[tuple[Keys, Figure]]:
    """Every figure below `value`, depth first, with the keys that lead to it."""
    if isinstance(value, Mapping):
        if "median" in value and "rounds" in value:
            yield path, dict(value)
            return
        for key, item in value.items():
            yield from figures_in(item, (*path, str(key)))
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for number, item in enumerate(value):
            yield from figures_in(item, (*path, str(number)))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        unit = next((unit for end, unit in UNITS.items() if path and path[-1].endswith(end)), "")
        yield path, figure([value], unit)


def differences(a: Record, b: Record) -> Iterator[str]:
    """In words: what makes the two hard to compare."""
    for what, left, right in (("hardware", a.hardware, b.hardware), ("versions", a.versions, b.versions)):
        names = [name for name in {**left, **right} if left.get(name) != right.get(name)]
        if names:
            told = "; ".join(f"{name} {text(left.get(name))} against {text(right.get(name))}" for name in names)
            yield f"{what} differ: {told}"
    if a.is_quick != b.is_quick:
        yield f"counts differ: {'A' if a.is_quick else 'B'} was measured with --quick"


def text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)


def lines_of(comparisons: Sequence[Comparison]) -> list[str]:
    """For people: a table a bench; plain numbers that are the same are left out."""
    lines: list[str] = []
    for found in comparisons:
        lines.append(found.a.bench)
        lines += [f"  {side} {record.path}, {record.started}" for side, record in (("A", found.a), ("B", found.b))]
        for note in found.notes:
            lines += textwrap.wrap(note, WIDTH, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False)
        lines += table(found.changes)
        for side, paths in (("A", found.only_a), ("B", found.only_b)):
            lines += [f"only in {side}: {' / '.join(path)}" for path in paths]
        lines.append("")
    lines.append("beyond: no round of one side lies within the other's; -: single rounds, nothing can be said")
    return lines


def table(changes: Sequence[Change]) -> Iterator[str]:
    """A line a figure, under the keys that lead to it and the unit."""
    yield f"{'':<40}{'A':>10}{'B':>10}{'change':>10}{'beyond':>9}"
    heading = ""
    for change in changes:
        is_plain = len(change.a["rounds"]) == len(change.b["rounds"]) == 1
        if is_plain and change.a["median"] == change.b["median"]:
            continue
        *above, name = change.path or ("",)
        here = " / ".join(above) + (f" [{change.unit}]" if change.unit else "")
        if here != heading:
            heading = here
            yield here.strip()
        percent = "" if change.percent is None else f"{change.percent:+.1f}%"
        beyond = {True: "yes", False: "no", None: "-"}[change.is_beyond]
        values = "".join(f"{short(side['median']):>10}" for side in (change.a, change.b))
        yield f"  {cut(name, 37):<38}{values}{percent:>10}{beyond:>9}"


def short(value: float) -> str:
    """A number in nine characters or fewer."""
    for size, suffix in ((1e9, "G"), (1e6, "M")):
        if abs(value) >= 10 * size:
            return f"{value / size:,.1f}{suffix}"
    return f"{value:,.0f}" if abs(value) >= 1_000 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.3g}"


def document_of(comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """`--json`: everything."""
    return {
        "benches": {
            found.a.bench: {
                "a": str(found.a.path),
                "b": str(found.b.path),
                "notes": list(found.notes),
                "changes": [
                    {
                        "name": list(change.path),
                        "unit": change.unit,
                        "a": change.a,
                        "b": change.b,
                        "percent": change.percent,
                        "is_beyond_spread": change.is_beyond,
                    }
                    for change in found.changes
                ],
                "only_a": [list(path) for path in found.only_a],
                "only_b": [list(path) for path in found.only_b],
            }
            for found in comparisons
        }
    }
