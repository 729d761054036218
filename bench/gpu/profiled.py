"""Profile a run on the GPU: busy share, largest gaps, longest kernels, and the trace to look at.

torch's profiler records a window in the middle of a run, inside this process. Kernels of DALI and of the engine are in
it; the hardware JPEG decoder is no kernel, so its work shows only as a lack of decoding kernels.
"""

from __future__ import annotations

import gzip
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from vitscore.bench.gpu.day import NO_GPU, Day, has_gpu
from vitscore.bench.gpu.prepare import corpus
from vitscore.bench.gpu.runner import MOST_BYTES, TRACE

ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
CALLS = ("cuda_runtime", "cuda_driver")
"""Calls of the host; numba launches through the driver."""
SKIPPED = 8
"""Batches before the window: queues fill, buffers grow."""
MOST_GAPS = 5
Event = Mapping[str, Any]


@dataclass(frozen=True)
class Gap:
    """A time in which nothing ran on the GPU."""

    begins_us: float
    seconds: float
    after: str
    before: str
    host: str
    """The CUDA call that the host was in for longest meanwhile."""


def profile(day: Day) -> None:
    """Run B/16 under the profiler; write figures and the trace."""
    events = record_run(day)
    trace = day.work / "trace.json"
    write_trace(json.loads(trace.read_bytes()), day.out / TRACE)
    day.figure("trace", TRACE, batches=day.sizes.profiled, bytes=(day.out / TRACE).stat().st_size)
    busy = on_gpu(events)
    if not busy:
        day.could_not("GPU busy", NO_GPU if not has_gpu() else "the profiler saw no kernel")
        return
    share, begins, ends = busy_share(busy)
    day.figure("GPU busy", share, note=f"of {(ends - begins) / 1e3:,.0f} ms, {day.sizes.profiled} batches")
    for stream, own in by_stream(busy).items():
        day.figure(f"stream {stream} busy", sum_of_union(own) / (ends - begins), kernels=len(own))
    for number, gap in enumerate(gaps(busy, events), 1):
        note = f"after {gap.after[:50]}, before {gap.before[:50]}; the host in {gap.host}"
        day.figure(f"gap {number}", gap.seconds * 1e3, "ms", note=note, at_ms=round((gap.begins_us - begins) / 1e3, 2))
    for name, seconds in longest_kernels(busy).most_common(8):
        day.figure(f"kernel {name[:60]}", seconds * 1e3, "ms")


def record_run(day: Day) -> list[Event]:
    """Run under the profiler; the events of the window, which also lie in a file of the step's folder."""
    import torch.profiler as profiler

    from vitscore import score
    from vitscore.run import run as runs
    from vitscore.run.progress import Reporter

    activities = [profiler.ProfilerActivity.CPU, *([profiler.ProfilerActivity.CUDA] if has_gpu() else [])]
    batches = SKIPPED + 2 + day.sizes.profiled + 4
    images = day.sizes.batch_size * batches
    times = -(-images // day.sizes.photos)
    path = day.work / "trace.json"
    path.unlink(missing_ok=True)
    schedule = profiler.schedule(wait=SKIPPED, warmup=2, active=day.sizes.profiled, repeat=1)
    recorder = profiler.profile(
        activities=activities, schedule=schedule, on_trace_ready=lambda done: done.export_chrome_trace(str(path))
    )

    class Stepping(Reporter):
        """A reporter that names every batch to the profiler."""

        def __call__(self, tally: Any) -> None:
            super().__call__(tally)
            recorder.step()

    options: dict[str, Any] = {"batch_size": day.sizes.batch_size, "progress": False, "overwrite": True}
    with corpus(day, times) as shards, recorder, patch.object(runs, "Reporter", Stepping):
        score(shards, day.checkpoint("B/16"), day.work / "run", compile=False, **options)
    if not path.is_file():
        raise RuntimeError(f"the run ended before {SKIPPED + 2 + day.sizes.profiled} batches: no trace")
    events: list[Event] = json.loads(path.read_bytes())["traceEvents"]
    return events


def write_trace(document: dict[str, Any], path: Path) -> None:
    """Write a trace small enough to be carried: where it is too large, without the operators of the host."""
    wanted: Sequence[Sequence[str] | None] = (None, (*ON_GPU, *CALLS, "user_annotation"), ON_GPU)
    for categories in wanted:
        kept = [
            event
            for event in document["traceEvents"]
            if categories is None or event.get("cat") in categories or event.get("ph") == "M"
        ]
        path.write_bytes(gzip.compress(json.dumps({**document, "traceEvents": kept}).encode(), 6))
        if path.stat().st_size <= MOST_BYTES:
            return


def on_gpu(events: Iterable[Event]) -> list[Event]:
    """Select the events of the GPU, in order of their beginning."""
    ran = [event for event in events if event.get("cat") in ON_GPU and "dur" in event]
    return sorted(ran, key=lambda event: float(event["ts"]))


def busy_share(events: Sequence[Event]) -> tuple[float, float, float]:
    """The share of the window in which something ran, and the window in microseconds."""
    begins, ends = float(events[0]["ts"]), max(end_of(event) for event in events)
    return sum_of_union(events) / (ends - begins), begins, ends


def sum_of_union(events: Sequence[Event]) -> float:
    """Microseconds in which at least one of the events ran."""
    total, reached = 0.0, float("-inf")
    for event in events:
        total += max(0.0, end_of(event) - max(reached, float(event["ts"])))
        reached = max(reached, end_of(event))
    return total


def end_of(event: Event) -> float:
    return float(event["ts"]) + float(event["dur"])


def by_stream(events: Iterable[Event]) -> dict[str, list[Event]]:
    streams: dict[str, list[Event]] = {}
    for event in events:
        streams.setdefault(str(event.get("args", {}).get("stream", "?")), []).append(event)
    return dict(sorted(streams.items(), key=lambda pair: -len(pair[1])))


def gaps(busy: Sequence[Event], events: Iterable[Event]) -> list[Gap]:
    """Times in which nothing ran, the longest of them, longest first."""
    pauses, last = [], busy[0]
    for event in busy[1:]:
        if float(event["ts"]) > end_of(last):
            pauses.append((end_of(last), float(event["ts"]), str(last["name"]), str(event["name"])))
        if end_of(event) > end_of(last):
            last = event
    pauses.sort(key=lambda pause: pause[0] - pause[1])
    calls = [event for event in events if event.get("cat") in CALLS and "dur" in event]
    return [
        Gap(begins, (ends - begins) / 1e6, after, before, longest_call(calls, begins, ends) or "no CUDA call")
        for begins, ends, after, before in pauses[:MOST_GAPS]
    ]


def longest_call(calls: Iterable[Event], begins: float, ends: float) -> str:
    """The CUDA call that overlaps a time most."""
    overlaps: Counter[str] = Counter()
    for call in calls:
        overlap = min(ends, end_of(call)) - max(begins, float(call["ts"]))
        if overlap > 0:
            overlaps[str(call["name"])] += int(overlap)
    return next((name for name, _ in overlaps.most_common(1)), "")


def longest_kernels(busy: Iterable[Event]) -> Counter[str]:
    """Seconds by name."""
    seconds: Counter[str] = Counter()
    for name, group in itertools.groupby(sorted(busy, key=lambda event: str(event["name"])), lambda e: str(e["name"])):
        seconds[name] = sum(float(event["dur"]) for event in group) / 1e6  # type: ignore[assignment]
    return seconds
