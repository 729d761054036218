"""figures.jsonl, one figure a line, and the table of a part: each figure beside the expected one.

    {"part": 2, "step": "whole", "name": "B/16 run", "value": 9120.4, "unit": "images/s", "expected": [8500, 10000],
     "note": "", "settings": {...}, "gpu": "NVIDIA H200", "at": "2026-11-27T12:00:00Z"}

A line is written whole and flushed before the step goes on, so that a step that is ended leaves all figures so far.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = "figures.jsonl"
Value = float | str | bool | None
Line = dict[str, Any]
WIDTH = 120
"""Of a table."""
TEST = "test "
"""Beginning of the name of a test's figure; its value is pytest's outcome."""


@dataclass(frozen=True)
class Range:
    """Expected range of a figure, on an H200; an open end is None."""

    low: float | None
    high: float | None = None
    of_memory: bool = False
    """Whether it is a fifth lower on an H100, whose memory is slower."""

    def on(self, gpu: str) -> list[float | None]:
        factor = 0.8 if self.of_memory and "H100" in gpu else 1.0
        return [None if end is None else round(factor * end, 3) for end in (self.low, self.high)]


EXPECTED: Mapping[str, Range | str] = {
    "hardware JPEG decoder": "yes",
    "NVVM": "found",
    "copy to the GPU": Range(20),
    "fp16 product": Range(700),
    "B/16 forward": Range(10_500, 13_000),
    "L/14 forward": Range(2_600, 3_000),
    "B/32 forward": Range(35_000),
    "B/32 host / device": Range(None, 1.0),
    "DALI": "works",
    "levels mixed / CPU": Range(None, 1.0),
    "B/16 run": Range(8_500, 10_000, of_memory=True),
    "L/14 run": Range(2_500, 2_900, of_memory=True),
    "B/32 run": Range(12_000, 15_000, of_memory=True),
    "B/16 share of bound": Range(0.92),
    "times the loop": Range(1.5),
    "times the pipeline": Range(3.0),
    "best decoding": Range(12_000, 16_000),
    "decoding without hardware": Range(7_000, 10_000),
    "fp32 predictions that differ": Range(None, 0),
    "GPU busy": Range(0.9),
    "own / default stream": Range(1.0),
    "B/16 forward, compiled": Range(10_500),
    "L/14 forward, compiled": Range(2_600),
    "little memory": "a smaller batch",
    "almost no memory": "refused",
    "two processes": "refused",
}


def append(out: Path, *, name: str, gpu: str, **fields: Any) -> None:
    """Append one figure, whole and at once."""
    expected = EXPECTED.get(name)
    line = {
        "part": fields["part"],
        "step": fields["step"],
        "name": name,
        "value": rounded(fields["value"]),
        "unit": fields["unit"],
        "expected": expected.on(gpu) if isinstance(expected, Range) else expected,
        "note": fields["note"],
        "settings": fields["settings"],
        "gpu": gpu,
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    data = (json.dumps(line, ensure_ascii=False) + "\n").encode()
    file = os.open(out / FILE, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(file, data)
        os.fsync(file)
    finally:
        os.close(file)


def rounded(value: Value) -> Value:
    """Six digits; None where a number is none."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def read(out: Path) -> list[Line]:
    """Every figure so far; a line that was cut off is left out."""
    return list(_lines(out / FILE)) if (out / FILE).is_file() else []


def _lines(path: Path) -> Iterator[Line]:
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            yield json.loads(text)
        except ValueError:
            continue


def forget(out: Path, part: int) -> None:
    """Drop a part's figures of an earlier day from the file."""
    kept = [json.dumps(line, ensure_ascii=False) for line in read(out) if line["part"] != part]
    if (out / FILE).is_file():
        (out / FILE).write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")


@dataclass(frozen=True)
class Row:
    """A line of a part's table: a figure, or with no name the outcomes of a step's tests."""

    step: str
    name: str = ""


