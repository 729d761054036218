"""Arguments and options shared by several commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Output = Annotated[Path, typer.Argument(metavar="DIR", help="A run's folder.", show_default=False)]
PerClass = Annotated[bool, typer.Option("--per-class", help="Also print precision, recall and F1 of each class.")]
AllowPipe = Annotated[bool, typer.Option("--allow-pipe", help="Allow shards of the form pipe:COMMAND.")]
CacheFolder = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Folder for remote and compressed shards while they are read; default: TMPDIR."),
]
OutputFolder = Annotated[
    Path | None, typer.Option("-o", "--output", metavar="DIR", help="The run's folder.", show_default=False)
]
ClassesFile = Annotated[Path | None, typer.Option(metavar="FILE", help="Class names, one per line, or JSON.")]
TemplatesFile = Annotated[Path | None, typer.Option(metavar="FILE", help="Zero-shot prompts with {c} or {}.")]
LabelMaps = Annotated[
    list[str] | None,
    typer.Option(metavar="[NAME=]FILE|by-position", help="Map from a head's classes to the data set's."),
]
LabelsFile = Annotated[
    Path | None, typer.Option(metavar="FILE", help="CSV or Parquet (key, label) that overrides the shards' labels.")
]
LabelKey = Annotated[str, typer.Option(metavar="cls|json:FIELD", help="The label: a .cls member or a JSON field.")]
BatchSize = Annotated[
    int | None, typer.Option("-b", "--batch-size", metavar="N", help="Images per forward; default: automatic.")
]
Device = Annotated[str, typer.Option(metavar="auto|cpu|cuda", help="Device that runs the models.")]
Precision = Annotated[
    str, typer.Option(metavar="auto|fp32|bf16|fp16", help="Precision of the encoder; heads always use fp32.")
]
Decoder = Annotated[str, typer.Option(metavar="auto|dali|torchvision", help="Library that decodes the images.")]
DecodeThreads = Annotated[
    int | None,
    typer.Option("-j", "--decode-threads", metavar="N", help="Decoding threads; default: the usable CPUs."),
]
AugmentSeed = Annotated[int, typer.Option(metavar="N", help="Seed of the operators' random numbers.")]
Limit = Annotated[int | None, typer.Option(metavar="N", help="Score the first N samples only.")]
Progress = Annotated[
    bool | None, typer.Option("--progress/--no-progress", help="Show progress; default: on a terminal.")
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Start over if the folder holds a run.")]


def is_given(context: typer.Context, name: str) -> bool:
    """Return whether a parameter was set on the command line rather than by default."""
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"
