"""How fast is the forward alone?

Question: images a second from uint8 pixels on the device to ranked predictions, by model, precision, eager or compiled,
          and batch size; how much of the machine's arithmetic that is.
Expected: on two cores with bf16 instructions ViT-Tiny/16 160 images/s in bf16 at batch 16, a third of that in fp32;
          smaller and larger batches 10% less; plain (without the hand-written encoder) 20 to 30% less; compiled no
          faster than eager for a compilation of 10 to 40 s. ViT-B/16 a tenth of ViT-Tiny/16 (14 times the arithmetic,
          in larger products), CLIP B/32 a half. On an H100 in fp16, compiled: ViT-B/16 5,000, B/32 15,000, L/14 1,200
          images/s, flat from batch 128 on.
Command:  vitscore bench forward
Method:   random weights and pixels; through `load_model` and `Forward` as the engine drives them: on a CPU eager
          batches side by side, one a core, with one thread inside torch each; a compiled one alone, on all threads. A
          model's cases by turns. Compiling is timed once, with an empty cache, against an eager load.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from vitscore.bench.harness.checkpoints import CLASSES, make_checkpoint
from vitscore.bench.harness.timing import Figure, clock, figure, rounds_in_turn, show, stage_rate
from vitscore.classes.matching import BY_POSITION, match_head
from vitscore.decode.pixels import Decoded
from vitscore.engine.forward import make_forward
from vitscore.engine.ranked import Awaited
from vitscore.models.checkpoint import find
from vitscore.models.image_model import ImageModel, Placement, Precision
from vitscore.models.load import HeadSpec, load_model
from vitscore.plan.choices import has_bf16_instructions
from vitscore.system.machine import num_usable_cpus

ROUNDS = 3
AT_LEAST_S = 3.0
GPU_KINDS = ("vit-tiny", "vit-base", "clip-base-32", "clip-large-14")
GPU_BATCHES = (64, 128, 256, 512)


@dataclass(frozen=True)
class Case:
    """One way to run a model."""

    kind: str
    precision: Precision
    batch_size: int
    is_compiled: bool = False
    is_plain: bool = False
    """On a CPU, transformers' modules instead of the hand-written encoder (VITSCORE_CPU_BF16=0)."""

    @property
    def name(self) -> str:
        how = "compiled" if self.is_compiled else "plain" if self.is_plain else "eager"
        return f"{self.kind} {self.precision} {how} batch {self.batch_size}"


QUICK = (Case("vit-tiny", "fp32", 4),)
CPU = (
    Case("vit-tiny", "fp32", 16),
    Case("vit-tiny", "bf16", 8),
    Case("vit-tiny", "bf16", 16),
    Case("vit-tiny", "bf16", 32),
    Case("vit-tiny", "bf16", 16, is_plain=True),
    Case("vit-tiny", "bf16", 16, is_compiled=True),
    Case("clip-base-32", "fp32", 16),
    Case("clip-base-32", "bf16", 16),
    Case("clip-base-32", "bf16", 32),
    Case("vit-base", "bf16", 16),
)
GPU = (
    *(Case(kind, "fp16", 256, is_compiled=True) for kind in GPU_KINDS),  # one each: tuning takes a minute
    *(Case(kind, "fp16", size) for kind in GPU_KINDS for size in GPU_BATCHES),
    *(Case(kind, "bf16", 256) for kind in GPU_KINDS),
    *(Case(kind, "fp32", 256) for kind in GPU_KINDS),
)


def choose_cases(*, quick: bool, has_gpu: bool, has_bf16: bool) -> tuple[Case, ...]:
    """Return the cases for this machine: only fp32 without bf16 instructions, as a run would choose."""
    if quick:
        return QUICK
    cases = GPU if has_gpu else CPU
    return tuple(case for case in cases if has_gpu or has_bf16 or case.precision == "fp32")


def measure(*, quick: bool = False) -> dict[str, Any]:
    """Images/s by case, GFLOP an image by model, seconds of compiling by case."""
    cases = choose_cases(quick=quick, has_gpu=torch.cuda.is_available(), has_bf16=has_bf16_instructions())
    rounds, at_least_s = (1, 0.2) if quick else (ROUNDS, AT_LEAST_S)
    found: dict[str, Figure] = {}
    gflop: dict[str, float] = {}
    compile_s: dict[str, float] = {}
    threads = torch.get_num_threads()
    try:
        with tempfile.TemporaryDirectory() as name:
            for kind in dict.fromkeys(case.kind for case in cases):
                folder = Path(name) / kind
                make_checkpoint(folder, kind=kind)
                own = [case for case in cases if case.kind == kind]
                measured = measure_model(folder, own, rounds=rounds, at_least_s=at_least_s)
                found |= measured[0]
                gflop[kind] = measured[1]
                compile_s |= measured[2]
    finally:
        torch.set_num_threads(threads)
    return {"images_per_s": found, "gflop_per_image": gflop, "compile_s": compile_s}


