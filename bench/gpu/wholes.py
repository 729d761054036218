"""Whole runs: their rates beside their bound and beside other tools, their predictions beside the CPU's.

Every run is a process, as a user starts it. A run's rate is that of its loop; a second figure includes its start.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from vitscore.bench.gpu.day import NO_GPU, Day, has_gpu
from vitscore.bench.gpu.prepare import corpus
from vitscore.bench.harness import record
from vitscore.bench.harness.runs import OwnRun, run_own
from vitscore.bench.harness.timing import ratio
from vitscore.bench.harness.watch import watching
from vitscore.bench.peers.bound import measure_bound
from vitscore.bench.peers.processes import PeerRun, run_peer
from vitscore.bench.peers.settings import BEST_ON_CUDA, Settings
from vitscore.bench.whole import LOOP, PIPELINE, bound_figures, rates

BASE = "B/16"
AUGMENT = ("--augment", "gaussian_blur:severity=2", "--augment", "jpeg_compression:severity=2")
STREAMS = ("own", "default")
STREAM_VARIABLE = "VITSCORE_CUDA_STREAM"


def base(day: Day) -> None:
    """B/16: a run, and its bound; also as the JSON of `bench whole`."""
    started = time.time()
    own = run(day, BASE, day.sizes.times)
    result: dict[str, Any] = {"model": day.sizes.models[BASE], "images": own.images, "ratios": {}, "loop_ratios": {}}
    result["vitscore"] = rates([own], own.settings)
    limits: dict[str, Any] = {"num_images": day.sizes.photos, "at_least_s": day.sizes.at_least_s}
    bound = measure_bound(day.photos, [day.checkpoint(BASE)], **limits)
    day.figure(f"{BASE} decoding alone", bound.decode, "images/s")
    day.figure(f"{BASE} forward alone", bound.all_forwards, "images/s")
    day.figure(f"{BASE} bound", bound.images_per_s, "images/s")
    result |= bound_figures(result["vitscore"]["loop_images_per_s"], [bound])
    day.figure(f"{BASE} share of bound", result["share_of_bound"]["median"])
    write(day, result, started)


def large(day: Day) -> None:
    run(day, "L/14", max(1, day.sizes.times // 3))


def small(day: Day) -> None:
    run(day, "B/32", day.sizes.times)


def augmented(day: Day) -> None:
    run(day, BASE, max(1, day.sizes.times // 3), *AUGMENT, name=f"{BASE} run, augmented")


def streams(day: Day) -> None:
    """The same run on a stream of the engine's and on the default one, in turn."""
    rates_by_stream: dict[str, list[float]] = {stream: [] for stream in STREAMS}
    slowest_s = 0.0
    for stream in (*STREAMS, *reversed(STREAMS)):
        if all(rates_by_stream.values()) and day.left_s < 1.2 * slowest_s:
            return
        name = f"{BASE} run, {stream} stream"
        own = run(day, BASE, day.sizes.times, name=name, env={STREAM_VARIABLE: stream})
        slowest_s = max(slowest_s, own.wall_s)
        rates_by_stream[stream].append(own.images / own.loop_s)
        if all(rates_by_stream.values()):
            share = np.median(rates_by_stream["own"]) / np.median(rates_by_stream["default"])
            note = "" if has_gpu() else NO_GPU
            day.figure("own / default stream", float(share), note=note, runs=sum(map(len, rates_by_stream.values())))


def run(day: Day, model: str, times: int, *options: str, name: str = "", env: dict[str, str] | None = None) -> OwnRun:
    """Run a model over the photographs, every one `times` times, and write its figures."""
    name = name or f"{model} run"
    with corpus(day, times) as shards, watching() as watch:
        own = run_own(shards, [day.checkpoint(model)], day.work / "run", *options, env=env)
    print_session(name, own)
    day.figure(
        name,
        own.images / own.loop_s,
        "images/s",
        note=f"{own.settings}; waits {waits(own)}"[:60],
        images=own.images,
        options=list(options),
        waiting_s=own.session.get("waiting_s"),
        measured=own.session.get("measured"),
        meanwhile=watch.highest,
    )
    day.figure(f"{name}, start included", own.images / own.wall_s, "images/s")
    if (first := own.session.get("first_batch_s")) is not None:
        day.figure(f"{name}, first batch", first, "s")
    return own


def waits(own: OwnRun) -> str:
    """Name the stage that the loop waited for longest, with its share of the time."""
    seconds = own.session.get("waiting_s") or {}
    if not seconds:
        return "for nothing"
    stage = max(seconds, key=lambda stage: float(seconds[stage]))
    return f"for {stage} {100 * seconds[stage] / own.loop_s:.0f}%"


