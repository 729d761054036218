"""Decoding on the GPU: that DALI works, how far its pixels are from the CPU's by kind of image, and how fast it is."""

from __future__ import annotations

import itertools
import runpy
import time
from typing import Any

import numpy as np

from vitscore.bench.gpu.day import NO_GPU, ROOT, Day, device_id, has_gpu
from vitscore.bench.harness import record
from vitscore.bench.harness.timing import figure
from vitscore.bench.harness.watch import watching
from vitscore.bench.peers.decoding import EDGE, GEOMETRY, read_images, submit_and_collect
from vitscore.bench.stages.decoding import steady_rate
from vitscore.system.machine import num_usable_cpus

LOADS = (0.0, 0.65, 0.85, 1.0)
"""The share of JPEGs that the hardware decoder is given; with 0 the GPU's cores decode all."""


def dali(day: Day) -> None:
    """DALI decodes a batch of every kind of image here, on the CPU and on the GPU."""
    from vitscore.decode.make import make_decoder

    started = time.perf_counter()
    import nvidia.dali as package

    day.figure("DALI's import", time.perf_counter() - started, "s", version=package.__version__)
    pictures = runpy.run_path(str(ROOT / "tests" / "support" / "pictures.py"))
    kinds: dict[str, bytes] = pictures["ordinary"]()
    images = [np.frombuffer(content, np.uint8) for content in kinds.values()]
    pixels = {}
    for where, number in (("cpu", None), ("gpu", device_id())):
        decoder = make_decoder("dali", [GEOMETRY], batch_size=len(images), num_threads=4, device_id=number)
        try:
            decoder.submit(images)
            decoded = decoder.collect()
            pixels[where] = decoded.pixels[0].cpu().numpy().astype(float)
            for row, fault in decoded.faults.items():
                day.figure(f"{list(kinds)[row]} on the {where.upper()}", "bad", note=fault)
        finally:
            decoder.close()
    levels = np.abs(pixels["gpu"] - pixels["cpu"]).mean(axis=(1, 2, 3))
    if has_gpu():
        day.figure("DALI", "works", note=f"{len(images)} kinds of image on CPU and GPU")
    else:
        day.figure("DALI", "works", note=f"on the CPU alone; {NO_GPU}")
    worst = list(kinds)[int(levels.argmax())]
    note = f"the worst of {len(kinds)} kinds: {worst}" if has_gpu() else NO_GPU
    by_kind = dict(zip(kinds, levels.round(3).tolist(), strict=True))
    day.figure("levels mixed / CPU", float(levels.max()), note=note, by_kind=by_kind)


def rates(day: Day) -> None:
    """Images/s by the hardware decoder's load and the number of threads; also as the JSON of `bench decoding`."""
    started, size = time.time(), day.sizes.batch_size
    images = [image for block in read_images(sorted(day.photos.glob("*.tar"))) for image in block]
    by_load: dict[str, Any] = {}
    best = 0.0
    cpus = num_usable_cpus()
    for threads in dict.fromkeys((cpus, max(1, cpus // 4))):
        for load in LOADS:
            name = f"decoding, load {load}, {threads} thread{'s' if threads > 1 else ''}"
            if load and not has_gpu():
                day.could_not(name, NO_GPU)
                continue
            options: dict[str, Any] = {"device_id": 0, "hw_decoder_load": load} if has_gpu() else {}
            with watching() as watch:
                stream = submit_and_collect(
                    itertools.cycle(images), "dali", batch_size=size, num_threads=threads, **options
                )
                rate = steady_rate(stream, max(1, day.sizes.decoded // size), warm_up=4)
            day.figure(name, rate, "images/s", batch_size=size, edge=EDGE, meanwhile=watch.highest)
            if threads == cpus:
                by_load[f"load {load}"] = {f"batch {size}": figure([rate], "images/s")}
                note_plain_rate(day, by_load, size)
                write(day, by_load, started)
            if rate > best:
                best = rate
                day.figure("best decoding", rate, "images/s", note=name.removeprefix("decoding, "))


def note_plain_rate(day: Day, by_load: dict[str, Any], size: int) -> None:
    """Write the rate without the hardware decoder, if it is the one just measured."""
    if list(by_load) == ["load 0.0"]:
        rate = by_load["load 0.0"][f"batch {size}"]["median"]
        day.figure("decoding without hardware", rate, "images/s", note="" if has_gpu() else f"{NO_GPU}: the CPU's")


def write(day: Day, by_load: dict[str, Any], started: float) -> None:
    result = {"mixed_images_per_s": by_load} if has_gpu() else {"cpu_images_per_s": by_load}
    seconds = time.time() - started
    record.write(day.out, "decoding", result, started=started, seconds=seconds, quick=day.is_rehearsal)