ROWS: Mapping[int, Sequence[Row]] = {
    1: (
        Row("probe", "GPU"),
        Row("probe", "NVVM"),
        Row("probe", "decoder backends"),
        Row("probe", "hardware JPEG decoder"),
        Row("twins"),
        Row("forwards", "B/16 forward"),
        Row("forwards", "L/14 forward"),
        Row("forwards", "B/32 forward"),
        Row("forwards", "B/32 host / device"),
        Row("forward tests"),
    ),
    2: (
        Row("dali", "DALI"),
        Row("dali", "levels mixed / CPU"),
        Row("tests"),
        Row("whole", "B/16 run"),
        Row("whole", "B/16 share of bound"),
        Row("decoding", "best decoding"),
        Row("decoding", "decoding without hardware"),
        Row("predictions", "fp32 predictions that differ"),
        Row("predictions", "fp16 predictions that differ"),
        Row("profile", "GPU busy"),
        Row("peers", "times the loop"),
        Row("peers", "times the pipeline"),
        Row("streams", "own / default stream"),
    ),
    3: (
        Row("L/14 run", "L/14 run"),
        Row("B/32 run", "B/32 run"),
        Row("compiled B/16", "B/16 forward, compiled"),
        Row("compiled B/16", "B/16 compiling"),
        Row("compiled L/14", "L/14 forward, compiled"),
        Row("little memory", "little memory"),
        Row("little memory", "almost no memory"),
        Row("two processes", "two processes"),
        Row("augment", "B/16 run, augmented"),
        Row("compiled tests"),
    ),
}


def table(part: int, lines: Sequence[Line], endings: Mapping[str, str], *, is_rehearsal: bool) -> list[str]:
    """The part's table, at most `WIDTH` characters wide.

    Args:
        part: which.
        lines: all figures.
        endings: how the steps ended, by name.
        is_rehearsal: whether figures are of tiny sizes, and not to be compared.
    """
    own = [line for line in lines if line["part"] == part]
    rows = [f"{f'part {part}':<28}{'expected':>15}{'found':>28}"]
    for row in ROWS[part]:
        rows.append(_row(row, own, endings.get(row.step, "not run"), is_rehearsal=is_rehearsal)[:WIDTH].rstrip())
    return rows


def _row(row: Row, lines: Sequence[Line], ending: str, *, is_rehearsal: bool) -> str:
    own = [line for line in lines if line["step"] == row.step and (not row.name or line["name"] == row.name)]
    if not row.name:
        return _tests_row(row.step, own, ending)
    if not own:
        why = "ended without it" if ending == "ok" else ending
        return f"{row.name:<28}{shown_range(row.name):>15}{'-':>28}  step {row.step}: {why}"
    line = own[-1]
    value = number(line["value"], line["unit"])
    verdict = "" if is_rehearsal or line["value"] is None else judged(line["value"], line["expected"])
    words = "  ".join(word for word in (verdict, line["note"]) if word)
    return f"{row.name:<28}{expected_text(line['expected']):>15}{value:>28}  {words}"


def _tests_row(step: str, lines: Iterable[Line], ending: str) -> str:
    counts = Counter(line["value"] for line in lines if line["name"].startswith(TEST))
    total = ", ".join(f"{counts[outcome]} {outcome}" for outcome in ("passed", "failed", "skipped") if counts[outcome])
    words = "BAD" if counts["failed"] else ""
    words = words if ending == "ok" else f"{words}  {ending}".strip()
    return f"{f'tests: {step}':<28}{'none fail':>15}{total or 'none ran':>28}  {words}"


def shown_range(name: str) -> str:
    expected = EXPECTED.get(name)
    return expected_text(expected.on("") if isinstance(expected, Range) else expected)


def expected_text(expected: Any) -> str:
    if isinstance(expected, list):
        low, high = expected
        if low is None:
            return f"at most {number(high, '')}"
        return f"{number(low, '')} or more" if high is None else f"{number(low, '')}-{number(high, '')}"
    return str(expected or "")


def number(value: Any, unit: str) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        digits = 0 if float(value).is_integer() or abs(value) >= 1000 else 1 if abs(value) >= 10 else 3
        return f"{value:,.{digits}f} {unit}".strip()
    return str(value)


def judged(value: Any, expected: Any) -> str:
    """`ok`, or how the figure misses what was expected; empty where nothing was."""
    if isinstance(expected, list) and isinstance(value, int | float):
        low, high = expected
        return "LOW" if low is not None and value < low else "HIGH" if high is not None and value > high else "ok"
    if isinstance(expected, str):
        return "ok" if number(value, "") == expected else "OTHER"
    return ""
