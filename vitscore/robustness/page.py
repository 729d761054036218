"""Write robustness.html for a finished grid; reads a shard again for the picture, but loads no weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitscore.robustness.html import render
from vitscore.system.durable import write_bytes_durably

if TYPE_CHECKING:
    from vitscore.plan.plan import Plan


def write_page(plan: Plan, folder: Path, document: dict[str, Any]) -> None:
    """Render the document with one image of the shards under every condition, as the first model sees it."""
    from vitscore.models.loading import geometry_of
    from vitscore.preprocess import Geometry
    from vitscore.robustness.estimate import example_pictures

    geometry = geometry_of(plan.models[0].checkpoint)
    pictures = dict(example_pictures(plan, geometry)) if isinstance(geometry, Geometry) else {}
    write_bytes_durably(folder / "robustness.html", render(document, pictures).encode())
