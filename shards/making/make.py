"""Making shards: a source is cut into shards, and all cores write them, each shard whole.

The top of the making flow: source, plan, writers. The plan is written beside the shards first (`make-plan.json`), so
that an interrupted making goes on where it was and another one is refused. A shard with its final name is finished.
Nothing here knows about terminals: progress is a call for every finished shard.
"""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import random
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from vitscore.errors import SetupError, UsageError
from vitscore.shards.making.cifar import find_cifar, read_cifar
from vitscore.shards.making.cutting import (
    CLASSES_FILE,
    DEFAULT_SHARD_BYTES,
    claim_folder,
    cut_samples,
    make_plan,
    only_maker,
)
from vitscore.shards.making.sources import Sample, Source, read_csv, read_image_folder
from vitscore.shards.making.write import write_file, write_shard


@dataclass(frozen=True)
class Made:
    """What a making left behind."""

    folder: str
    num_shards: int
    num_already_there: int
    num_samples: int
    num_bytes: int
    num_classes: int | None
    notes: tuple[str, ...]


def read_source(
    source: str, *, classes: Sequence[str] | None = None, split: str = "test", coarse: bool = False
) -> Source:
    """Recognise a source: a CSV file, CIFAR in an official form, or an image folder.

    Args:
        source: the file or folder.
        classes: class names in order of their ids; CIFAR brings its own.
        split: the part of CIFAR to take: train, test or all.
        coarse: CIFAR-100's superclasses.
    """
    if os.path.isfile(source):
        if not source.lower().endswith(".csv"):
            raise UsageError("unknown source", where=source, expected="an image folder, CIFAR, or a .csv file")
        return read_csv(source, classes=classes)
    if not os.path.isdir(source):
        raise UsageError("no such source", where=source, expected="an image folder, CIFAR, or a .csv file")
    found = find_cifar(source)
    if found is not None:
        form, folder, is_binary = found
        return read_cifar(form, folder, is_binary=is_binary, split=split, coarse=coarse)
    return read_image_folder(source, classes=classes)


def make_shards(
    source: Source,
    output: str,
    *,
    per_shard: int | None = None,
    shard_bytes: int | None = None,
    shuffle: int | None = None,
    workers: int | None = None,
    overwrite: bool = False,
    on_shard: Callable[[int], None] = lambda num_samples: None,
) -> Made:
    """Write a source as shards; goes on where an interrupted making of the same plan stopped.

    Args:
        source: what to write.
        output: the folder; made where it is missing.
        per_shard: samples a shard, or
        shard_bytes: the largest size of a shard (256 MB where neither is given); a larger sample has its own.
        shuffle: a seed to mix the samples by; None keeps the source's order.
        workers: processes; all usable cores where None.
        overwrite: remove the shards of another plan first.
        on_shard: called with a shard's samples when it is finished, or found finished.

    Raises:
        OtherRunError: the folder holds shards of another plan, or shards that were not made here.
        DataError: an image cannot be read any more.
        SetupError: the folder cannot be written.
    """
    if per_shard is not None and shard_bytes is not None:
        raise UsageError("two shard sizes", expected="--per-shard or --shard-size", got="both")
    if per_shard is None and shard_bytes is None:
        shard_bytes = DEFAULT_SHARD_BYTES
    samples = list(source.samples)
    if shuffle is not None:
        random.Random(shuffle).shuffle(samples)
    cuts = cut_samples(samples, per_shard=per_shard, shard_bytes=shard_bytes)
    plan = make_plan(source, samples, len(cuts), per_shard=per_shard, shard_bytes=shard_bytes, shuffle=shuffle)
    folder = Path(output)
    if folder.exists() and not folder.is_dir():
        raise UsageError("output is not a folder", where=output, next_step="Name another with -o.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SetupError("cannot make the folder", where=output, got=error.strerror or str(error)) from error
    with only_maker(folder):
        claim_folder(folder, plan, overwrite=overwrite)
        if source.classes is not None:
            write_file(folder / CLASSES_FILE, "".join(f"{name}\n" for name in source.classes).encode())
        paths = [folder / f"shard-{number:06d}.tar" for number in range(len(cuts))]
        jobs = [(str(path), cut) for path, cut in zip(paths, cuts, strict=True) if not path.exists()]
        for path, cut in zip(paths, cuts, strict=True):
            if path.exists():
                on_shard(len(cut))
        for num_samples in _write_all(jobs, workers=workers or usable_cores()):
            on_shard(num_samples)
    return Made(
        folder=output,
        num_shards=len(paths),
        num_already_there=len(paths) - len(jobs),
        num_samples=len(samples),
        num_bytes=sum(path.stat().st_size for path in paths),
        num_classes=len(source.classes) if source.classes is not None else None,
        notes=source.notes,
    )


def usable_cores() -> int:
    """The cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _write_all(jobs: Sequence[tuple[str, Sequence[Sample]]], *, workers: int) -> Iterator[int]:
    """Write shards, a process each, and yield the samples of each as it is finished."""
    workers = min(workers, len(jobs))
    if workers <= 1:
        for path, samples in jobs:
            yield write_shard(path, samples)
        return
    # A fork server loads the writer's imports once for all workers, and is safe where this process has threads.
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:
        context.set_forkserver_preload(["webdataset.writer", "PIL.Image", "vitscore.shards.making.write"])
    pool = concurrent.futures.ProcessPoolExecutor(workers, mp_context=context, initializer=_begin_worker)
    try:
        futures = [pool.submit(write_shard, path, samples) for path, samples in jobs]
        for future in concurrent.futures.as_completed(futures):
            yield future.result()
    except concurrent.futures.process.BrokenProcessPool as error:
        raise SetupError("a writing process died", got=str(error), next_step="Run it again; it goes on.") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _begin_worker() -> None:
    """Leave Ctrl-C to the parent, and die with it however it dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_die_with, args=(parent.sentinel,), daemon=True).start()


def _die_with(sentinel: int) -> None:
    from multiprocessing.connection import wait

    wait([sentinel])
    os._exit(1)
