"""`vitscore shards`: make, index, ls, verify.

Results go to standard output as plain text or JSON, progress to standard error, on a terminal only. `cli.main` handles
errors. Nothing heavy is imported at the top.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from vitscore.cli.options import AllowPipe, CacheFolder, Decoder, LabelKey, Progress
from vitscore.errors import DataError, ShardError, UsageError
from vitscore.text.console import size_text
from vitscore.text.shards import column_lines, parse_size, printable, summary_cells, summary_entry, total_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vitscore.decode.verify import Fault
    from vitscore.shards.shard import Corpus, Shard

app = typer.Typer(name="shards", help="Build and inspect shards.", no_args_is_help=True, rich_markup_mode=None)

Shards = Annotated[
    list[str],
    typer.Argument(
        metavar="SHARDS...", help="As for run: demo, paths, globs, folders, lists, URLs.", show_default=False
    ),
]
Split = Annotated[str, typer.Option(metavar="NAME", help="Split of a CLIP_benchmark data set.")]
Classes = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Class names, one per line, in order of ids.", show_default=False)
]
ImageKey = Annotated[
    str | None,
    typer.Option(metavar="EXT", help="Extension of the image member; default: any image.", show_default=False),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def make(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A folder with one folder per class, a folder of CIFAR-10 or CIFAR-100 in an official format, or a "
            "CSV of path,label.",
            show_default=False,
        ),
    ],
    output: Annotated[
        str, typer.Option("-o", "--output", metavar="DIR", help="Folder for the shards.", show_default=False)
    ],
    per_shard: Annotated[
        int | None, typer.Option(metavar="COUNT", help="Samples per shard.", show_default=False)
    ] = None,
    shard_size: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Maximum size of a shard; default: 256MB.", show_default=False),
    ] = None,
    classes: Classes = None,
    split: Annotated[str, typer.Option(metavar="train|test|all", help="Split of CIFAR.")] = "test",
    coarse: Annotated[bool, typer.Option("--coarse", help="Label with CIFAR-100's 20 superclasses.")] = False,
    shuffle: Annotated[
        int | None, typer.Option(metavar="SEED", help="Shuffle the samples with this seed.", show_default=False)
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option("-j", "--workers", metavar="N", help="Writer processes; default: the usable cores.", min=1),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace shards made from another source or with other options.")
    ] = False,
    as_json: Json = False,
    progress: Progress = None,
) -> None:
    """Make shards; the same command resumes after an interruption."""
    from vitscore.shards.making.make import make_shards, read_source
    from vitscore.shards.sidefiles import read_classes

    names = read_classes(classes) if classes else None
    samples = read_source(source, classes=names, split=split, coarse=coarse)
    with progress_bar("making", len(samples.samples), unit="images", is_shown=progress) as advance:
        made = make_shards(
            samples,
            output,
            per_shard=per_shard,
            shard_bytes=parse_size(shard_size) if shard_size else None,
            shuffle=shuffle,
            workers=workers,
            overwrite=overwrite,
            on_shard=advance,
        )
    if as_json:
        typer.echo(json.dumps(asdict(made), indent=2))
        return
    reused = f" ({made.num_already_there} already there)" if made.num_already_there else ""
    kinds = f", {made.num_classes} classes" if made.num_classes is not None else ""
    typer.echo(
        f"{made.num_samples} samples{kinds}, {made.num_shards} shards{reused}, {size_text(made.num_bytes)}: "
        f"{printable(made.folder)}"
    )
    for note in made.notes:
        typer.echo(f"note: {note}")


@app.command()
def index(
    shards: Shards,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", metavar="FILE", help=".parquet or .jsonl; default: JSON lines on standard output."
        ),
    ] = None,
    split: Split = "test",
    allow_pipe: AllowPipe = False,
    cache_dir: CacheFolder = None,
) -> None:
    """List every member of every shard: shard, member, key, extension, offset, size."""
    from vitscore.shards.listing import index_rows
    from vitscore.shards.locate import locate
    from vitscore.shards.remote.cache import Cache

    if output is not None and output.suffix not in (".parquet", ".jsonl"):
        raise UsageError("unknown kind of index", where=str(output), expected=".parquet or .jsonl")
    faults: list[tuple[str, str]] = []

    def rows_of(shard: Shard) -> list[dict[str, Any]]:
        rows, fault = index_rows(shard, cache=Cache(cache_dir))
        if fault is not None:
            faults.append((shard.name, fault))
        return [asdict(row) for row in rows]

    corpus = locate(shards, split=split, allow_pipe=allow_pipe)
    if output is None:
        write_json_lines(sys.stdout.write, corpus.shards, rows_of)
    else:
        write_index(output, corpus.shards, rows_of)
    raise_shard_faults(faults, len(corpus.shards))


@app.command()
def ls(
    shards: Shards,
    split: Split = "test",
    classes: Classes = None,
    label_key: LabelKey = "cls",
    image_key: ImageKey = None,
    allow_pipe: AllowPipe = False,
    cache_dir: CacheFolder = None,
    as_json: Json = False,
) -> None:
    """Show the contents of shards: samples, bytes, formats, classes."""
    from vitscore.shards.labels import LabelRule
    from vitscore.shards.listing import common_folder, summarise_shard
    from vitscore.shards.locate import locate
    from vitscore.shards.remote.cache import Cache

    corpus = locate(shards, split=split, allow_pipe=allow_pipe)
    names = class_names(corpus, classes)
    rule = LabelRule(names, label_key=label_key)
    cache = Cache(cache_dir)
    summaries = [summarise_shard(shard, labels=rule, image_key=image_key, cache=cache) for shard in corpus.shards]
    total = total_of(summaries, names)
    if as_json:
        entries = [summary_entry(summary) for summary in summaries]
        typer.echo(json.dumps({"shards": entries, "total": total}, indent=2, ensure_ascii=False))
    else:
        folder = common_folder([summary.name for summary in summaries])
        if folder:
            typer.echo(f"{printable(folder)}:")
        rows = [summary_cells(summary_entry(summary), summary.name.removeprefix(folder)) for summary in summaries]
        rows.append(summary_cells(total, f"all {len(summaries)}"))
        for line in column_lines(["shard", "samples", "bytes", "formats", "classes", "bad", "fault"], rows):
            typer.echo(line)
        for summary in summaries:
            for note in summary.notes:
                typer.echo(f"note: {printable(summary.name)}: {note}")
    raise_shard_faults([(s.name, s.fault) for s in summaries if s.fault is not None], len(summaries))


@app.command()
def verify(
    shards: Shards,
    split: Split = "test",
    classes: Classes = None,
    labels: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="CSV or Parquet (key, label) that overrides the shards' labels.", show_default=False
        ),
    ] = None,
    label_key: LabelKey = "cls",
    image_key: ImageKey = None,
    decoder: Decoder = "auto",
    decode_threads: Annotated[
        int | None,
        typer.Option("-j", "--decode-threads", metavar="N", help="Decoding threads; default: the usable CPUs.", min=1),
    ] = None,
    max_pixels: Annotated[
        int, typer.Option(metavar="N", help="Report images that declare more pixels as faults.")
    ] = 178_956_970,
    allow_pipe: AllowPipe = False,
    cache_dir: CacheFolder = None,
    as_json: Json = False,
    progress: Progress = None,
) -> None:
    """Decode everything and report every fault; exit code 3 if there is one."""
    from vitscore.shards.labels import LabelRule, load_labels
    from vitscore.shards.locate import locate
    from vitscore.shards.making.make import usable_cores
    from vitscore.shards.remote.cache import Cache

    if decoder not in ("auto", "dali", "torchvision"):
        raise UsageError("unknown decoder", where="--decoder", expected="auto, dali or torchvision", got=decoder)
    corpus = locate(shards, split=split, allow_pipe=allow_pipe)
    rule = LabelRule(
        class_names(corpus, classes), label_key=label_key, overrides=load_labels(labels) if labels else None
    )
    # Imported late because it loads torch: a wrong option is reported at once.
    from vitscore.decode.verify import verify_shards

    faults: list[Fault] = []

    def report(fault: Fault) -> None:
        faults.append(fault)
        if not as_json:
            place = fault.shard if fault.key is None else f"{fault.shard}[{fault.key}]"
            typer.echo(printable(f"{place}: {fault.reason}"))

    with progress_bar("verifying", len(corpus.shards), unit="shards", is_shown=progress) as advance:
        verified = verify_shards(
            corpus.shards,
            labels=rule,
            num_threads=decode_threads or usable_cores(),
            image_key=image_key,
            decoder=cast('Literal["auto", "dali", "torchvision"]', decoder),
            max_pixels=max_pixels,
            cache=Cache(cache_dir),
            on_fault=report,
            on_shard=lambda: advance(1),
        )
    if as_json:
        document = {**asdict(verified), "faults": [asdict(fault) for fault in faults]}
        typer.echo(json.dumps(document, indent=2, ensure_ascii=False))
    elif verified.is_sound:
        typer.echo(f"{verified.num_samples} samples in {verified.num_shards} shards: every one decodes")
    if not verified.is_sound:
        raise DataError(
            "shards have faults",
            got=f"{verified.num_bad_samples} bad samples of {verified.num_samples}, "
            f"{verified.num_bad_shards} bad shards of {verified.num_shards}",
        )


def class_names(corpus: Corpus, file: Path | None) -> tuple[str, ...] | None:
    """Return the names of `--classes`, or else of the side file; None accepts any label."""
    from vitscore.shards.sidefiles import read_classes

    return read_classes(file) if file else corpus.classes


def raise_shard_faults(faults: Sequence[tuple[str, str]], num_shards: int) -> None:
    """Raise one error for the bad shards, if any: it names the first and counts them."""
    if faults:
        name, fault = faults[0]
        raise ShardError("bad shard", where=name, got=f"{fault} ({len(faults)} of {num_shards} shards are bad)")


def write_json_lines(
    write: Callable[[str], Any], shards: Sequence[Shard], rows_of: Callable[[Shard], list[dict[str, Any]]]
) -> None:
    for shard in shards:
        for row in rows_of(shard):
            write(json.dumps(row, ensure_ascii=False) + "\n")


def write_index(output: Path, shards: Sequence[Shard], rows_of: Callable[[Shard], list[dict[str, Any]]]) -> None:
    """Write the index to a file, shard by shard, atomically."""
    from vitscore.system.durable import durable_path

    with durable_path(output) as temporary:
        if output.suffix == ".jsonl":
            with open(temporary, "w", encoding="utf-8") as stream:
                write_json_lines(stream.write, shards, rows_of)
            return
        import pyarrow as pa
        import pyarrow.parquet as pq

        names = ("shard", "member", "key", "extension")
        schema = pa.schema([*((name, pa.string()) for name in names), ("offset", pa.int64()), ("size", pa.int64())])
        with pq.ParquetWriter(temporary, schema) as writer:
            for shard in shards:
                writer.write_table(pa.Table.from_pylist(rows_of(shard), schema=schema))


@contextlib.contextmanager
def progress_bar(what: str, total: int, *, unit: str, is_shown: bool | None) -> Iterator[Callable[[int], None]]:
    """Show a progress bar on standard error, on a terminal or if asked for; yield the function that advances it."""
    if not (sys.stderr.isatty() if is_shown is None else is_shown):
        yield lambda num_done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TextColumn(unit), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda num_done: bar.advance(task, num_done)
