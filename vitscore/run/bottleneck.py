"""Find the stage that limits a run, from the loop's waiting times, and advise what to change.

Called at the end of a run. `advise` is a pure function; every number in its advice follows from the measured share and
from the run's resources. Advice is about cores, batches, stores and disks, and about a lower precision only if the
machine computes it faster.
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
"""Larger batches of 224 x 224 images do not fit a core's cache."""
MOST_TIMES = 20
"""The largest multiple of the present threads that is advised."""


@dataclass(frozen=True)
class Situation:
    """Measurements and resources of a run, one attribute per fact that a sentence may need; counts are of one rank."""

    stage: str
    """The stage with the longest waiting time: one of `stage_times.STAGES`."""
    share: float
    """The stage's share of the loop's time."""
    images_per_s: float
    """Rate of all ranks together."""
    device: str = "cpu"
    precision: str = "fp32"
    has_bf16: bool = False
    """Whether this CPU has bf16 instructions."""
    is_compiled: bool = False
    batch_size: int = 16
    is_batch_asked: bool = False
    """Whether the user set the batch size."""
    decoder: str = "dali"
    threads: int = 1
    """Decoding threads."""
    cpus: int = 1
    ranks: int = 1
    is_remote: bool = False
    cache_size: int = 3
    saves: bool = False
    """Whether long outputs (logits, embeddings) are written."""


@dataclass(frozen=True)
class Bottleneck:
    """The limiting stage, for run.json and the last lines of a run's output."""

    stage: str
    share: float
    advice: str


def advise(now: Situation) -> str:
    """Return advice in at most 58 characters."""
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
    """Advise more threads up to the number of cores. On a CPU the forward shares the cores, so only more cores help."""
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
    """Return the stage that this rank's loop waited for longest; None if there was no loop.

    Args:
        waiting_s: waiting time by stage.
        seconds: duration of the loop.
        plan: the run's plan.
        ranks: number of ranks.
        cpus: CPUs that this rank may use.
        images_per_s: rate of all ranks together.
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
    """Return the fields of `Situation` that follow from the plan."""
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
