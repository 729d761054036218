"""What limits a run, and what to change: from the seconds that its loop waited, stage by stage.

Beside the engine, at the end of a run. The rules are one pure function; every number in them follows from the measured
share and from what the run was given. Advice never changes an answer: it is about cores, batches, stores and disks, and
about precision only where the machine computes it faster.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vitscore.shards.redaction import is_remote

if TYPE_CHECKING:
    from vitscore.plan.plan import Plan

GPU_BATCH = 128
"""Smaller batches may leave a GPU idle between kernels."""
CPU_BATCH = 16
"""Larger batches of images of 224 x 224 leave a core's cache."""
MOST_TIMES = 20
"""More than so many times the threads is no advice."""


@dataclass(frozen=True)
class Situation:
    """What a run was given, and what came of it; counts are of one rank."""

    stage: str
    """Waited for longest: a key of stage_times.STAGES."""
    share: float
    """Of the loop's time."""
    images_per_s: float
    """Of all ranks."""
    device: str = "cpu"
    precision: str = "fp32"
    has_bf16: bool = False
    """Whether this CPU has bf16 instructions."""
    is_compiled: bool = False
    batch_size: int = 16
    is_batch_asked: bool = False
    """Whether somebody asked for that batch size."""
    decoder: str = "dali"
    threads: int = 1
    """That decode."""
    cpus: int = 1
    ranks: int = 1
    is_remote: bool = False
    cache_size: int = 3
    saves: bool = False
    """Whether long outputs (logits, embeddings) are written."""


@dataclass(frozen=True)
class Bottleneck:
    """For run.json and for the last lines of a run."""

    stage: str
    share: float
    advice: str


def advise(now: Situation) -> str:
    """What to change, in at most 58 characters."""
    if now.stage == "read":
        if now.is_remote:
            return f"a nearer store, or more shards ahead: --cache-size {2 * now.cache_size}"
        return "copy the shards to a faster or a local disk"
    if now.stage == "write":
        return "write less (--save), or to a faster disk (-o)" if now.saves else "put -o on a faster disk"
    if now.stage == "count":
        return "more ranks share the loop's work, larger batches save some"
    if now.stage == "decode":
        return advise_decoding(now)
    return advise_forward_on_gpu(now) if now.device == "cuda" else advise_forward_on_cpu(now)


def advise_decoding(now: Situation) -> str:
    """More threads up to the cores; on a CPU the forward has the same cores, so that only more of them help."""
    if now.decoder == "torchvision" and now.device == "cuda":
        return "DALI decodes on the GPU: pip install nvidia-dali-cuda130"
    if now.device == "cpu":
        if now.threads < now.cpus:
            return f"-j {now.cpus} decodes on all cores"
        return f"the forward shares its {counted(now.cpus, 'core')}: only more cores help"
    wanted = math.ceil(now.threads * min(MOST_TIMES, 1 / max(1 - now.share, 1e-9)) - 1e-9)
    threads = min(wanted, now.cpus) if now.threads < now.cpus else wanted
    rate = now.images_per_s * min(threads / now.threads, 1 / max(1 - now.share, 1 / MOST_TIMES))
    how = f"-j {threads}" if now.threads < now.cpus else f"{threads} CPUs, not {now.threads},"
    return f"{how} would give about {rate:,.0f} images/s"


def advise_forward_on_gpu(now: Situation) -> str:
    if now.precision == "fp32":
        return "--precision fp16 uses the GPU's tensor cores"
    if not now.is_compiled:
        return "--compile makes it faster"
    if now.batch_size < GPU_BATCH:
        return f"larger batches fill the GPU: -b {2 * GPU_BATCH}"
    return f"{2 * now.ranks} GPUs, not {now.ranks}, would give about {2 * now.images_per_s:,.0f} images/s"


def advise_forward_on_cpu(now: Situation) -> str:
    if now.precision == "fp32" and now.has_bf16:
        return "--precision bf16 uses instructions that this CPU has"
    if now.is_batch_asked and now.batch_size > CPU_BATCH:
        return "leave out -b: batches that fit the CPU's cache are chosen"
    cores = counted(now.cpus * now.ranks, "core")
    if now.precision == "fp32":
        return f"its {cores} lack bf16; more cores or a GPU help"
    return f"its {cores} are busy; more cores or a GPU help"


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def find_bottleneck(
    waiting_s: Mapping[str, float], seconds: float, *, plan: Plan, ranks: int, cpus: int, images_per_s: float | None
) -> Bottleneck | None:
    """What this rank's loop waited for longest; None where there was no loop.

    Args:
        waiting_s: by stage.
        seconds: of the whole loop.
        plan: the run's plan.
        ranks: how many there are.
        cpus: that this rank may use.
        images_per_s: of all ranks.
    """
    if not waiting_s or seconds <= 0:
        return None
    stage = max(waiting_s, key=lambda name: waiting_s[name])
    share = min(1.0, waiting_s[stage] / seconds)
    situation = Situation(
        stage=stage,
        share=share,
        images_per_s=images_per_s or 0.0,
        cpus=cpus,
        ranks=ranks,
        **given(plan, cpus=cpus),
    )
    return Bottleneck(stage, round(share, 3), advise(situation))


def given(plan: Plan, *, cpus: int) -> dict[str, Any]:
    """What the plan says of the situation."""
    from vitscore.plan.choices import has_bf16_instructions

    return {
        **{name: getattr(plan.choices, name) for name in ("device", "precision", "batch_size", "decoder")},
        "is_compiled": plan.choices.compile,
        "has_bf16": has_bf16_instructions(),
        "is_batch_asked": plan.options.batch_size is not None,
        "threads": plan.options.decode_threads or cpus,
        "is_remote": bool(plan.shards) and is_remote(plan.shards[0].path),
        "cache_size": plan.options.cache_size,
        "saves": bool(plan.options.save),
    }
