"""Print errors as one line on standard error, with their exit code."""

from __future__ import annotations

import sys
from typing import Any

from vitscore.system.launcher import is_main_rank


def print_stopped() -> None:
    print_error("stopped: the same command goes on from the parts that are done.", 0, is_shown=is_main_rank())


def print_error(line: str, code: int, *, is_shown: bool = True) -> int:
    """Print `line` on standard error if `is_shown`; return `code`."""
    if is_shown:
        sys.stderr.write(line + "\n")
        sys.stderr.flush()
    return code


def is_usage_error(error: Exception) -> bool:
    """Return whether typer rejected the command line; its class moved between typer's releases."""
    return any(cls.__name__ == "ClickException" for cls in type(error).__mro__)


def usage_line(error: Any) -> str:
    text = " ".join(error.format_message().split()).rstrip(".")
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "vitscore"
    return f"wrong usage: {text}. See `{command} --help`."
