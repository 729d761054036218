"""`vitscore run` and `vitscore demo`: parse options, run, show progress and the result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vitscore.cli.options import (
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
    is_given,
)
from vitscore.errors import UsageError
from vitscore.system.launcher import is_main_rank

if TYPE_CHECKING:
    from vitscore.plan.options import RunOptions
    from vitscore.run.finish import Outcome

Json = Annotated[bool, typer.Option("--json", help="Print metrics.json instead of a table.")]


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
        typer.Option(metavar="FILE.toml", help="Options by long name; the command line overrides them."),
    ] = None,
    classes: ClassesFile = None,
    templates: TemplatesFile = None,
    label_map: LabelMaps = None,
    labels: LabelsFile = None,
    groups: Annotated[
        Path | None, typer.Option(metavar="FILE", help="JSON of superclasses to score, from group to its classes.")
    ] = None,
    label_key: LabelKey = "cls",
    image_key: Annotated[
        str | None, typer.Option(metavar="EXT", help="Extension of the image member; default: any image.")
    ] = None,
    split: Annotated[str, typer.Option(metavar="NAME", help="Split of a CLIP_benchmark data set.")] = "test",
    allow_pipe: AllowPipe = False,
    cache_dir: CacheFolder = None,
    cache_size: Annotated[int, typer.Option(metavar="N", help="Maximum number of cached shards per rank.")] = 3,
    batch_size: BatchSize = None,
    device: Device = "auto",
    precision: Precision = "auto",
    compile: Annotated[
        bool | None, typer.Option("--compile/--no-compile", help="Use torch.compile; default: automatic.")
    ] = None,
    decoder: Decoder = "auto",
    decode_threads: DecodeThreads = None,
    max_pixels: Annotated[int, typer.Option(metavar="N", help="Refuse images that declare more pixels.")] = 178_956_970,
    top_k: Annotated[int, typer.Option(metavar="K", help="Number of best classes to keep per sample.")] = 5,
    on_bad_sample: Annotated[
        str,
        typer.Option(metavar="skip|fail|wrong", help="Omit bad samples, end the run, or count wrong answers."),
    ] = "skip",
    on_bad_shard: Annotated[
        str, typer.Option(metavar="fail|skip", help="Exit code at the end if a shard is bad: 3 (fail) or 0 (skip).")
    ] = "fail",
    max_bad: Annotated[
        str, typer.Option(metavar="COUNT|PERCENT%", help="Bad samples to accept before failing.")
    ] = "10%",
    save: Annotated[
        list[str] | None, typer.Option(metavar="logits,embeddings", help="Long outputs to keep in the parts.")
    ] = None,
    tta: Annotated[
        str,
        typer.Option(
            metavar="none|hflip", help="hflip: average the logits of the image and its mirror image, at twice the work."
        ),
    ] = "none",
    augment: Annotated[
        list[str] | None,
        typer.Option(
            metavar="OP:ARG=V,...",
            help="Change every resized image, for example gaussian_noise:severity=3; repeat for a chain. "
            "`vitscore robustness --list` lists the operators.",
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
    """Score models over shards; the same command resumes an interrupted run."""
    from vitscore.plan.options import make_options, read_config

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


def execute(
    options: RunOptions, *, is_dry: bool, per_class: bool = False, as_json: bool = False, progress: bool | None = None
) -> None:
    """Run `options` and show the result."""
    from vitscore.run import run as runs
    from vitscore.system.libraries import prepare_arrow, without_sklearn
    from vitscore.text.console import make_console
    from vitscore.text.plan import show_plan
    from vitscore.text.watcher import Watcher

    if is_dry:
        from vitscore.plan.disk_estimate import estimate_disk, plan_document

        plan = runs.plan_only(options)
        if is_main_rank() and as_json:
            typer.echo(json.dumps(plan_document(plan), indent=2, ensure_ascii=False))
        elif is_main_rank():
            show_plan(plan, estimate_disk(plan), make_console())
        return
    watcher = Watcher(is_shown=progress if is_main_rank() else False, tells_notes=is_main_rank())
    prepare_arrow()
    try:
        with without_sklearn():
            outcome = runs.run(options, watcher)
    finally:
        watcher.finished()
    if outcome is not None:
        show_outcome(outcome, per_class=per_class, as_json=as_json)


def show_outcome(outcome: Outcome, *, per_class: bool, as_json: bool) -> None:
    """Print the result on standard output, then raise the problem that decides the exit code, if any."""
    from vitscore.text.console import make_console
    from vitscore.text.notes import figure_notes
    from vitscore.text.plan import views_text
    from vitscore.text.tables import bottleneck_line, show_document, show_notes, show_written

    console = make_console()
    if as_json:
        typer.echo(json.dumps(outcome.document, indent=2, ensure_ascii=False))
    else:
        show_document(outcome.document, per_class=per_class, console=console, confusions=outcome.confusions)
        for line in figure_notes(outcome.document):
            typer.echo(line)
        show_notes(outcome.notes, console)
        if outcome.images_per_s:
            views = views_text(outcome.plan)
            console.print(f"{outcome.images_per_s:,.0f} images/s through {len(outcome.plan.models)} model(s){views}")
        if outcome.bottleneck is not None:
            console.print(bottleneck_line(outcome.bottleneck))
        show_written(outcome.folder, outcome.document, console)
    if outcome.problem is not None:
        raise outcome.problem


def demo(
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="The run's folder.")] = Path("demo-run"),
    overwrite: Overwrite = False,
    per_class: PerClass = False,
) -> None:
    """Score the built-in ViT and CLIP on 500 held-out handwritten digits; takes under a minute on a CPU."""
    from vitscore.plan.options import make_options

    values = {
        "shards": ["demo"],
        "model": ["demo-vit", "demo-clip"],
        "output": output,
        "overwrite": overwrite,
    }
    execute(make_options(values), is_dry=False, per_class=per_class)
