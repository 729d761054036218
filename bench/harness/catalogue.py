"""The benches by name, and how to load one.

A bench is a module of `bench/` or `bench/stages/` with `measure(*, quick=False)` and `table(result)`; its docstring
states question, expectation, command and method, the question first. `quick` asks for small counts, which show that a
bench works. Listing reads the modules as text; only running imports them, since they need packages that a run does not.
"""

from __future__ import annotations

import ast
import importlib
from pathlib import Path
from typing import Any, Protocol, cast

from vitscore.errors import SetupError, UsageError

STANDARD = (
    "reading",
    "decoding",
    "forward",
    "counting",
    "whole",
    "zeroshot",
    "small",
    "several",
    "ranks",
    "startup",
    "memory",
    "corrupt",
    "offline",
    "coverage",
    "robustness",
)
LONG = ("million",)
"""Only run by name."""
NAMES = (*STANDARD, *LONG)
STAGES = ("reading", "decoding", "forward", "counting", "startup")
FOLDER = Path(__file__).parent.parent
INSTALL = "Run `pip install 'vitscore[bench]'`."


class Bench(Protocol):
    """The functions of a bench's module."""

    def measure(self, *, quick: bool = False) -> dict[str, Any]: ...

    def table(self, result: dict[str, Any]) -> list[str]: ...


def require_known(names: list[str]) -> list[str]:
    """The benches to run: the named ones once each, without names the standard ones.

    Raises:
        UsageError: a name is no bench's.
    """
    if unknown := [name for name in names if name not in NAMES]:
        raise UsageError("unknown bench", where=", ".join(unknown), expected=f"one of {', '.join(NAMES)}")
    return list(dict.fromkeys(names)) or list(STANDARD)


def path_of(name: str) -> Path:
    """The file of a bench's module."""
    return (FOLDER / "stages" if name in STAGES else FOLDER) / f"{name}.py"


def question(name: str) -> str:
    """The first line of a bench's docstring; empty where its module is missing."""
    path = path_of(name)
    if not path.is_file():
        return ""
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0]


def lines() -> list[str]:
    """`--list`: every bench with its question."""
    width = max(map(len, NAMES))
    return [f"{name:<{width}}  {question(name)}{' (only by name)' if name in LONG else ''}".rstrip() for name in NAMES]


def load(name: str) -> Bench:
    """Import a bench's module.

    Raises:
        SetupError: a package that it needs is not installed.
    """
    try:
        return cast(Bench, importlib.import_module(f"vitscore.bench.{'stages.' if name in STAGES else ''}{name}"))
    except ModuleNotFoundError as error:
        raise missing(name, error) from error


def missing(name: str, error: ModuleNotFoundError) -> Exception:
    """A package that a bench lacks, as an error with its cure; the project's own modules are no packages to install."""
    package = (error.name or "").partition(".")[0]
    if package in ("", "vitscore"):
        return error
    return SetupError("bench needs a package", where=name, expected=package, got="none", next_step=INSTALL)
