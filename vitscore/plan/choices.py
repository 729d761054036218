"""Every automatic choice of a run, made once, with its reason.

Rank 0 resolves them before the first image; run.json keeps value and reason, and every rank and every resume uses what
is kept there. Only measurements and plain facts of the machine decide.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from vitscore.decode.pixels import DecoderKind, is_dali_available
from vitscore.errors import SetupError, UsageError
from vitscore.plan.options import RunOptions
from vitscore.shards.preview import Preview
from vitscore.system.machine import cpu_flags, num_usable_cpus

_SMALL_BYTES = 8 << 10
"""Encoded; an image of 64 x 64 as a PNG is no larger, a photograph is."""
_MANY_MEMBERS = 32 * 2 * 512
"""Images and labels of 32 large batches: with fewer batches the cores wait for each other at both ends."""


_MEMBERS_WORTH_TUNING = 1_000_000
"""Images and labels of 500,000: at 2,500 images/s and a fifth faster they give back the minute that tuning takes."""


@dataclass(frozen=True)
class Choice:
    """A resolved value, and why it is that."""

    value: Any
    reason: str


@dataclass(frozen=True)
class Measured(Choice):
    """A choice made by measurements at a start, and measured again at the next: no part of a run's identity."""

    figures: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Choices:
    """The resolved choices of a run, with the reason of each."""

    device: Literal["cpu", "cuda"]
    precision: Literal["fp32", "bf16", "fp16"]
    """Of the encoders; heads are fp32."""
    compile: bool
    decoder: DecoderKind
    batch_size: int
    top_k: int
    reasons: Mapping[str, str] = field(repr=False)
    """By name of the choice."""

    @classmethod
    def of(cls, choices: Mapping[str, Choice]) -> Choices:
        """Build from a `Choice` for every field."""
        values: dict[str, Any] = {name: choice.value for name, choice in choices.items()}
        return cls(**values, reasons={name: choice.reason for name, choice in choices.items()})

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Choices:
        """Build from run.json's `choices`."""
        return cls.of({name: Choice(**choice) for name, choice in record.items()})

    def to_record(self) -> dict[str, Any]:
        """Return run.json's `choices`: value and reason by name."""
        return {name: {"value": choice.value, "reason": choice.reason} for name, choice in self.all().items()}

    def all(self) -> dict[str, Choice]:
        """Return every choice by name."""
        return {name: Choice(getattr(self, name), reason) for name, reason in self.reasons.items()}

    def with_batch_size(self, batch_size: Choice) -> Choices:
        """Return the same choices with another batch size."""
        return Choices.of({**self.all(), "batch_size": batch_size})


