"""The command line: flags to options, errors to one line and an exit code.

The only module that knows about terminals and exit codes. It imports nothing heavy at the top: `vitscore --help` costs
no torch.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitscore import __version__
from vitscore.cli_options import (
    AllowPipe,
    AugmentSeed,
    BatchSize,
    CacheFolder,
    ClassesFile,
    Debug,
    Decoder,
    DecodeThreads,
    Device,
    LabelKey,
    LabelMaps,
    LabelsFile,
    Limit,
    OutputFolder,
    Overwrite,
    PerClass,
    Precision,
    Progress,
    TemplatesFile,
)
from vitscore.errors import UsageError, VitscoreError
from vitscore.system.launcher import is_main_rank
from vitscore.system.signals import Stopped, stopping_on_signals

if TYPE_CHECKING:
    from vitscore.conclude import Outcome
    from vitscore.config import RunOptions

app = typer.Typer(
    name="vitscore",
    help="Score image classifiers over millions of images: one decode, every model, each sample counted once.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="Print metrics.json instead of a table.")]


def show_version(is_wanted: bool) -> None:
    if is_wanted:
        typer.echo(f"vitscore {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command(short_help="Score models over shards.")
def run(
    context: typer.Context,
    shards: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="SHARDS...",
            help="demo, a path, a glob, a brace pattern (s-{000..127}.tar), a folder of tars, a text file of shard "
            "names, a data set in CLIP_benchmark's layout, or an http, https, s3, gs or hf URL.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            "-m",
            "--model",
            metavar="[NAME=]CHECKPOINT",
            help="demo-vit, demo-clip, a local folder or a Hub id; repeat for more models.",
            show_default=False,
        ),
    ] = None,
    output: OutputFolder = None,
    config: Annotated[
        Path | None,
        typer.Option(metavar="FILE.toml", help="Options from a file, by their long names; flags win."),
    ] = None,
    classes: ClassesFile = None,
    templates: TemplatesFile = None,
    label_map: LabelMaps = None,
    labels: LabelsFile = None,
    groups: Annotated[
        Path | None, typer.Option(metavar="FILE", help="JSON of superclasses, from group to its classes; scored too.")
    ] = None,
    label_key: LabelKey = "cls",
    image_key: Annotated[str | None, typer.Option(metavar="EXT", help="The image member's extension.")] = None,
    split: Annotated[str, typer.Option(metavar="NAME", help="The split of a CLIP_benchmark data set.")] = "test",
    allow_pipe: AllowPipe = False,
    cache_dir: CacheFolder = None,
    cache_size: Annotated[int, typer.Option(metavar="N", help="How many of them, a rank.")] = 3,
    batch_size: BatchSize = None,
    device: Device = "auto",
    precision: Precision = "auto",
    compile: Annotated[
        bool | None, typer.Option("--compile/--no-compile", help="torch.compile the models; default: auto.")
    ] = None,
    decoder: Decoder = "auto",
    decode_threads: DecodeThreads = None,
    max_pixels: Annotated[int, typer.Option(metavar="N", help="Refuse images that declare more pixels.")] = 178_956_970,
    top_k: Annotated[int, typer.Option(metavar="K", help="How many best classes a part keeps.")] = 5,
    on_bad_sample: Annotated[
        str, typer.Option(metavar="skip|fail|wrong", help="wrong: counts as a wrong answer.")
    ] = "skip",
    on_bad_shard: Annotated[str, typer.Option(metavar="fail|skip", help="fail: exit 3 at the end.")] = "fail",
    max_bad: Annotated[str, typer.Option(metavar="COUNT|PERCENT%", help="Bad samples that a run accepts.")] = "10%",
    save: Annotated[
        list[str] | None, typer.Option(metavar="logits,embeddings", help="Long outputs to keep in the parts.")
    ] = None,
    tta: Annotated[
        str,
        typer.Option(metavar="none|hflip", help="hflip: average the logits with the mirrored image's; twice the work."),
    ] = "none",
    augment: Annotated[
        list[str] | None,
        typer.Option(
            metavar="OP:ARG=V,...",
            help="Change every resized image first, for example gaussian_noise:severity=3; repeat for a chain. "
            "Operators: `vitscore robustness --list`.",
        ),
    ] = None,
    augment_seed: AugmentSeed = 0,
    limit: Limit = None,
    overwrite: Overwrite = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be done; score nothing.")] = False,
    per_class: PerClass = False,
    as_json: Json = False,
    progress: Progress = None,
    debug: Debug = False,
) -> None:
    """Score models over shards; goes on where an earlier start of the same command ended."""
    from vitscore.config import make_options, read_config

    given = {name: value for name, value in context.params.items() if is_given(context, name)}
    values = {**(read_config(config) if config else {}), **given}
    values.pop("config", None)
    shown = {name: values.pop(name, None) for name in ("dry_run", "per_class", "json", "as_json", "progress", "debug")}
    for name, value in shown.items():
        if value not in (True, False, None):
            raise UsageError("wrong type", where=name, expected="bool", got=repr(value))
    execute(
        make_options(values),
        is_dry=bool(shown["dry_run"]),
        per_class=bool(shown["per_class"]),
        as_json=bool(shown["as_json"] or shown["json"]),
        progress=shown["progress"],
    )


def is_given(context: typer.Context, name: str) -> bool:
    """Whether a parameter was set on the command line rather than by default."""
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def execute(
    options: RunOptions, *, is_dry: bool, per_class: bool = False, as_json: bool = False, progress: bool | None = None
) -> None:
    """Run `options` and show what came of it."""
    from vitscore import run as runs
    from vitscore.system.libraries import prepare_arrow
    from vitscore.text import tables as show

    if is_dry:
        from vitscore.dryrun import estimate_disk, plan_document

        plan = runs.plan_only(options)
        if is_main_rank() and as_json:
            typer.echo(json.dumps(plan_document(plan), indent=2, ensure_ascii=False))
        elif is_main_rank():
            show.show_plan(plan, estimate_disk(plan), show.make_console())
        return
    watcher = show.Watcher(is_shown=progress if is_main_rank() else False, tells_notes=is_main_rank())
    prepare_arrow()
    try:
        outcome = runs.run(options, watcher)
    finally:
        watcher.finished()
    if outcome is not None:
        show_outcome(outcome, per_class=per_class, as_json=as_json)


def show_outcome(outcome: Outcome, *, per_class: bool, as_json: bool) -> None:
    """The result on standard output, then the problem that decides the exit code, if any."""
    from vitscore.text import tables as show
    from vitscore.text.notes import figure_notes

    console = show.make_console()
    if as_json:
        typer.echo(json.dumps(outcome.document, indent=2, ensure_ascii=False))
    else:
        show.show_document(outcome.document, per_class=per_class, console=console, confusions=outcome.confusions)
        for line in figure_notes(outcome.document):
            typer.echo(line)
        show.show_notes(outcome.notes, console)
        if outcome.images_per_s:
            views = show.views_text(outcome.plan)
            console.print(f"{outcome.images_per_s:,.0f} images/s through {len(outcome.plan.models)} model(s){views}")
        if outcome.bottleneck is not None:
            console.print(show.bottleneck_line(outcome.bottleneck))
        show.show_written(outcome.folder, outcome.document, console)
    if outcome.problem is not None:
        raise outcome.problem


@app.command(short_help="Score the built-in models on handwritten digits.")
def demo(
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="The run's folder.")] = Path("demo-run"),
    overwrite: Overwrite = False,
    per_class: PerClass = False,
) -> None:
    """Score the built-in ViT and CLIP on 500 held-out handwritten digits; on a CPU, in under a minute."""
    from vitscore.config import make_options

    values = {
        "shards": ["demo"],
        "model": ["demo-vit", "demo-clip"],
        "output": output,
        "overwrite": overwrite,
    }
    execute(make_options(values), is_dry=False, per_class=per_class)


def mount_others() -> None:
    from vitscore.cli_bench import app as bench_app
    from vitscore.cli_results import register
    from vitscore.cli_robustness import robustness
    from vitscore.cli_shards import app as shards_app

    register(app)
    app.command(short_help="How accuracy falls as images get worse.")(robustness)
    app.add_typer(shards_app, name="shards", help="Build and inspect shards.")
    app.add_typer(bench_app, name="bench", short_help="Measure this machine; compare, plan and draw what was found.")


mount_others()


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code, and turns every error a user can cause into one line."""
    arguments = sys.argv[1:] if arguments is None else arguments
    is_debug = "--debug" in arguments
    try:
        with stopping_on_signals(tell_stopped):
            code = app(arguments, prog_name="vitscore", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except VitscoreError as error:
        if is_debug:
            raise
        return tell(str(error), error.exit_code, is_told=getattr(error, "is_told", is_main_rank()))
    except Stopped as stopped:
        tell_stopped()
        return stopped.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            return tell(error.format_message(), 2)  # type: ignore[attr-defined]
        if is_usage_error(error):
            return tell(usage_line(error), 2, is_told=is_main_rank())
        if is_debug:
            raise
        from vitscore.shards.redaction import scrub

        line = f"a bug: {type(error).__name__}: {' '.join(scrub(str(error)).split())}. --debug shows where."
        return tell(line, 1, is_told=is_main_rank())


def tell_stopped() -> None:
    tell("stopped: the same command goes on from the parts that are done.", 0, is_told=is_main_rank())


def tell(line: str, code: int, *, is_told: bool = True) -> int:
    if is_told:
        sys.stderr.write(line + "\n")
        sys.stderr.flush()
    return code


def is_usage_error(error: Exception) -> bool:
    """Whether typer found the command line itself at fault; its class moved between typer's releases."""
    return any(cls.__name__ == "ClickException" for cls in type(error).__mro__)


def usage_line(error: Any) -> str:
    text = " ".join(error.format_message().split()).rstrip(".")
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "vitscore"
    return f"wrong usage: {text}. See `{command} --help`."
