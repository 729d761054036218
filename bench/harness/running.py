"""Benches run one after the other, each with its table and its JSON.

A bench that lacks a package does not stop the others; what was left out is the error at the end.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from vitscore.bench.harness import catalogue, record
from vitscore.errors import SetupError


def run(names: Sequence[str], folder: Path, *, quick: bool, tell: Callable[[str], None]) -> list[Path]:
    """Run benches by name, tell their tables, write their JSON.

    Returns:
        The files written.

    Raises:
        SetupError: the first thing that a bench lacked; the others have run.
    """
    written: list[Path] = []
    problems: list[SetupError] = []
    for name in names:
        tell(f"{name}: {catalogue.question(name)}".rstrip(": "))
        try:
            written.append(run_one(name, folder, quick=quick, tell=tell))
        except SetupError as error:
            problems.append(error)
            tell("  left out: something is missing")
    if written:
        tell(f"JSON in {folder}")
    if problems:
        raise problems[0]
    return written


def run_one(name: str, folder: Path, *, quick: bool, tell: Callable[[str], None]) -> Path:
    """Run one bench; returns the file written.

    Raises:
        SetupError: it lacks a package, a device, or space.
    """
    bench = catalogue.load(name)
    started, clock = time.time(), time.perf_counter()
    try:
        result = bench.measure(quick=quick)
    except ModuleNotFoundError as error:
        raise catalogue.missing(name, error) from error
    seconds = time.perf_counter() - clock
    for line in bench.table(result):
        tell(f"  {line}".rstrip())
    return record.write(folder, name, result, started=started, seconds=seconds, quick=quick)
