"""Commands that read the folders of runs: `metrics`, `report`, `compare`, `export`, `status`; and `doctor`.

Of these, only `doctor` imports torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from vitscore.cli.options import AllowPipe, CacheFolder, Debug, Output, PerClass
from vitscore.errors import SetupError, UsageError

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


def register(app: typer.Typer) -> None:
    """Add these commands to `app`."""
    app.command(short_help="Compute a run's metrics again from its parts.")(metrics)
    app.command(short_help="Write a run's report again: one HTML file.")(report)
    app.command(short_help="Show the progress of a run.")(status)
    app.command(short_help="Compare models of one or several runs.")(compare)
    app.command(short_help="Write a run in the format of another tool.")(export)
    app.command(short_help="Show what this machine can do, and what to install.")(doctor)


def metrics(
    folder: Output,
    labels: Annotated[
        Path | None, typer.Option(metavar="FILE", help="CSV or Parquet (key, label) of corrected labels.")
    ] = None,
    label_map: Annotated[
        list[str] | None,
        typer.Option(metavar="[NAME=]FILE", help="JSON from predicted class to meant class; other classes stay."),
    ] = None,
    top_k: Annotated[str | None, typer.Option(metavar="K[,K...]", help="Top-k accuracies to report.")] = None,
    only_classes: Annotated[
        str | None,
        typer.Option(metavar="FILE|NAME,...", help="Count only samples of these classes; average over these classes."),
    ] = None,
    keys: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Count only samples with these keys: one per line, or a column `key`."),
    ] = None,
    groups: Annotated[
        Path | None, typer.Option(metavar="FILE", help="JSON of superclasses to score, from group to its classes.")
    ] = None,
    per_class: PerClass = False,
    as_json: Json = False,
    check: Annotated[
        bool,
        typer.Option("--check", help="Verify that every sample of the shards is in the parts exactly once."),
    ] = False,
    shards: Annotated[
        list[str] | None,
        typer.Option(
            "--shards",
            metavar="SHARDS",
            help="With --check: where the shards are now, if they have moved; repeat for more.",
            show_default=False,
        ),
    ] = None,
    allow_pipe: AllowPipe = False,
    cache_dir: CacheFolder = None,
) -> None:
    """Compute a run's metrics again from its parts; needs no model, no images and no torch.

    With --labels, --label-map, --top-k, --only-classes, --keys, --groups or --check nothing is written; the result is
    printed.
    """
    from vitscore.metrics.fold import refold, write_metrics
    from vitscore.metrics.recount import make_recount
    from vitscore.rundir.folder import require_record
    from vitscore.system.durable import writing
    from vitscore.text.console import make_console
    from vitscore.text.notes import figure_notes
    from vitscore.text.tables import show_document

    changes: dict[str, Any] = {
        "labels": labels,
        "label_maps": label_map or (),
        "top_k": top_k,
        "only_classes": only_classes,
        "keys": keys,
        "groups": groups,
    }
    if check:
        if any(changes.values()):
            raise UsageError("--check recounts nothing", where="metrics", next_step="Omit the other options.")
        check_ledger(folder, shards or [], allow_pipe=allow_pipe, cache_dir=cache_dir, as_json=as_json)
        return
    if shards:
        raise UsageError("--shards without --check", where="metrics", next_step="Omit --shards or add --check.")
    recount = make_recount(require_record(folder), **changes)
    folded = refold(folder, recount=recount)
    if recount is None:
        with writing(folder):
            write_metrics(folder, folded)
    if as_json:
        print_json(folded.document)
    else:
        # With --only-classes answers are still among all classes, so the matrix is not square and cannot be drawn.
        confusions = {} if only_classes else folded.confusions
        show_document(folded.document, per_class=per_class, console=make_console(), confusions=confusions)
        print_lines(figure_notes(folded.document))


def check_ledger(folder: Path, shards: list[str], *, allow_pipe: bool, cache_dir: Path | None, as_json: bool) -> None:
    """Run `metrics --check`: print the verified totals, or raise the first difference as an error."""
    from vitscore.results.check import check_run

    checked = check_run(folder, shards=shards, allow_pipe=allow_pipe, cache_dir=cache_dir)
    if as_json:
        print_json(checked.document)
    else:
        print_lines(checked.lines)


def report(
    folder: Output,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", metavar="FILE", help="The file to write; default: DIR/report.html.", show_default=False
        ),
    ] = None,
    shards: Annotated[
        list[str] | None,
        typer.Option(
            "--shards",
            metavar="SHARDS",
            help="Where the shards are now, if they have moved; repeat for more.",
            show_default=False,
        ),
    ] = None,
    thumbnails: Annotated[
        bool, typer.Option("--thumbnails/--no-thumbnails", help="Show images from the shards.")
    ] = True,
    debug: Debug = False,
) -> None:
    """Write a run's report again from its parts: one HTML file that needs no network.

    Shards are read only for thumbnails; without them, the report has everything else.
    """
    from vitscore.metrics.fold import refold
    from vitscore.report import write_report
    from vitscore.rundir.folder import require_record
    from vitscore.text.console import size_text

    record = require_record(folder)
    written = write_report(folder, refold(folder), record, path=output, shards=shards or (), with_thumbnails=thumbnails)
    typer.echo(f"written to {written.path}: {size_text(written.num_bytes)}, {written.num_thumbnails} pictures")
    for note in written.notes:
        typer.echo(f"note: {note}")


def status(folder: Output, as_json: Json = False) -> None:
    """Show the progress of a run, during or after it: finished shards and samples, bad ones, rate, time left."""
    from dataclasses import asdict

    from vitscore.rundir.status import read_status, status_lines

    progress = read_status(folder)
    if as_json:
        print_json(asdict(progress))
    else:
        print_lines(status_lines(progress))


def compare(
    runs: Annotated[
        list[str], typer.Argument(metavar="DIR[:NAME]...", help="Runs, or single models of runs.", show_default=False)
    ],
    labels: Annotated[
        Path | None, typer.Option(metavar="FILE", help="CSV or Parquet (key, label) that overrides the runs' labels.")
    ] = None,
    top: Annotated[int, typer.Option(metavar="N", min=0, help="Disagreements to list for every pair.")] = 10,
    as_json: Json = False,
) -> None:
    """Compare models of one or several runs on their common samples.

    Samples are matched by shard name and key, or by key alone if keys are unique. Tests are exact and corrected for the
    number of pairs (Holm); intervals are for paired samples. Nothing is written.
    """
    from vitscore.results.compare import compare_runs
    from vitscore.text.comparison import comparison_lines
    from vitscore.text.notes import figure_notes
    from vitscore.text.tables import models_table

    document = compare_runs(runs, labels=labels, top=top)
    if as_json:
        print_json(document)
        return
    if document["samples"]:
        print_lines([*models_table(document), *figure_notes(document)])
    print_lines(comparison_lines(document, rows_shown=top))


def export(
    folder: Output,
    form: Annotated[
        str,
        typer.Option("-f", "--format", metavar="clip-benchmark|timm|cleanlab", help="The format.", show_default=False),
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="FILE", help="The file to write.", show_default=False)
    ],
    model: Annotated[
        str | None, typer.Option("-m", "--model", metavar="NAME", help="The model; optional for timm, default: all.")
    ] = None,
    dataset: Annotated[
        str, typer.Option(metavar="NAME", help="The data set's name in CLIP_benchmark's JSON; default: the folder's.")
    ] = "",
    approximate: Annotated[
        bool,
        typer.Option("--approximate", help="For cleanlab without logits: spread the rest of the top k evenly."),
    ] = False,
) -> None:
    """Write a run in the format of another tool.

    clip-benchmark: the JSON of one evaluation. timm: a results CSV, one row per model. cleanlab: an .npz with
    pred_probs, labels, keys and classes, exact if the run had --save logits.
    """
    from vitscore.results.export import export as write

    print_lines(write(folder, form, output, model=model, dataset=dataset, approximate=approximate))


def doctor(as_json: Json = False) -> None:
    """Show what this machine can do, what is missing, and the command that installs it.

    Exit code 0 if runs will work, with or without a GPU; 4 if a package is missing or a GPU cannot be used.
    """
    from vitscore.cli.doctor import document_of, examine, lines_of, problems

    findings = examine()
    if as_json:
        print_json(document_of(findings))
    else:
        print_lines(lines_of(findings))
    if wrong := problems(findings):
        raise SetupError(
            "set-up is not complete", where=wrong[0].name, got=wrong[0].found, next_step=f"{wrong[0].fix}."
        )


def print_json(document: Any) -> None:
    typer.echo(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False))


def print_lines(lines: Iterable[str]) -> None:
    for line in lines:
        typer.echo(line)
