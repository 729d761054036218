"""The rates of the stages, out of the JSON of the benches that measured them: the only place that knows their shapes.

    reading    result["large_samples_per_s"]["vitscore"], else result["samples_per_s"]["vitscore"]
    decoding   result["images_per_s"]["vitscore, N threads"]; on a GPU result["mixed_images_per_s"][load][batch]
    forward    result["images_per_s"]["MODEL PRECISION compiled|eager batch B"]
    whole      result["vitscore"]["images_per_s"], ["loop_images_per_s"]; result["bound_images_per_s"]
    startup    result["first_batch_s"]
    offline    result["commands"]["metrics"]["seconds"], result["rows"], ["models"], ["parts_bytes"]

`plan` and `picture` read through here. A rate that is not there is an error that names the bench to run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitscore.bench.harness.record import Record, default_folder, read_all
from vitscore.bench.harness.timing import Figure, figure
from vitscore.errors import UsageError

SHIPPED = Path(__file__).parent.parent / "results"
FORWARD_KEY = re.compile(r"(?P<model>.+) \S+ (?:compiled|eager) batch \d+")
OURS = re.compile(r"vitscore, (\d+) threads?")
Records = Mapping[str, Record]


@dataclass(frozen=True)
class Rate:
    """A figure, and where it was found."""

    record: Record
    name: str
    """Its last key, where there were several to choose from."""
    figure: Figure

    @property
    def value(self) -> float:
        value: float = self.figure["median"]
        return value


def read_sources(paths: Sequence[Path]) -> Records:
    """The benches to plan from: of files, folders, or folders that come with the package by name; later ones win.

    Raises:
        UsageError: one is no bench, or nothing is named and there is nothing, or several machines' to choose from.
    """
    if paths:
        found: dict[str, Record] = {}
        for path in paths:
            shipped = SHIPPED / path
            found |= read_all(path if path.exists() or not shipped.is_dir() else shipped)
        return found
    if any(default_folder().glob("*.json")):
        return read_all(default_folder())
    return read_all(shipped_folder())


def shipped_folder() -> Path:
    """The benches that come with the package, where they are one machine's."""
    folders = [SHIPPED, *sorted(path for path in SHIPPED.glob("*") if path.is_dir())]
    holding = [folder for folder in folders if any(folder.glob("*.json"))]
    if not holding:
        raise UsageError("nothing to plan from", where=str(default_folder()), next_step="Run `vitscore bench` first.")
    if len(holding) > 1:
        names = ", ".join(folder.name for folder in holding if folder != SHIPPED)
        raise UsageError("which benches", where="--from", expected=f"a folder of JSON, or of the package's {names}")
    return holding[0]


def need(records: Records, bench: str) -> Record:
    """A bench's record.

    Raises:
        UsageError: it is not there.
    """
    if bench not in records:
        where = ", ".join(sorted({str(record.path.parent) for record in records.values()}))
        raise UsageError("not measured", where=f"{bench}, in {where}", next_step=f"Run `vitscore bench {bench}`.")
    return records[bench]


def rate(record: Record, *keys: str, unit: str = "images/s") -> Rate:
    """The figure that these keys lead to.

    Raises:
        UsageError: they lead to none.
    """
    found = find(record.result, *keys)
    if found is None:
        where = f"{' / '.join(keys)} in {record.path}"
        raise UsageError("rate was not measured", where=where, next_step=f"Run `vitscore bench {record.bench}`.")
    return Rate(record, keys[-1], as_figure(found, unit))


def find(value: Any, *keys: str) -> Any:
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def as_figure(value: Any, unit: str) -> Figure:
    return dict(value) if isinstance(value, Mapping) else figure([float(value)], unit)


def is_gpu(record: Record) -> bool:
    return bool(record.hardware.get("gpus"))


def reading(records: Records) -> Rate:
    """Samples/s of our reader on images like those of a data set, else on tiny ones."""
    record = need(records, "reading")
    return rate(record, reading_key(record), "vitscore", unit="samples/s")


def reading_key(record: Record) -> str:
    has_large = find(record.result, "large_samples_per_s", "vitscore") is not None
    return "large_samples_per_s" if has_large else "samples_per_s"


def image_bytes(records: Records) -> float | None:
    """Bytes of an image that was read, where the bench says it."""
    large = find(records["reading"].result, "contents", "large") if "reading" in records else None
    if not isinstance(large, Mapping) or not large.get("samples"):
        return None
    return float(large["image_bytes"]) / float(large["samples"])


def decoding(records: Records) -> Rate:
    """Our decoder on all the cores it was measured with; on a GPU the best load and batch size."""
    record = need(records, "decoding")
    if isinstance(sweep := record.result.get("mixed_images_per_s"), Mapping):
        cells = [
            Rate(record, f"mixed, {load}, {batch}", as_figure(found, "images/s"))
            for load, row in sweep.items()
            for batch, found in row.items()
        ]
        if cells:
            return max(cells, key=lambda cell: cell.value)
    rates = find(record.result, "images_per_s") or {}
    threads = {int(match[1]): key for key in rates if (match := OURS.fullmatch(key))}
    return rate(record, "images_per_s", threads[max(threads)] if threads else "vitscore, N threads")


def forwards(records: Records) -> dict[str, Rate]:
    """Each model's best forward, by model."""
    record = need(records, "forward")
    best: dict[str, Rate] = {}
    for key in find(record.result, "images_per_s") or {}:
        match = FORWARD_KEY.fullmatch(key)
        found = rate(record, "images_per_s", key)
        if match and (match["model"] not in best or found.value > best[match["model"]].value):
            best[match["model"]] = found
    return best


def forward(records: Records, model: str | None) -> Rate:
    """A model's best forward, or the one of a whole key; without a name the first model's.

    Raises:
        UsageError: it was not measured.
    """
    best = forwards(records)
    record = records["forward"]
    if model is None and best:
        return next(iter(best.values()))
    if model in best:
        return best[model]
    if model is not None and find(record.result, "images_per_s", model) is not None:
        return rate(record, "images_per_s", model)
    raise UsageError(
        "forward was not measured",
        where=f"{model or 'any model'} in {record.path}",
        expected=f"one of {', '.join(best)}" if best else "",
        next_step="Run `vitscore bench forward`.",
    )


def whole(records: Records) -> Rate:
    return rate(need(records, "whole"), "vitscore", "images_per_s")


def loop(records: Records) -> Rate:
    return rate(need(records, "whole"), "vitscore", "loop_images_per_s")


def bound(records: Records) -> Rate:
    return rate(need(records, "whole"), "bound_images_per_s")


def startup(records: Records) -> Rate:
    """Seconds from a process' start to its first batch."""
    return rate(need(records, "startup"), "first_batch_s", unit="s")


def fold_s_per_million(records: Records) -> float:
    """Seconds of `vitscore metrics` for a million rows, its start included."""
    record = need(records, "offline")
    return 1e6 * rate(record, "commands", "metrics", "seconds", unit="s").value / rate(record, "rows").value


def part_bytes_per_row(records: Records) -> float:
    """Bytes of a part for a sample and model; the key's bytes are shared out over the models."""
    record = need(records, "offline")
    size, rows, models = (rate(record, key).value for key in ("parts_bytes", "rows", "models"))
    return size / rows / models
