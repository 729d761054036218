"""Forwards alone: images/s and TFLOP/s of a batch on the device, and what of a batch's time is Python's.

The host's time is from the call of an idle device until the call returns; where it exceeds the device's, the GPU waits
for Python between kernels. Random weights and pixels, as in `bench forward`.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

from vitscore.bench.gpu.day import NO_GPU, Day, has_gpu
from vitscore.bench.harness import record
from vitscore.bench.harness.timing import clock, figure
from vitscore.bench.stages import forward

ROUNDS = 20


def eager(day: Day) -> None:
    """Every model as it comes; also as the JSON of `bench forward`, which grows model by model."""
    started = time.time()
    result: dict[str, dict[str, Any]] = {"images_per_s": {}, "gflop_per_image": {}, "compile_s": {}}
    for model in day.sizes.models:
        rate, case, gflop = measure(day, model, is_compiled=False)
        result["images_per_s"][case.name] = figure([rate], "images/s")
        result["gflop_per_image"][case.kind] = gflop
        record.write(day.out, "forward", result, started=started, seconds=time.time() - started, quick=day.is_rehearsal)


def compiled_base(day: Day) -> None:
    measure(day, "B/16", is_compiled=True)


def compiled_large(day: Day) -> None:
    measure(day, "L/14", is_compiled=True)


def measure(day: Day, model: str, *, is_compiled: bool) -> tuple[float, forward.Case, float]:
    """One model's figures; its rate, what was measured, and the GFLOP of an image."""
    sizes, suffix = day.sizes, ", compiled" if is_compiled else ""
    case = forward.Case(sizes.models[model], sizes.precision, sizes.batch_size, is_compiled=is_compiled)  # type: ignore[arg-type]
    loaded, seconds = forward.load(day.checkpoint(model), case, is_compiled=is_compiled)
    day.figure(f"{model} {'compiling' if is_compiled else 'loading'}", seconds, "s", case=case.name)
    gflop = float(loaded.cost()["gflop_per_image"])
    if has_gpu():
        host_ms, device_ms = times(loaded, sizes.batch_size)
        day.figure(f"{model} host{suffix}", host_ms, "ms", case=case.name)
        day.figure(f"{model} device{suffix}", device_ms, "ms", case=case.name)
        day.figure(f"{model} host / device{suffix}", host_ms / device_ms)
    else:
        day.could_not(f"{model} host / device{suffix}", NO_GPU)
    rate = forward.rate_of(loaded, case, at_least_s=sizes.at_least_s)
    day.figure(
        f"{model} forward{suffix}",
        rate,
        "images/s",
        note=f"{gflop * rate / 1e3:,.0f} TFLOP/s",
        case=case.name,
        gflop_per_image=round(gflop, 2),
    )
    return rate, case, gflop


def times(model: Any, batch_size: int) -> tuple[float, float]:
    """Milliseconds of a batch: until the call returns, and on the device with batches one behind the other."""
    import torch

    with torch.inference_mode():
        pixels = model.black_images(batch_size).to("cuda")
        for _ in range(3):
            model(pixels)
        host = []
        for _ in range(ROUNDS):
            started = clock()
            model(pixels)
            host.append(time.perf_counter() - started)
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        clock()
        first.record()
        for _ in range(ROUNDS):
            model(pixels)
        last.record()
        clock()
    return statistics.median(host) * 1e3, first.elapsed_time(last) / ROUNDS