def measure_model(
    folder: Path, cases: Sequence[Case], *, rounds: int, at_least_s: float
) -> tuple[dict[str, Figure], float, dict[str, float]]:
    """One model's cases by turns: images/s, GFLOP an image, and seconds of compiling."""
    models: dict[Case, ImageModel] = {}
    compile_s: dict[str, float] = {}
    for case in cases:
        models[case], load_s = load(folder, case, is_compiled=False)
        if case.is_compiled:
            models[case], all_s = load(folder, case, is_compiled=True)
            compile_s[case.name] = max(all_s - load_s, 0.0)
    ways = {case.name: partial(rate_of, model, case, at_least_s=at_least_s) for case, model in models.items()}
    found = {name: figure(rates, "images/s") for name, rates in rounds_in_turn(ways, rounds).items()}
    return found, float(next(iter(models.values())).cost()["gflop_per_image"]), compile_s


def load(folder: Path, case: Case, *, is_compiled: bool) -> tuple[ImageModel, float]:
    """A model as a run loads it, and the seconds that took; what is compiled is compiled with an empty cache."""
    checkpoint = find(str(folder))
    head_map = match_head(CLASSES, CLASSES, label_map=BY_POSITION) if checkpoint.kind == "classifier" else None
    set_threads(is_compiled=is_compiled)
    started = clock()
    switch = {"VITSCORE_CPU_BF16": "0"} if case.is_plain else {}
    with empty_cache() if is_compiled else nullcontext(), mock.patch.dict(os.environ, switch):
        model = load_model(
            checkpoint,
            name=case.kind,
            head=HeadSpec(CLASSES, head_map, ["a photo of {c}."]),
            placement=Placement("cuda" if torch.cuda.is_available() else "cpu", case.precision, is_compiled),
        )
        if is_compiled:
            model.warm_up(case.batch_size)
    return model, clock() - started


def empty_cache() -> AbstractContextManager[None]:
    from torch._inductor.utils import fresh_cache

    cache: AbstractContextManager[None] = fresh_cache()
    return cache


def set_threads(*, is_compiled: bool) -> None:
    """Threads inside torch, as `run.score` sets them."""
    torch.set_num_threads(num_usable_cpus() if is_compiled else 1)


def rate_of(model: ImageModel, case: Case, *, at_least_s: float) -> float:
    """Images/s, with as many batches under way as the engine has."""
    set_threads(is_compiled=case.is_compiled)
    is_cuda = torch.cuda.is_available()
    forward = make_forward(
        [model],
        batch_size=case.batch_size,
        top_k=5,
        save=(),
        device_id=0 if is_cuda else None,
        num_workers=0 if case.is_compiled else num_usable_cpus(),
        has_fp32_rerun=case.precision != "fp32",
    )
    size = model.geometry.height, model.geometry.width
    pixels = torch.randint(0, 256, (case.batch_size, *size, 3), dtype=torch.uint8)
    decoded, labels = Decoded((pixels.to("cuda" if is_cuda else "cpu"),)), np.full(case.batch_size, -1, np.int32)

    def submit(_: Sequence[Any]) -> Callable[[], object]:
        return partial(settle, forward.submit(decoded, labels))

    with closing(forward):
        return stage_rate(submit, [range(case.batch_size)], depth=forward.depth + 1, at_least_s=at_least_s)


def settle(outputs: Awaited) -> None:
    for ranked in outputs.result().values():
        assert ranked.is_finite.all() and not ranked.num_redone, "a forward overflowed: its time says nothing"


def table(result: dict[str, Any]) -> list[str]:
    lines = [f"{'':<40}{'images/s (range)':>26}{'TFLOP/s':>10}"]
    for name, rates in result["images_per_s"].items():
        tflop_per_s = rates["median"] * result["gflop_per_image"][name.split()[0]] / 1e3
        lines.append(f"{name:<40}{show(rates, 0):>26}{tflop_per_s:>10.2f}")
    lines += [f"compiling {name}: {seconds:,.1f} s" for name, seconds in result["compile_s"].items()]
    return lines