@dataclass(frozen=True)
class Execution:
    """Where one rank computes, and with how many threads."""

    device_id: int | None
    """The rank's GPU; None on a CPU."""
    threads: int
    """The rank's share of the CPUs."""
    decode_threads: int
    num_workers: int
    """Batches that a CPU computes side by side, each with one thread inside torch; 0 computes them one by one."""

    @classmethod
    def of(
        cls, choices: Choices, *, decode_threads: int | None = None, local_rank: int = 0, local_world_size: int = 1
    ) -> Execution:
        """Divide this machine among the ranks on it.

        Args:
            choices: the run's.
            decode_threads: as asked for; None takes the rank's share of the CPUs.
            local_rank: this rank's number on this machine, which is also its GPU's.
            local_world_size: ranks on this machine.
        """
        threads = max(1, num_usable_cpus() // local_world_size)
        return cls(
            device_id=local_rank if choices.device == "cuda" else None,
            threads=threads,
            decode_threads=decode_threads or threads,
            num_workers=0 if choices.compile else threads,
        )

    @property
    def device(self) -> str:
        """torch's name of the device."""
        return "cpu" if self.device_id is None else f"cuda:{self.device_id}"

    @property
    def torch_threads(self) -> int:
        """Threads inside torch: one for batches side by side."""
        return 1 if self.num_workers else self.threads


def resolve(
    options: RunOptions,
    *,
    pixels_per_image: int,
    num_classes: int,
    kept: Mapping[str, Any],
    preview: Callable[[], Preview | None] = lambda: None,
) -> Choices:
    """Resolve device, precision, compile, decoder, batch_size and top_k.

    Args:
        options: what was asked for.
        pixels_per_image: height x width of the largest model input; decides the batch size.
        num_classes: K; `top_k` is cut to it.
        kept: the values of an earlier start of the same run, by name; they win over anything automatic.
        preview: looks at the corpus, where a choice hangs on it.

    Raises:
        SetupError: CUDA or DALI was asked for and is not there.
    """
    device = explicit_or_kept("device", options.device, kept) or choose_device()
    check_device(device.value)
    precision = explicit_or_kept("precision", options.precision, kept) or choose_precision(device.value)
    if (device.value, precision) == ("cuda", Choice("fp32", "asked for")):
        precision = Choice("fp32", "asked for; convolutions and products without TF32")
    if precision.value == "fp16" and device.value == "cpu":
        raise UsageError(
            "fp16 on a CPU", where="--precision", expected="fp32 or bf16", got="fp16", next_step="It would be slower."
        )
    decoder = explicit_or_kept("decoder", options.decoder, kept) or choose_decoder()
    if decoder.value == "dali" and not is_dali_available():
        raise SetupError(
            "DALI is not installed",
            where="--decoder dali",
            next_step="Run `pip install nvidia-dali-cuda130`, or use --decoder torchvision.",
        )
    return Choices.of(
        {
            "device": device,
            "precision": precision,
            "compile": explicit_or_kept("compile", options.compile, kept) or choose_compile(device.value, preview),
            "decoder": decoder,
            "batch_size": explicit_or_kept("batch_size", options.batch_size, kept)
            or choose_batch_size(device.value, pixels_per_image, preview),
            "top_k": Choice(min(options.top_k, num_classes), f"{options.top_k} asked for, {num_classes} classes"),
        }
    )


def explicit_or_kept(name: str, value: Any, kept: Mapping[str, Any]) -> Choice | None:
    """The value that was asked for, else the one that an earlier start of this run chose, else None."""
    if value is not None and value != "auto":
        return Choice(value, "asked for")
    if name in kept:
        return Choice(kept[name], "as at the start of this run")
    return None


def choose_device() -> Choice:
    import torch

    if torch.cuda.is_available():
        return Choice("cuda", f"{torch.cuda.device_count()} CUDA device(s) found")
    return Choice("cpu", "no CUDA device found")


def check_device(device: str) -> None:
    """Raise SetupError where CUDA was asked for and there is none."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise SetupError("no CUDA device", where="--device cuda", next_step="Check `nvidia-smi`, or use --device cpu.")


def choose_precision(device: str) -> Choice:
    """fp16 on CUDA; on a CPU bf16 where its instructions exist, else fp32."""
    if device == "cuda":
        return Choice("fp16", "fastest on CUDA; heads and probabilities stay in fp32")
    if has_bf16_instructions():
        return Choice("bf16", "this CPU has bf16 instructions; heads and probabilities stay in fp32")
    return Choice("fp32", "this CPU has no bf16 instructions")


def has_bf16_instructions() -> bool:
    """Whether this CPU multiplies bf16 in hardware (AVX512-BF16, AMX, Arm BF16)."""
    return bool(cpu_flags() & {"avx512_bf16", "amx_bf16", "bf16"})


def choose_compile(device: str, preview: Callable[[], Preview | None] = lambda: None) -> Choice:
    """On a GPU, where there is what it takes, unless the corpus is seen to be too small to give the time back."""
    if device == "cuda":
        if importlib.util.find_spec("triton") is None:
            return Choice(False, "Triton is not installed")
        if not any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))):
            return Choice(False, "no C compiler is here, which Triton needs")
        if (seen := preview()) and seen.num_members < _MEMBERS_WORTH_TUNING:
            return Choice(False, "few images: tuning would take longer than it saves")
        return Choice(True, "pays for itself on CUDA")
    return Choice(False, "on a CPU compiling takes 10 to 40 s and gains nothing")


def choose_decoder() -> Choice:
    if is_dali_available():
        return Choice("dali", "DALI is installed")
    return Choice("torchvision", "DALI is not installed")


def choose_batch_size(
    device: str, pixels_per_image: int, preview: Callable[[], Preview | None] = lambda: None
) -> Choice:
    """On a CPU a batch whose activations stay in the cache: 16 images of 224 x 224 or as many pixels, at most 128.

    Many small images that are put in small go in batches of up to 512, for 13% more of them a second (8 x 8 to 32 x 32,
    demo-vit). Photographs do not: decoded, 512 of them are 300 MB a batch.

    On a GPU 256 such images, at most 512: 50,000 tokens of 16 x 16 pixels, whose products are cut into hundreds of
    tiles for each multiprocessor, so that more rows would take more memory and gain nothing. `warmup` lowers it.
    """
    if device == "cuda":
        return Choice(largest_power(256, 512, 256 * 224 * 224 // pixels_per_image), "fills a GPU")
    limit = 16 * 224 * 224 // pixels_per_image
    size = largest_power(16, 512, limit)
    if size > 128 and (seen := preview()):
        if seen.largest_bytes <= _SMALL_BYTES and seen.num_members >= _MANY_MEMBERS:
            return Choice(size, "many small images: few calls, in the CPU's cache")
    return Choice(min(size, 128), "keeps a batch's activations in the CPU's cache")


def largest_power(least: int, most: int, limit: int) -> int:
    """`least`, doubled as often as it stays within both bounds."""
    size = least
    while size * 2 <= min(most, limit):
        size *= 2
    return size
