"""`vitscore bench`: run benches, compare two, plan from them, draw them.

`vitscore bench NAME ...` runs benches, unless the first word is another command. Nothing heavy is imported at the top;
comparing, planning and drawing need no torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from vitscore.cli.results import print_json, print_lines
from vitscore.errors import UsageError
from vitscore.system import launcher

RUN = "run"
"""The default command."""


class BenchGroup(TyperGroup):
    """Group of commands with a default: arguments that do not begin with a command's name go to `run`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or args[0] not in {*self.commands, "-h", "--help"}:
            args = [RUN, *args]
        return super().parse_args(ctx, args)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the options of `run`, then the commands."""
        options = [param for param in self.commands[RUN].get_params(ctx) if param.param_type_name == "option"]
        records = [option.get_help_record(ctx) for option in options]
        with formatter.section("Options"):
            formatter.write_dl([record for record in records if record])
        self.format_commands(ctx, formatter)


app = typer.Typer(
    name="bench",
    cls=BenchGroup,
    help="Measure this machine, stage by stage and whole, against other tools; compare and draw results, plan runs.",
    rich_markup_mode=None,
    subcommand_metavar="[NAME ...] | COMMAND [ARGS]...",
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


@app.callback()
def run_on_rank_0() -> None:
    """Under accelerate or torchrun, continue on rank 0 only, without the launcher's environment variables."""
    from vitscore.system.launcher import is_main_rank

    if not is_main_rank():
        raise typer.Exit
    launcher.leave()


@app.command(RUN, short_help="Run benches; this is the default command.")
def run(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME]...", help="Benches; default: all except the long ones.", show_default=False),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            metavar="DIR",
            help="Folder for the results; default: $OUT, else build/bench.",
            show_default=False,
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Use small counts: check that the benches work, not what they measure.")
    ] = False,
    is_list: Annotated[bool, typer.Option("--list", help="List the benches with their questions.")] = False,
) -> None:
    """Run benches: print their tables, write one JSON file per bench, and draw a picture if there are several."""
    from vitscore.bench.harness import catalogue, record, running

    if is_list:
        print_lines(catalogue.lines())
        return
    folder = output or record.default_folder()
    if folder.exists() and not folder.is_dir():
        raise UsageError("not a folder", where=f"--output {folder}")
    written = running.run(catalogue.require_known(names or []), folder, quick=quick, tell=typer.echo)
    if len(written) > 1:
        draw(folder, folder, is_quiet=True)


@app.command(short_help="Show changes between two benches, and whether they exceed the spread of the rounds.")
def compare(
    a: Annotated[
        Path, typer.Argument(metavar="A", help="A bench's JSON file, or a folder of them.", show_default=False)
    ],
    b: Annotated[Path, typer.Argument(metavar="B", help="The file or folder to compare it with.", show_default=False)],
    as_json: Json = False,
) -> None:
    """Compare two benches, figure by figure.

    A change exceeds the spread if all rounds of one bench lie on one side of all rounds of the other; a figure with a
    single round cannot show that. Differing hardware, versions and counts are listed.
    """
    from vitscore.bench.report.compare import compare_files, document_of, lines_of

    comparisons = compare_files(a, b)
    if as_json:
        print_json(document_of(comparisons))
    else:
        print_lines(lines_of(comparisons))


@app.command(short_help="Estimate hours, cost and the limiting stage for a number of images and GPUs.")
def plan(
    images: Annotated[float, typer.Option(metavar="N", help="Images to score, for example 1e9.", show_default=False)],
    gpus: Annotated[
        int, typer.Option(metavar="N", min=1, help="GPUs; machines, if the bench was measured without a GPU.")
    ] = 1,
    price: Annotated[
        float | None, typer.Option(metavar="P", min=0, help="Price of a GPU hour.", show_default=False)
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            "-m",
            "--model",
            metavar="NAME",
            help="A model of the bench `forward`; repeat for several in one run; default: the first.",
            show_default=False,
        ),
    ] = None,
    per_shard: Annotated[int, typer.Option(metavar="N", min=1, help="Samples per shard.")] = 10_000,
    source: Annotated[
        list[Path] | None,
        typer.Option(
            "--from",
            metavar="DIR|JSON",
            help="Benches to plan from, later ones override earlier ones; default: those of the last `vitscore bench`, "
            "else those that come with the package.",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Plan a run from measured rates only; every assumption is listed."""
    from vitscore.bench.report.plan import Wish, document_of, lines_of, make_plan
    from vitscore.bench.report.stages import read_sources

    if not 1 <= images < float("inf"):
        raise UsageError("not a number of images", where="--images", expected="1 or more", got=f"{images:g}")
    wish = Wish(images=images, gpus=gpus, price=price, models=tuple(model or ()), per_shard=per_shard)
    made = make_plan(wish, read_sources(source or []))
    if as_json:
        print_json(document_of(made))
    else:
        print_lines(lines_of(made))


@app.command(short_help="Draw a folder of benches: bench.svg and bench.html.")
def picture(
    folder: Annotated[
        Path | None,
        typer.Argument(
            metavar="[DIR]", help="Folder of benches; default: where `vitscore bench` writes.", show_default=False
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", metavar="DIR", help="Folder for the pictures; default: DIR.", show_default=False
        ),
    ] = None,
) -> None:
    """Draw the limits of the stages, the whole run's rate and bound, and the peers; the page needs no network."""
    from vitscore.bench.harness import record

    folder = folder or record.default_folder()
    draw(folder, output or (folder if folder.is_dir() else folder.parent))


def draw(folder: Path, output: Path, *, is_quiet: bool = False) -> None:
    """Write both pictures and print their names; print that there are no rates to draw unless `is_quiet`."""
    from vitscore.bench.report.picture import write_pictures

    written = write_pictures(folder, output)
    if written:
        typer.echo(f"written to {output}: {', '.join(written)}")
    elif not is_quiet:
        typer.echo("no rates to draw")
