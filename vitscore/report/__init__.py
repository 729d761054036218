"""The report: one HTML file that shows what a run found, and opens anywhere without a network.

    data.py        gathers the figures, the samples worth a look (samples.py) and their pictures (thumbnails.py)
    figures.py     draws the diagrams that stand still, as SVG
    page.py        writes the page: text and tables here; page.css, and *.js for what can be sorted, filtered, clicked

Last in the flow, behind the fold over the parts. It needs no torch and no model. The shards are asked for pictures
only: where they are gone, the report says so and has everything else.
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
    """What was written."""

    path: Path
    num_bytes: int
    num_thumbnails: int
    notes: list[str]
    """What is not shown, and why."""


def write_report(
    folder: Path,
    folded: Folded,
    record: Mapping[str, Any],
    *,
    path: Path | None = None,
    shards: Sequence[str] = (),
    with_thumbnails: bool = True,
) -> Written:
    """Write the report of the run in `folder`, whole or not at all.

    Args:
        folder: the run's.
        folded: what its parts come to.
        record: its run.json.
        path: where to; by default `report.html` in the folder.
        shards: where the shards are now; by default where run.json says.
        with_thumbnails: look into the shards for pictures.

    Raises:
        SetupError: it cannot be written.
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
