"""Make shards from a source, with one writing process per core.

Top of the flow: source, plan, writers. The plan is written beside the shards first (`make-plan.json`), so that an
interrupted run can be resumed and a different one is refused. A shard that has its final name is complete. Progress is
reported by a callback per finished shard; nothing is printed here.
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
    locked_folder,
    make_plan,
)
from vitscore.shards.making.sources import Sample, Source, read_csv, read_image_folder
from vitscore.shards.making.write import write_file, write_shard


@dataclass(frozen=True)
class Made:
    """Summary of the shards in the output folder."""

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
    """Recognise and list a source: a CSV file, CIFAR in an official format, or an image folder.

    Args:
        source: the file or folder.
        classes: class names in order of their ids; not used for CIFAR, which includes its names.
        split: the part of CIFAR to read: train, test or all.
        coarse: whether to use CIFAR-100's superclasses as classes.
    """
    if os.path.isfile(source):
        if not source.lower().endswith(".csv"):
            raise UsageError("unknown source", where=source, expected="an image folder, CIFAR, or a .csv file")
        return read_csv(source, classes=classes)
    if not os.path.isdir(source):
        raise UsageError("no such source", where=source, expected="an image folder, CIFAR, or a .csv file")
    cifar = find_cifar(source)
    if cifar is not None:
        form, folder, is_binary = cifar
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
    """Write a source as shards, or complete the shards of an interrupted run with the same plan.

    Args:
        source: the samples to write.
        output: the output folder, created if missing.
        per_shard: samples per shard; excludes `shard_bytes`.
        shard_bytes: maximum size of a shard; 256 MB if neither is given. A larger sample gets a shard to itself.
        shuffle: the seed to shuffle the samples with; None keeps the order of the source.
        workers: writing processes; None uses all usable cores.
        overwrite: whether to remove the shards of a different plan first.
        on_shard: called with the number of samples of every shard that is finished, or was finished before.

    Raises:
        UsageError: both sizes are given, the output is not a folder, or another process is writing to it.
        OtherRunError: the folder holds shards of a different plan, or shards that were not made here.
        DataError: an image can no longer be read.
        SetupError: the folder cannot be written to.
    """
    if per_shard is not None and shard_bytes is not None:
        raise UsageError("conflicting shard sizes", expected="--per-shard or --shard-size", got="both")
    if per_shard is None and shard_bytes is None:
        shard_bytes = DEFAULT_SHARD_BYTES
    samples = list(source.samples)
    if shuffle is not None:
        random.Random(shuffle).shuffle(samples)
    cuts = cut_samples(samples, per_shard=per_shard, shard_bytes=shard_bytes)
    plan = make_plan(source, samples, len(cuts), per_shard=per_shard, shard_bytes=shard_bytes, shuffle=shuffle)
    folder = Path(output)
    if folder.exists() and not folder.is_dir():
        raise UsageError("output is not a folder", where=output, next_step="Choose another with -o.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SetupError("cannot create the folder", where=output, got=error.strerror or str(error)) from error
    with locked_folder(folder):
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
    """Return the number of cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _write_all(jobs: Sequence[tuple[str, Sequence[Sample]]], *, workers: int) -> Iterator[int]:
    """Write shards in `workers` processes, and yield the number of samples of every finished shard."""
    workers = min(workers, len(jobs))
    if workers <= 1:
        for path, samples in jobs:
            yield write_shard(path, samples)
        return
    # A fork server loads the writer's imports once for all workers, and is safe even if this process has threads.
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
        next_step = "Run the command again to continue."
        raise SetupError("a writing process died", got=str(error), next_step=next_step) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _begin_worker() -> None:
    """Leave Ctrl-C to the parent process, and exit when the parent ends for any reason."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_exit_with, args=(parent.sentinel,), daemon=True).start()


def _exit_with(sentinel: int) -> None:
    from multiprocessing.connection import wait

    wait([sentinel])
    os._exit(1)
