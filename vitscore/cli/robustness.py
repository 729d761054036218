"""`vitscore robustness`: score a grid of operators and severities; print a table and write a page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitscore.cli.options import (
    AugmentSeed,
    BatchSize,
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
    Precision,
    Progress,
    TemplatesFile,
)

if TYPE_CHECKING:
    from vitscore.plan.options import RunOptions
    from vitscore.plan.plan import Plan
    from vitscore.run.finish import Outcome

OWN = ("operators", "severities", "baseline", "list_operators", "config")
SHOWN = ("dry_run", "as_json", "progress", "debug")


def robustness(
    context: typer.Context,
    shards: Annotated[
        list[str] | None, typer.Argument(metavar="SHARDS...", help="As for `vitscore run`.", show_default=False)
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option("-m", "--model", metavar="[NAME=]CHECKPOINT", help="Repeat for more models.", show_default=False),
    ] = None,
    output: OutputFolder = None,
    operators: Annotated[
        list[str] | None,
        typer.Option(metavar="OP,...", help="The operators to apply; default: all.", show_default=False),
    ] = None,
    severities: Annotated[str, typer.Option(metavar="N,...", help="The severities to apply.")] = "1,2,3,4,5",
    baseline: Annotated[
        str | None, typer.Option(metavar="NAME", help="The model whose errors mCE divides by; default: the first.")
    ] = None,
    list_operators: Annotated[
        bool, typer.Option("--list", help="List the operators, their arguments and ranges.")
    ] = False,
    augment_seed: AugmentSeed = 0,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE.toml", help="Any other option of `vitscore run`; flags win.")
    ] = None,
    classes: ClassesFile = None,
    templates: TemplatesFile = None,
    label_map: LabelMaps = None,
    labels: LabelsFile = None,
    label_key: LabelKey = "cls",
    batch_size: BatchSize = None,
    device: Device = "auto",
    precision: Precision = "auto",
    decoder: Decoder = "auto",
    decode_threads: DecodeThreads = None,
    limit: Limit = None,
    overwrite: Overwrite = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Show the cells and the time they will take, from one batch; write nothing."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print robustness.json instead of a table.")] = False,
    progress: Progress = None,
    debug: Debug = False,
) -> None:
    """Measure how accuracy falls as images get worse: all models, operators and severities in one pass.

    Every image is decoded once. The same command resumes an interrupted run. The operators and severities are those of
    ImageNet-C.
    """
    from vitscore.augment.operators import describe
    from vitscore.cli.options import is_given
    from vitscore.plan.options import make_options, read_config
    from vitscore.robustness.grid import make_cells

    if list_operators:
        typer.echo("\n".join(describe()))
        return
    given = {name: value for name, value in context.params.items() if is_given(context, name)}
    values = {**(read_config(config) if config else {}), **given}
    own = {name: values.pop(name, None) for name in (*OWN, *SHOWN)}
    names = [part.strip() for item in as_list(own["operators"]) for part in item.split(",") if part.strip()]
    cells = make_cells(names, parse_severities(own["severities"]))
    execute(
        make_options({**values, "cells": cells}),
        baseline=own["baseline"],
        is_dry=bool(own["dry_run"]),
        as_json=bool(own["as_json"]),
        progress=own["progress"],
    )


def as_list(value: Any) -> list[str]:
    """Return a list of texts from a value of the command line or a config file."""
    return [] if value is None else [str(item) for item in value] if isinstance(value, list | tuple) else [str(value)]


def parse_severities(value: Any) -> list[int]:
    """Parse `1,3,5` or a list from a config file; an empty list means all severities.

    Raises:
        UsageError: a value is not a whole number.
    """
    from vitscore.errors import UsageError

    texts = [part for item in as_list(value) for part in item.split(",") if part.strip()]
    try:
        return [int(text) for text in texts]
    except ValueError:
        got = ",".join(texts)
        raise UsageError("wrong value", where="--severities", expected="of 1,2,3,4,5", got=got) from None


def execute(
    options: RunOptions,
    *,
    baseline: str | None,
    is_dry: bool = False,
    as_json: bool = False,
    progress: bool | None = None,
) -> None:
    """Run the grid and show its results."""
    from vitscore.run import run as runs
    from vitscore.system.launcher import is_main_rank
    from vitscore.system.libraries import prepare_arrow, without_sklearn
    from vitscore.text.watcher import Watcher

    check_baseline(options, baseline)
    if is_dry:
        plan = runs.plan_only(options)
        if is_main_rank():
            show_estimate(plan, as_json=as_json)
        return
    watcher = Watcher(is_shown=progress if is_main_rank() else False, tells_notes=is_main_rank())
    prepare_arrow()
    try:
        with without_sklearn():
            outcome = runs.run(options, watcher)
    finally:
        watcher.finished()
    if outcome is not None:
        show_outcome(outcome, baseline=baseline, as_json=as_json)


def check_baseline(options: RunOptions, baseline: str | None) -> None:
    """Refuse an unknown baseline before the first image."""
    from vitscore.errors import UsageError
    from vitscore.models.checkpoint import parse_models

    names = list(parse_models(options.model))
    if baseline is not None and baseline not in names:
        raise UsageError("unknown model", where="--baseline", expected=" or ".join(names), got=baseline)


def show_outcome(outcome: Outcome, *, baseline: str | None, as_json: bool) -> None:
    from vitscore.plan.options import VIEWS
    from vitscore.robustness.grid import refold
    from vitscore.robustness.page import write_page
    from vitscore.robustness.words import table
    from vitscore.system.durable import writing
    from vitscore.text.console import make_console
    from vitscore.text.tables import ledger_line, show_notes, show_sentences

    with writing(outcome.folder):
        document = refold(outcome.folder, baseline=baseline)
        write_page(outcome.plan, outcome.folder, document)
    console = make_console()
    if as_json:
        typer.echo(json.dumps(document, indent=2, ensure_ascii=False))
    else:
        for line in table(document, width=console.width):
            typer.echo(line)
        show_sentences(document["conclusions"], console)
        console.print(ledger_line(outcome.document))
        show_notes(outcome.notes, console)
        if outcome.images_per_s:
            plan = outcome.plan
            forwards = len(plan.models) * len(plan.conditions()) * VIEWS[plan.options.tta]
            typer.echo(f"{outcome.images_per_s:,.1f} images/s, each through {forwards} forwards")
        typer.echo(f"written to {outcome.folder}: robustness.html, robustness.json, metrics.json, parts/")
    if outcome.problem is not None:
        raise outcome.problem


def show_estimate(plan: Plan, *, as_json: bool) -> None:
    """Show the cells and the time they will take, measured on one batch (`--dry-run`)."""
    from vitscore.plan.disk_estimate import estimate_disk, plan_document
    from vitscore.robustness.estimate import estimate, load_alone
    from vitscore.text.console import duration_text, make_console
    from vitscore.text.plan import show_plan

    models = load_alone(plan)
    costs = estimate(plan, models)
    if as_json:
        measured = None if costs is None else {**vars(costs), "total_s": costs.total_s}
        document = {**plan_document(plan), "cells": list(plan.options.cells), "estimate": measured}
        typer.echo(json.dumps(document, indent=2, ensure_ascii=False))
        return
    grid: dict[str, list[str]] = {}
    for text in plan.options.cells:
        name, _, level = text.partition(":severity=")
        grid.setdefault(name, []).append(level)
    for name, levels in grid.items():
        typer.echo(f"cells    {name}: {', '.join(levels)}")
    typer.echo(f"cells    {len(plan.options.cells)}, and the unchanged images; {len(plan.models)} model(s)")
    if costs is None:
        typer.echo("time     unknown: no image could be read")
    else:
        images = "an unknown number of" if costs.images is None else f"about {costs.images:,}"
        typer.echo(f"time     {duration_text(costs.total_s)} on one rank, for {images} images")
        typer.echo(
            f"         a batch of {costs.batch}: decoding {costs.decode_s:.2f} s, operators {costs.operators_s:.2f} s, "
            f"forwards {costs.conditions} x {costs.forward_s:.2f} s"
        )
    show_plan(plan, estimate_disk(plan), make_console())
