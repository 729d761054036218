"""Plan a large run from measured rates: hours, cost, and the stage that limits it.

    rate of one GPU = (what its stages allow together) x (the share of that which a whole run reached)
    hours           = start-up + images / (GPUs x rate) + fold on rank 0

On a GPU the stages overlap, and the slowest limits; on a CPU decoding and the forward share the cores, so that their
times add up. Every number in a plan is in its list of assumptions, with the file it comes from.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vitscore.bench.harness.timing import show
from vitscore.bench.report import stages
from vitscore.bench.report.stages import Rate, Records

WIDTH = 80


@dataclass(frozen=True)
class Wish:
    """The run to plan."""

    images: float
    gpus: int = 1
    price: float | None = None
    """Of a GPU for an hour."""
    models: tuple[str, ...] = ()
    per_shard: int = 10_000


@dataclass(frozen=True)
class Plan:
    """The result of planning, one attribute per line of the table; rates are images/s of one GPU."""

    wish: Wish
    is_gpu: bool
    reading_per_s: float
    decoding_per_s: float
    forward_per_s: float
    bound_per_s: float
    reached: float
    """The share of its bound that the measured whole run reached."""
    startup_s: float
    scoring_s: float
    fold_s: float
    limit: str
    shards: int
    parts_bytes: float
    image_bytes: float | None
    assumptions: tuple[str, ...]

    @property
    def per_s(self) -> float:
        return self.bound_per_s * self.reached

    @property
    def hours(self) -> float:
        return (self.startup_s + self.scoring_s + self.fold_s) / 3600

    @property
    def gpu_hours(self) -> float:
        return self.hours * self.wish.gpus

    @property
    def cost(self) -> float | None:
        return None if self.wish.price is None else self.gpu_hours * self.wish.price

    @property
    def device(self) -> str:
        return "GPU" if self.is_gpu else "machine"


def make_plan(wish: Wish, records: Records) -> Plan:
    """Plan from measured rates.

    Raises:
        UsageError: a rate that is needed was not measured; the bench to run is named.
    """
    read, decode = stages.reading(records), stages.decoding(records)
    forwards = [stages.forward(records, model) for model in wish.models or (None,)]
    forward_per_s = 1 / sum(1 / forward.value for forward in forwards)
    loop, loop_bound = stages.loop(records), stages.bound(records)
    startup, fold = stages.startup(records), stages.fold_s_per_million(records)
    is_gpu = stages.is_gpu(forwards[0].record)
    bound = bound_of(read.value, decode.value, forward_per_s, is_gpu=is_gpu)
    reached = min(1.0, loop.value / loop_bound.value)
    return Plan(
        wish=wish,
        is_gpu=is_gpu,
        reading_per_s=read.value,
        decoding_per_s=decode.value,
        forward_per_s=forward_per_s,
        bound_per_s=bound,
        reached=reached,
        startup_s=startup.value,
        scoring_s=wish.images / (wish.gpus * bound * reached),
        fold_s=fold * wish.images / 1e6,
        limit=limit_of(read.value, decode.value, forward_per_s, is_gpu=is_gpu),
        shards=math.ceil(wish.images / wish.per_shard),
        parts_bytes=wish.images * len(forwards) * stages.part_bytes_per_row(records),
        image_bytes=stages.image_bytes(records),
        assumptions=tuple(assumptions(records, [read, decode, *forwards, loop, loop_bound, startup], is_gpu=is_gpu)),
    )


def bound_of(reading: float, decoding: float, forward: float, *, is_gpu: bool) -> float:
    """Images/s that the stages allow together."""
    return min(reading, decoding, forward) if is_gpu else min(reading, 1 / (1 / decoding + 1 / forward))


def limit_of(reading: float, decoding: float, forward: float, *, is_gpu: bool) -> str:
    """The stage that is slowest."""
    rates = {"reading": reading, "decoding": decoding, "forward": forward}
    if not is_gpu and reading > 1 / (1 / decoding + 1 / forward):
        del rates["reading"]
    return min(rates, key=lambda stage: rates[stage])


def assumptions(records: Records, rates: Sequence[Rate], *, is_gpu: bool) -> Iterator[str]:
    """Line by line: where each rate comes from, and what is taken for granted."""
    for rate in rates:
        quick = "; measured with --quick, from small counts" if rate.record.is_quick else ""
        yield (
            f"{rate.record.bench}, {rate.name}: {show(rate.figure)} {rate.figure['unit']}, from {rate.record.path}, "
            f"{rate.record.date}, {rate.record.machine}{quick}"
        )
    offline = records["offline"]
    yield f"the fold and the size of the parts: from {offline.path}, {offline.date}, {offline.machine}"
    if len({rate.record.machine for rate in rates}) > 1:
        yield "the rates are of different machines, as if one had them all"
    if is_gpu:
        yield "on a GPU reading, decoding and the forward overlap: the slowest of them limits"
        yield "scaling is linear: every GPU has as many CPU cores and as fast a store to itself as when it was measured"
    else:
        yield "on a CPU decoding and the forward share the cores: 1 / (1 / decoding + 1 / forward); reading overlaps"
        yield "scaling is linear: the machines are like the one measured, each with as fast a store to itself"
    yield "a whole run reaches the same share of its bound with this model as with the one measured"
    yield "start-up takes as long as the demo's"
    yield "the images are as large as those measured; shards lie where they were read from, or as near"
    yield "rank 0 folds alone while the others wait and are paid for; the report is not counted"


def lines_of(plan: Plan) -> list[str]:
    """For people."""
    wish, device = plan.wish, plan.device
    cost = "" if plan.cost is None else f"; {plan.cost:,.2f} at {wish.price:,.2f} a {device} hour"
    lines = [
        f"{wish.images:,.0f} images on {wish.gpus:,} {device}{'s' if wish.gpus > 1 else ''}",
        f"{duration(plan.hours * 3600)}; {plan.gpu_hours:,.1f} {device} hours{cost}",
        f"limited by {plan.limit}",
        "",
        f"{'images/s':<26}{'one ' + device:>14}{wish.gpus:>14,}",
    ]
    for name, value in (
        ("reading", plan.reading_per_s),
        ("decoding", plan.decoding_per_s),
        ("forward", plan.forward_per_s),
        ("together at best", plan.bound_per_s),
        (f"as a run ({plan.reached:.2f} of that)", plan.per_s),
    ):
        lines.append(f"{name:<26}{value:>14,.1f}{value * wish.gpus:>14,.0f}")
    lines.append("")
    lines += [f"{name:<10}{value}" for name, value in details(plan)]
    lines += ["", "assumed:"]
    for assumption in plan.assumptions:
        # A path stays whole, so that it can be copied.
        wrapper = textwrap.TextWrapper(WIDTH, initial_indent="- ", subsequent_indent="  ")
        wrapper.break_on_hyphens = wrapper.break_long_words = False
        lines += wrapper.wrap(assumption)
    return lines


def details(plan: Plan) -> Iterator[tuple[str, str]]:
    """Times, shards, parts and what the store has to give."""
    yield "start", duration(plan.startup_s)
    yield "scoring", duration(plan.scoring_s)
    yield "fold", f"{duration(plan.fold_s)}, on rank 0"
    uneven = plan.wish.per_shard / plan.per_s
    yield "shards", f"{plan.shards:,} of {plan.wish.per_shard:,} images; one takes {duration(uneven)}"
    if plan.shards < 10 * plan.wish.gpus:
        yield "", f"too few to share well: at least {10 * plan.wish.gpus:,} are better; see --per-shard"
    one, parts = scaled(plan.parts_bytes / plan.shards), scaled(plan.parts_bytes)
    yield "parts", f"{plan.shards:,} files of {one}, {parts} in all"
    if plan.image_bytes:
        rate = scaled(plan.image_bytes * plan.per_s * plan.wish.gpus)
        yield "store", f"{scaled(plan.image_bytes * plan.wish.images)} of images, {rate} a second"


def duration(seconds: float) -> str:
    """`2.5 hours`, `4.0 minutes`, `12.3 s`."""
    for size, unit in ((86_400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:,.1f} s"


def scaled(num_bytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if num_bytes < 1000:
            return f"{num_bytes:.1f} {unit}" if unit != "B" else f"{num_bytes:.0f} B"
        num_bytes /= 1000
    return f"{num_bytes:,.1f} PB"


def document_of(plan: Plan) -> dict[str, Any]:
    """`--json`: the plan with what follows from it."""
    derived = {name: getattr(plan, name) for name in ("per_s", "hours", "gpu_hours", "cost")}
    return {**asdict(plan), **derived}
