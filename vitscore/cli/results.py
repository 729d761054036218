"""The commands that look at what runs left behind: `metrics`, `report`, `compare`, `export`, `status`; and `doctor`.

Part of the command line; cli.py mounts them. Nothing here imports torch but `doctor`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from vitscore.cli.options import AllowPipe, CacheFolder, Debug, Output, PerClass
from vitscore.errors import SetupError, UsageError

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


def register(app: typer.Typer) -> None:
    """Give `app` these commands."""
    app.command(short_help="Fold a run's parts into its metrics again.")(metrics)
    app.command(short_help="Write a run's report again: one HTML file.")(report)
    app.command(short_help="How far a run is.")(status)
    app.command(short_help="Compare models of one run or of several.")(compare)
    app.command(short_help="Write a run in the form of another tool.")(export)
    app.command(short_help="What this machine can do, and what to install.")(doctor)


def metrics(
    folder: Output,
    labels: Annotated[
        Path | None, typer.Option(metavar="FILE", help="CSV or Parquet (key, label): corrected labels.")
    ] = None,
    label_map: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]FILE",
            help="JSON from the class that was predicted to the class that is meant; others stay.",
        ),
    ] = None,
    top_k: Annotated[str | None, typer.Option(metavar="K[,K...]", help="Top-k accuracies to report.")] = None,
    only_classes: Annotated[
        str | None,
        typer.Option(metavar="FILE|NAME,...", help="Only samples of these classes, averages over these classes."),
    ] = None,
    keys: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Only these samples: keys, one a line, or a column `key`.")
    ] = None,
    groups: Annotated[
        Path | None, typer.Option(metavar="FILE", help="JSON of superclasses, from group to its classes.")
    ] = None,
    per_class: PerClass = False,
    as_json: Json = False,
    check: Annotated[
        bool,
        typer.Option("--check", help="Write nothing: prove that every sample of the shards is in one part, once."),
    ] = False,
    shards: Annotated[
        list[str] | None,
        typer.Option(
            "--shards",
            metavar="SHARDS",
            help="With --check: where the shards are now, where they have moved; repeat for more.",
            show_default=False,
        ),
    ] = None,
    allow_pipe: AllowPipe = False,
    cache_dir: CacheFolder = None,
) -> None:
    """Fold a run's parts into its metrics again; needs no model, no image and no torch.

    With --labels, --label-map, --top-k, --only-classes, --keys or --groups: what the metrics would be, printed and not
    written.
    """
    from vitscore.metrics.fold import refold, write_metrics
    from vitscore.metrics.recount import make_recount
    from vitscore.rundir.folder import require_record
    from vitscore.system.durable import writing
    from vitscore.text.console import make_console
    from vitscore.text.notes import figure_notes
    from vitscore.text.tables import show_document

    asked: dict[str, Any] = {
        "labels": labels,
        "label_maps": label_map or (),
        "top_k": top_k,
        "only_classes": only_classes,
        "keys": keys,
        "groups": groups,
    }
    if check:
        if any(asked.values()):
            raise UsageError("--check recounts nothing", where="metrics", next_step="Leave the other options out.")
        check_ledger(folder, shards or [], allow_pipe=allow_pipe, cache_dir=cache_dir, as_json=as_json)
        return
    if shards:
        raise UsageError("--shards without --check", where="metrics", next_step="The parts are folded without shards.")
    recount = make_recount(require_record(folder), **asked)
    folded = refold(folder, recount=recount)
    if recount is None:
        with writing(folder):
            write_metrics(folder, folded)
    if as_json:
        tell_json(folded.document)
    else:
        # A subset's answers still are among all classes: its matrix is no square that could be drawn.
        confusions = {} if only_classes else folded.confusions
        show_document(folded.document, per_class=per_class, console=make_console(), confusions=confusions)
        tell_lines(figure_notes(folded.document))


def check_ledger(folder: Path, shards: list[str], *, allow_pipe: bool, cache_dir: Path | None, as_json: bool) -> None:
    """`metrics --check`: what was proved, or the first difference as an error."""
    from vitscore.results.check import check_run

    checked = check_run(folder, shards=shards, allow_pipe=allow_pipe, cache_dir=cache_dir)
    if as_json:
        tell_json(checked.document)
    else:
        tell_lines(checked.lines)


def report(
    folder: Output,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FILE", help="Default: DIR/report.html.", show_default=False),
    ] = None,
    shards: Annotated[
        list[str] | None,
        typer.Option(
            "--shards",
            metavar="SHARDS",
            help="Where the shards are now, where they have moved; repeat for more.",
            show_default=False,
        ),
    ] = None,
    thumbnails: Annotated[
        bool, typer.Option("--thumbnails/--no-thumbnails", help="Show images, out of the shards.")
    ] = True,
    debug: Debug = False,
) -> None:
    """Write a run's report again, from its parts: one HTML file that opens without a network.

    Shards are asked for small pictures only; where they are gone, the report has everything else.
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
    """How far a run is, while it runs or after: shards and samples done, bad, the rate, and what is left."""
    from dataclasses import asdict

    from vitscore.rundir.status import read_status, status_lines

    found = read_status(folder)
    if as_json:
        tell_json(asdict(found))
    else:
        tell_lines(status_lines(found))


