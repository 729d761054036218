"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Output = Annotated[Path, typer.Argument(metavar="DIR", help="A run's folder.", show_default=False)]
PerClass = Annotated[bool, typer.Option("--per-class", help="Also print precision, recall and F1 of each class.")]
AllowPipe = Annotated[bool, typer.Option("--allow-pipe", help="Run shards of the form pipe:COMMAND.")]
CacheFolder = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Where remote and compressed shards lie while they are read; default: TMPDIR."),
]
OutputFolder = Annotated[
    Path | None, typer.Option("-o", "--output", metavar="DIR", help="The run's folder.", show_default=False)
]
ClassesFile = Annotated[Path | None, typer.Option(metavar="FILE", help="Class names, one a line, or JSON.")]
TemplatesFile = Annotated[Path | None, typer.Option(metavar="FILE", help="Zero-shot prompts with {c} or {}.")]
LabelMaps = Annotated[
    list[str] | None,
    typer.Option(metavar="[NAME=]FILE|by-position", help="How a head's classes become the data set's."),
]
LabelsFile = Annotated[Path | None, typer.Option(metavar="FILE", help="CSV or Parquet (key, label) that wins.")]
LabelKey = Annotated[str, typer.Option(metavar="cls|json:FIELD", help="Where a sample's label is.")]
BatchSize = Annotated[
    int | None, typer.Option("-b", "--batch-size", metavar="N", help="Images a forward; default: auto.")
]
Device = Annotated[str, typer.Option(metavar="auto|cpu|cuda", help="Where the models run.")]
Precision = Annotated[str, typer.Option(metavar="auto|fp32|bf16|fp16", help="Of the trunk; heads are fp32.")]
Decoder = Annotated[str, typer.Option(metavar="auto|dali|torchvision", help="What decodes the images.")]
DecodeThreads = Annotated[
    int | None,
    typer.Option("-j", "--decode-threads", metavar="N", help="Threads that decode; default: the usable CPUs."),
]
AugmentSeed = Annotated[int, typer.Option(metavar="N", help="Seed of the operators' random numbers.")]
Limit = Annotated[int | None, typer.Option(metavar="N", help="Score the first N samples only.")]
Progress = Annotated[bool | None, typer.Option("--progress/--no-progress", help="Default: on a terminal only.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Start anew in a folder that holds a run.")]


def is_given(context: typer.Context, name: str) -> bool:
    """Whether a parameter was set on the command line rather than by default."""
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"
