"""Photographs and checkpoints for the steps: made once, side by side on all cores, and kept for later parts."""

from __future__ import annotations

import contextlib
import multiprocessing
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from vitscore.bench.gpu.day import Day
from vitscore.bench.harness.checkpoints import CLASSES, make_checkpoint
from vitscore.bench.harness.corpus import photos, repeat, write
from vitscore.system.machine import num_usable_cpus

SHARDS = 16
"""Of different photographs; at least one for every worker of a loop."""


def prepare(day: Day) -> None:
    """Make what is not there yet."""
    started = time.perf_counter()
    once(day.photos, lambda folder: make_photos(day, folder))
    day.figure("making photographs", time.perf_counter() - started, "s", images=day.sizes.photos)
    started = time.perf_counter()
    wanted = dict.fromkeys((day.checkpoint(model), kind) for model, kind in day.sizes.models.items())
    missing = [(folder, kind) for folder, kind in wanted if not folder.exists()]
    if missing:
        with ProcessPoolExecutor(len(missing), mp_context=multiprocessing.get_context("spawn")) as pool:
            list(pool.map(make_one, missing))
    day.figure("making checkpoints", time.perf_counter() - started, "s", kinds=[kind for _, kind in missing])


def make_photos(day: Day, folder: Path) -> None:
    samples = photos(day.sizes.photos, workers=num_usable_cpus())
    write(folder, samples, per_shard=-(-day.sizes.photos // SHARDS), classes=[*CLASSES])


def make_one(wanted: tuple[Path, str]) -> None:
    """Make a checkpoint; runs in a process beside others."""
    once(wanted[0], lambda folder: make_checkpoint(folder, kind=wanted[1]))


def once(folder: Path, make: Callable[[Path], None]) -> None:
    """Make a folder whole, under another name first, where it is not there."""
    if folder.exists():
        return
    began = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(began, ignore_errors=True)
    began.parent.mkdir(parents=True, exist_ok=True)
    make(began)
    began.rename(folder)


@contextlib.contextmanager
def corpus(day: Day, times: int) -> Iterator[Path]:
    """The photographs, every shard of them `times` over."""
    folder = day.work / f"photos-{times}-{day.part}-{day.step.replace('/', '-')}"
    shutil.rmtree(folder, ignore_errors=True)
    repeat(day.photos, folder, times)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)