def print_session(name: str, own: OwnRun) -> None:
    """Into the log: all that the run wrote about itself."""
    sys.stdout.write(f"{name}: {json.dumps(own.session, default=str)}\n")
    sys.stdout.flush()


def peers(day: Day) -> None:
    """The hand-written loop in half precision and transformers' pipeline, on the same GPU, beside our run."""
    sizes, precision = day.sizes, "half" if has_gpu() else "fp32"
    own = run(day, BASE, max(1, sizes.times // 2), name=f"{BASE} run beside peers")
    with corpus(day, sizes.by_loop) as shards:
        how = dataclasses.replace(BEST_ON_CUDA["loop"][0], batch_size=sizes.batch_size, precision=precision)
        how = dataclasses.replace(how, workers=2, threads=1) if day.is_rehearsal else how
        beside(day, own, "loop", LOOP, how, shards)
    how = Settings(sizes.batch_size, precision, workers=1)
    beside(day, own, "pipeline", PIPELINE, how, day.photos)


def beside(day: Day, own: OwnRun, peer: str, title: str, settings: Settings, shards: Path) -> PeerRun:
    theirs = run_peer(peer, shards, day.checkpoint(BASE), settings)
    rate = theirs.images / theirs.loop_s
    day.figure(f"{title}, {BASE}", rate, "images/s", note=str(settings), images=theirs.images)
    day.figure(f"times the {peer}", own.images / own.loop_s / rate, note=f"{rate:,.0f} images/s; {settings}"[:60])
    add_peer(day, own, theirs, title, settings)
    return theirs


def add_peer(day: Day, own: OwnRun, theirs: PeerRun, title: str, settings: Settings) -> None:
    """Into the JSON of `bench whole`, where the run before wrote it."""
    path = day.out / "whole.json"
    if not path.is_file():
        return
    result: dict[str, Any] = dict(record.read(path).result)
    result[title] = rates([theirs], str(settings))
    ours = rates([own], own.settings)
    for kind, key in (("ratios", "images_per_s"), ("loop_ratios", "loop_images_per_s")):
        result[kind] = {**result[kind], title: ratio(ours[key], result[title][key])}
    write(day, result, time.time())


def write(day: Day, result: dict[str, Any], started: float) -> None:
    seconds = time.time() - started
    record.write(day.out, "whole", result, started=started, seconds=seconds, quick=day.is_rehearsal)


def predictions(day: Day) -> None:
    """A run's predictions in three precisions beside the CPU's in fp32, on the same photographs."""
    from vitscore import score
    from vitscore.bench.harness.checkpoints import CLASSES

    assert (day.photos / "classes.txt").read_text().split("\n")[0] == CLASSES[0]
    models = [f"B16={day.checkpoint(BASE)}", "demo-vit", "demo-clip"]
    asked: dict[str, Any] = {
        "limit": day.sizes.compared,
        "save": "logits",
        "compile": False,
        "overwrite": True,
        "progress": False,
        "label_map": "demo-vit=by-position",
    }
    device = "cuda" if has_gpu() else "cpu"
    rows_by_precision = {}
    for precision in ("fp32", "fp16", "bf16"):
        if precision == "fp16" and device == "cpu":
            day.could_not("fp16 predictions that differ", NO_GPU)
            continue
        done = score(day.photos, models, day.work / f"on-{precision}", device=device, precision=precision, **asked)
        rows_by_precision[precision] = done.predictions()
    expected = score(day.photos, models, day.work / "on-cpu", device="cpu", precision="fp32", **asked).predictions()
    for precision, rows in rows_by_precision.items():
        compare(day, precision, rows, expected)


def compare(day: Day, precision: str, rows: Any, expected: Any) -> None:
    """Answers that differ where the CPU's best class leads by more than 0.01, and how far logits are apart."""
    counted = 0
    for model in ("B16", "demo-vit", "demo-clip"):
        one, other = (np.array(table[f"{model}.logits"].to_pylist(), float) for table in (rows, expected))
        best = np.sort(other, axis=1)
        lead = best[:, -1] - best[:, -2]
        differs = one.argmax(1) != other.argmax(1)
        is_clear = lead > 0.01 * np.maximum(1.0, np.abs(best[:, -1]))
        counted += int((differs & is_clear).sum())
        day.figure(
            f"{precision} logits apart, {model}",
            float(np.abs(one - other).max()),
            images=len(one),
            mean=round(float(np.abs(one - other).mean()), 6),
            spread=round(float(other.std()), 4),
            top1_differs=int(differs.sum()),
            largest_lead=round(float(lead[differs].max(initial=0.0)), 5),
        )
    note = f"of {3 * len(rows):,} with a clear lead" + ("" if has_gpu() else f"; {NO_GPU}: the CPU beside itself")
    day.figure(f"{precision} predictions that differ", counted, note=note)
