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
