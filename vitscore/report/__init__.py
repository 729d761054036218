"""The report: one HTML file with a run's results, which opens anywhere without a network.

    data.py        gathers the figures, the samples worth a look (samples.py) and their pictures (thumbnails.py)
    page.py        computes the page's sections (words, models_table, comparison, confidence, record) and its static
                   figures (figures.py, from the elements of svg.py)
    templates/     lay the page out (templating.py); page.css styles it; *.js sorts, filters and draws in the browser

Comes after the fold over the parts. Needs no torch and no model. The shards are read for pictures only; without them
the report says so and has everything else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vitscore.metrics.fold import Folded

REPORT_FILE = "report.html"


@dataclass(frozen=True)
class Written:
    """The file that `write_report` wrote."""

    path: Path
    num_bytes: int
    num_thumbnails: int
    notes: list[str]
    """Pictures that are missing, and why."""


def write_report(
    folder: Path,
    folded: Folded,
    record: Mapping[str, Any],
    *,
    path: Path | None = None,
    shards: Sequence[str] = (),
    with_thumbnails: bool = True,
) -> Written:
    """Write the report of the run in `folder`, atomically.

    Args:
        folder: the run's folder.
        folded: the result of folding its parts.
        record: its run.json.
        path: the file to write; by default `report.html` in the folder.
        shards: where the shards are now; by default where run.json says.
        with_thumbnails: read pictures from the shards.

    Raises:
        SetupError: the file cannot be written.
    """
    from vitscore.report.data import gather
    from vitscore.report.page import render
    from vitscore.system.durable import write_bytes_durably, writing

    path = path or folder / REPORT_FILE
    findings = gather(folder, folded, record, shards=shards, with_thumbnails=with_thumbnails)
    content = render(findings).encode()
    with writing(path):
        write_bytes_durably(path, content)
    return Written(path, len(content), len(findings.thumbnails.images), findings.thumbnails.notes)