def compare(
    runs: Annotated[
        list[str], typer.Argument(metavar="DIR[:NAME]...", help="Runs, or single models of them.", show_default=False)
    ],
    labels: Annotated[
        Path | None, typer.Option(metavar="FILE", help="CSV or Parquet (key, label) that wins over the runs'.")
    ] = None,
    top: Annotated[int, typer.Option(metavar="N", min=0, help="Disagreements to list for each pair.")] = 10,
    as_json: Json = False,
) -> None:
    """Compare models of one run, or of several, on the samples that they all have.

    Runs are joined on the shard's base name and the key, else on the key. Tests are exact and corrected for the number
    of pairs (Holm); intervals are for paired samples. Nothing is written.
    """
    from vitscore.results.compare import compare_runs
    from vitscore.text.comparison import comparison_lines
    from vitscore.text.notes import figure_notes
    from vitscore.text.tables import models_table

    document = compare_runs(runs, labels=labels, top=top)
    if as_json:
        tell_json(document)
        return
    if document["samples"]:
        tell_lines([*models_table(document), *figure_notes(document)])
    tell_lines(comparison_lines(document, rows_shown=top))


def export(
    folder: Output,
    form: Annotated[
        str,
        typer.Option("-f", "--format", metavar="clip-benchmark|timm|cleanlab", help="The form.", show_default=False),
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="FILE", help="The file to write.", show_default=False)
    ],
    model: Annotated[
        str | None, typer.Option("-m", "--model", metavar="NAME", help="One model; timm's form takes all by default.")
    ] = None,
    dataset: Annotated[
        str, typer.Option(metavar="NAME", help="The data set's name for CLIP_benchmark; default: the folder's.")
    ] = "",
    approximate: Annotated[
        bool,
        typer.Option("--approximate", help="cleanlab without saved logits: spread what the top k leave evenly."),
    ] = False,
) -> None:
    """Write a run in the form of another tool.

    clip-benchmark: the JSON of one evaluation. timm: a results CSV, a row a model. cleanlab: an .npz with pred_probs,
    labels, keys and classes, exact where the run had --save logits.
    """
    from vitscore.results.export import export as write

    tell_lines(write(folder, form, output, model=model, dataset=dataset, approximate=approximate))


def doctor(as_json: Json = False) -> None:
    """What this machine can do, what is missing, and the command that installs it.

    Exit 0 where runs will work (with or without a GPU), 4 where a package is missing or a GPU cannot be used.
    """
    from vitscore.cli.doctor import document_of, examine, lines_of, problems

    findings = examine()
    if as_json:
        tell_json(document_of(findings))
    else:
        tell_lines(lines_of(findings))
    if wrong := problems(findings):
        raise SetupError(
            "set-up is not complete", where=wrong[0].name, got=wrong[0].found, next_step=f"{wrong[0].fix}."
        )


def tell_json(document: Any) -> None:
    typer.echo(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False))


def tell_lines(lines: list[str]) -> None:
    for line in lines:
        typer.echo(line)
