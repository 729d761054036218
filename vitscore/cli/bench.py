"""The command line of the benches: run them, compare two, plan from them, draw them.

Part of the command line; cli.py mounts it. `vitscore bench NAME ...` runs benches, unless the first word is one of the
other commands. Nothing heavy is imported at the top; comparing, planning and drawing need no torch at all.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from vitscore.errors import UsageError
from vitscore.system import launcher

if TYPE_CHECKING:
    from collections.abc import Sequence

RUN = "run"
"""The command that is meant where none is named."""


class BenchGroup(TyperGroup):
    """Commands of which one need not be named: what begins with no command's name is for `run`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or args[0] not in {*self.commands, "-h", "--help"}:
            args = [RUN, *args]
        return super().parse_args(ctx, args)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """The options of `run`, then the commands."""
        options = [param for param in self.commands[RUN].get_params(ctx) if param.param_type_name == "option"]
        records = [option.get_help_record(ctx) for option in options]
        with formatter.section("Options"):
            formatter.write_dl([record for record in records if record])
        self.format_commands(ctx, formatter)


app = typer.Typer(
    name="bench",
    cls=BenchGroup,
    help="Measure this machine, stage by stage and whole, against other tools; compare, plan and draw what was found.",
    rich_markup_mode=None,
    subcommand_metavar="[NAME ...] | COMMAND [ARGS]...",
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


@app.callback()
def alone() -> None:
    """Started by accelerate or torchrun, rank 0 alone measures and prints, and what it starts knows of no launcher."""
    from vitscore.system.launcher import is_main_rank

    if not is_main_rank():
        raise typer.Exit
    launcher.leave()


@app.command(RUN, short_help="Run benches; what is meant where no command is named.")
def run(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME]...", help="Benches; default: all but the long ones.", show_default=False),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            metavar="DIR",
            help="Where the JSON goes; default: $OUT, else build/bench.",
            show_default=False,
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Small counts: whether the benches work, not what they find.")
    ] = False,
    is_list: Annotated[bool, typer.Option("--list", help="List the benches, each with its question.")] = False,
) -> None:
    """Run benches: print their tables, write one JSON each, and a picture of them where there are several."""
    from vitscore.bench.harness import catalogue, record, running

    if is_list:
        tell_lines(catalogue.lines())
        return
    folder = output or record.default_folder()
    if folder.exists() and not folder.is_dir():
        raise UsageError("not a folder", where=f"--output {folder}")
    written = running.run(catalogue.require_known(names or []), folder, quick=quick, tell=typer.echo)
    if len(written) > 1:
        draw(folder, folder, tells_none=False)


@app.command(short_help="What changed between two benches, and whether it is beyond their rounds' spread.")
def compare(
    a: Annotated[Path, typer.Argument(metavar="A", help="A bench's JSON, or a folder of them.", show_default=False)],
    b: Annotated[Path, typer.Argument(metavar="B", help="The same, measured otherwise.", show_default=False)],
    as_json: Json = False,
) -> None:
    """Compare two benches, figure by figure.

    A change is beyond the spread where all rounds of one lie on one side of all rounds of the other; figures of a
    single round cannot tell. Differing hardware, versions and counts are named.
    """
    from vitscore.bench.report.compare import compare_files, document_of, lines_of

    comparisons = compare_files(a, b)
    if as_json:
        tell_json(document_of(comparisons))
    else:
        tell_lines(lines_of(comparisons))


@app.command(short_help="Hours, cost and the stage that limits, for so many images on so many GPUs.")
def plan(
    images: Annotated[float, typer.Option(metavar="N", help="Images to score, as in 1e9.", show_default=False)],
    gpus: Annotated[
        int, typer.Option(metavar="N", min=1, help="GPUs; without one in the bench: machines like the one measured.")
    ] = 1,
    price: Annotated[
        float | None, typer.Option(metavar="P", min=0, help="The price of a GPU for an hour.", show_default=False)
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            "-m",
            "--model",
            metavar="NAME",
            help="Of `forward`; repeat for several in one run; default: the first.",
            show_default=False,
        ),
    ] = None,
    per_shard: Annotated[int, typer.Option(metavar="N", min=1, help="Samples a shard.")] = 10_000,
    source: Annotated[
        list[Path] | None,
        typer.Option(
            "--from",
            metavar="DIR|JSON",
            help="Benches to plan from, later ones win; default: those of the last `vitscore bench`, else those that "
            "come with the package.",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Plan a run from measured rates; every assumption is spelled out, and nothing is assumed that was not measured."""
    from vitscore.bench.report.plan import Wish, document_of, lines_of, make_plan
    from vitscore.bench.report.stages import read_sources

    if not 1 <= images < float("inf"):
        raise UsageError("not a number of images", where="--images", expected="1 or more", got=f"{images:g}")
    wish = Wish(images=images, gpus=gpus, price=price, models=tuple(model or ()), per_shard=per_shard)
    made = make_plan(wish, read_sources(source or []))
    if as_json:
        tell_json(document_of(made))
    else:
        tell_lines(lines_of(made))


@app.command(short_help="Draw a folder of benches: bench.svg and bench.html.")
def picture(
    folder: Annotated[
        Path | None,
        typer.Argument(metavar="[DIR]", help="Default: where `vitscore bench` writes.", show_default=False),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="DIR", help="Where they go; default: DIR.", show_default=False),
    ] = None,
) -> None:
    """Draw the ceilings of the stages, the whole run's rate and bound, and the peers; opens without a network."""
    from vitscore.bench.harness import record

    folder = folder or record.default_folder()
    draw(folder, output or (folder if folder.is_dir() else folder.parent))


def draw(folder: Path, output: Path, *, tells_none: bool = True) -> None:
    """Write both pictures and say where; a folder whose benches have nothing to draw gets none."""
    from vitscore.bench.report.picture import write_pictures

    written = write_pictures(folder, output)
    if written:
        typer.echo(f"written to {output}: {', '.join(written)}")
    elif tells_none:
        typer.echo("no rates to draw")


def tell_json(document: Any) -> None:
    typer.echo(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False))


def tell_lines(lines: Sequence[str]) -> None:
    for line in lines:
        typer.echo(line)
