"""Automatic choices of a run, with their reasons.

Rank 0 resolves them before the first image. run.json keeps values and reasons, and the other ranks and resumed runs use
the kept values. Choices depend only on measurements and on properties of the machine.
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
"""Largest encoded size of a small image: 64 x 64 pixels as PNG fit, a photograph does not."""
_MANY_MEMBERS = 32 * 2 * 512
"""Images and labels of 32 large batches; with fewer batches, cores are idle at the start and the end of a run."""
_MEMBERS_WORTH_TUNING = 1_000_000
"""Members of 500,000 samples. At 2,500 images/s, a fifth faster, they save the minute that tuning takes."""


@dataclass(frozen=True)
class Choice:
    """A resolved value and its reason."""

    value: Any
    reason: str


@dataclass(frozen=True)
class Measured(Choice):
    """A choice measured anew at every start, and therefore not part of a run's identity."""

    figures: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Choices:
    """The resolved choices of a run and their reasons."""

    device: Literal["cpu", "cuda"]
    precision: Literal["fp32", "bf16", "fp16"]
    """Precision of the encoders; heads are fp32."""
    compile: bool
    decoder: DecoderKind
    batch_size: int
    top_k: int
    reasons: Mapping[str, str] = field(repr=False)
    """Reasons by name of the choice."""

    @classmethod
    def of(cls, choices: Mapping[str, Choice]) -> Choices:
        """Build from one `Choice` for every field."""
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
    """Device and threads of one rank."""

    device_id: int | None
    """The rank's GPU; None on a CPU."""
    threads: int
    """The rank's share of the CPUs."""
    decode_threads: int
    num_workers: int
    """Batches that a CPU computes in parallel, each with one thread inside torch; 0 computes one batch at a time."""

    @classmethod
    def of(
        cls, choices: Choices, *, decode_threads: int | None = None, local_rank: int = 0, local_world_size: int = 1
    ) -> Execution:
        """Divide this machine among the ranks on it.

        Args:
            choices: the run's choices.
            decode_threads: --decode-threads; None takes the rank's share of the CPUs.
            local_rank: this rank's index on this machine, and its GPU's.
            local_world_size: number of ranks on this machine.
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
        """torch's name for the device."""
        return "cpu" if self.device_id is None else f"cuda:{self.device_id}"

    @property
    def torch_threads(self) -> int:
        """Threads inside torch; one if batches are computed in parallel."""
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
        options: the options of the run.
        pixels_per_image: height x width of the largest model input; decides the batch size.
        num_classes: K; `top_k` is cut to it.
        kept: values of an earlier start of the same run, by name; they replace automatic choices.
        preview: previews the corpus; called only if a choice depends on it.

    Raises:
        SetupError: CUDA or DALI was asked for and is not available.
        UsageError: fp16 was asked for on a CPU.
    """
    device = explicit_or_kept("device", options.device, kept) or choose_device()
    check_device(device.value)
    precision = explicit_or_kept("precision", options.precision, kept) or choose_precision(device.value)
    if (device.value, precision) == ("cuda", Choice("fp32", "asked for")):
        precision = Choice("fp32", "asked for; convolutions and products without TF32")
    if precision.value == "fp16" and device.value == "cpu":
        raise UsageError(
            "fp16 on a CPU",
            where="--precision",
            expected="fp32 or bf16",
            got="fp16",
            next_step="fp16 is slow on a CPU.",
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
    """Return the value that was asked for, else the choice of an earlier start of this run, else None."""
    if value is not None and value != "auto":
        return Choice(value, "asked for")
    if name in kept:
        return Choice(kept[name], "as at the start of this run")
    return None


def choose_device() -> Choice:
    """Choose CUDA if there is a device."""
    import torch

    if torch.cuda.is_available():
        return Choice("cuda", f"{torch.cuda.device_count()} CUDA device(s) found")
    return Choice("cpu", "no CUDA device found")


def check_device(device: str) -> None:
    """Raise SetupError if `device` is cuda and there is no CUDA device."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise SetupError("no CUDA device", where="--device cuda", next_step="Check `nvidia-smi`, or use --device cpu.")


def choose_precision(device: str) -> Choice:
    """Choose fp16 on CUDA; on a CPU bf16 if it has the instructions, else fp32."""
    if device == "cuda":
        return Choice("fp16", "fastest on CUDA; heads and probabilities stay in fp32")
    if has_bf16_instructions():
        return Choice("bf16", "this CPU has bf16 instructions; heads and probabilities stay in fp32")
    return Choice("fp32", "this CPU has no bf16 instructions")


def has_bf16_instructions() -> bool:
    """Return whether this CPU multiplies bf16 in hardware (AVX512-BF16, AMX, Arm BF16)."""
    return bool(cpu_flags() & {"avx512_bf16", "amx_bf16", "bf16"})


def choose_compile(device: str, preview: Callable[[], Preview | None] = lambda: None) -> Choice:
    """Compile on a GPU if Triton and a C compiler are installed, unless the corpus is too small to repay the time."""
    if device == "cuda":
        if importlib.util.find_spec("triton") is None:
            return Choice(False, "Triton is not installed")
        if not any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))):
            return Choice(False, "no C compiler is installed, which Triton needs")
        if (seen := preview()) and seen.num_members < _MEMBERS_WORTH_TUNING:
            return Choice(False, "few images: tuning would take longer than it saves")
        return Choice(True, "pays for itself on CUDA")
    return Choice(False, "on a CPU compiling takes 10 to 40 s and gains nothing")


def choose_decoder() -> Choice:
    """Choose DALI if it is installed."""
    if is_dali_available():
        return Choice("dali", "DALI is installed")
    return Choice("torchvision", "DALI is not installed")


def choose_batch_size(
    device: str, pixels_per_image: int, preview: Callable[[], Preview | None] = lambda: None
) -> Choice:
    """Choose a batch size for the device and the model's input size.

    On a CPU the activations of a batch should fit the cache: 16 images of 224 x 224, or as many pixels, at most 128
    images. If the corpus has many small encoded images and the model's input is small, a batch has up to 512, which
    scores 13% more images per second (8 x 8 to 32 x 32 pixels, demo-vit). Photographs are excluded: 512 of them take
    300 MB when decoded.

    On a GPU a batch has 256 images of 224 x 224, at most 512 smaller ones. 256 such images are 50,000 tokens of 16 x 16
    pixels, whose products are split into hundreds of tiles for each multiprocessor; more rows would take memory and
    gain nothing. `warm_up` may lower the size.
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
    """Return `least` doubled as often as the result stays within both `most` and `limit`."""
    size = least
    while size * 2 <= min(most, limit):
        size *= 2
    return size
