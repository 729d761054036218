"""Command line of vitscore: all commands in one app, errors as one line and an exit code.

Nothing heavy is imported at the top, so `vitscore --help` loads no torch.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from vitscore.cli.errors import is_usage_error, print_error, print_stopped, usage_line
from vitscore.errors import VitscoreError
from vitscore.system.launcher import is_main_rank
from vitscore.system.machine import VERSION
from vitscore.system.signals import Stopped, stopping_on_signals

app = typer.Typer(
    name="vitscore",
    help="Score image classifiers over millions of images: one decode, every model, each sample counted once.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def show_version(is_wanted: bool) -> None:
    if is_wanted:
        typer.echo(f"vitscore {VERSION}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def mount_others() -> None:
    from vitscore.cli.bench import app as bench_app
    from vitscore.cli.results import register
    from vitscore.cli.robustness import robustness
    from vitscore.cli.run import demo, run
    from vitscore.cli.shards import app as shards_app

    app.command(short_help="Score models over shards.")(run)
    app.command(short_help="Score the built-in models on handwritten digits.")(demo)
    register(app)
    app.command(short_help="Measure how accuracy falls as images get worse.")(robustness)
    app.add_typer(shards_app, name="shards", help="Build and inspect shards.")
    app.add_typer(bench_app, name="bench", short_help="Measure this machine; compare and draw results, plan runs.")


mount_others()


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit code; print every error that a user can cause as one line."""
    arguments = sys.argv[1:] if arguments is None else arguments
    is_debug = "--debug" in arguments
    try:
        with stopping_on_signals(print_stopped):
            code = app(arguments, prog_name="vitscore", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except VitscoreError as error:
        if is_debug:
            raise
        return print_error(str(error), error.exit_code, is_shown=getattr(error, "is_told", is_main_rank()))
    except Stopped as stopped:
        print_stopped()
        return stopped.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            return print_error(error.format_message(), 2)  # type: ignore[attr-defined]
        if is_usage_error(error):
            return print_error(usage_line(error), 2, is_shown=is_main_rank())
        if is_debug:
            raise
        from vitscore.shards.redaction import scrub

        line = f"a bug: {type(error).__name__}: {' '.join(scrub(str(error)).split())}. --debug shows where."
        return print_error(line, 1, is_shown=is_main_rank())
