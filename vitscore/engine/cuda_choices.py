"""Choices that a GPU's own times decide, at every start: how a forward is launched, and which attention it uses.

Neither is part of a run's identity: run.json keeps them, with their figures, with the start that measured them. A start
that goes on from parts measures again, and every rank does so on its GPU.

Launches. Python launches some 270 kernels for a ViT of twelve layers, one by one; a graph launches them all at once.

Attention. On Hopper torch takes cuDNN's kernel before flash's by itself, from cuDNN 9.15.1 on (torch 2.11 and later
bring it). For long sequences it is up to twice as fast, for the 50 to 577 tokens of an image it may be the slower one.
cuDNN is never forced where torch does not take it: older ones read beyond tokens that are no multiple of 128.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import torch

from vitscore.engine.cuda_memory import is_out_of_memory
from vitscore.plan.choices import Measured

if TYPE_CHECKING:
    from vitscore.engine.cuda_device import Device, Run
    from vitscore.models.image_model import ImageModel

Attention = Literal["default", "flash"]
ATTENTIONS: tuple[Attention, ...] = ("default", "flash")

HOST_SHARE = 0.25
"""Of the device's time for a forward: above it the forward is launched as a graph. The thread that launches every
model's forward also hands images to the decoder, takes its pixels and writes rows: 15 to 18 ms for 256 photographs,
three quarters of the 23 ms in which an H100 is expected to do ViT-B/16's forward. A graph costs the memory of one more
forward."""
MARGIN = 0.03
"""By so much less time another attention than torch's own has to be seen."""
ROUNDS = 5
"""Forwards of which the median counts; one goes before them, in which libraries choose their kernels."""


def choose_launch(device: Device, forward: Run, pixels: torch.Tensor) -> Measured:
    """Whether to launch a forward as a graph.

    Args:
        device: idle.
        forward: as it would be called.
        pixels: a whole batch.
    """
    try:
        times = [device.times(forward, pixels) for _ in range(1 + ROUNDS)][1:]
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return Measured(False, "there was no memory to measure it")
    host_ms, device_ms = (1000 * statistics.median(seconds) for seconds in zip(*times, strict=True))
    return Measured(
        host_ms > HOST_SHARE * device_ms,
        f"Python takes {host_ms:.1f} ms to launch what the GPU does in {device_ms:.1f} ms",
        {"host_ms": round(host_ms, 3), "device_ms": round(device_ms, 3)},
    )


def captured(device: Device, forward: Run, pixels: torch.Tensor, launch: Measured) -> tuple[Run | None, Measured]:
    """The forward as a graph where that was chosen and can be done, else None; and the choice as it turned out."""
    graphed = device.graphed(forward, pixels) if launch.value else None
    if launch.value and graphed is None:
        launch = replace(launch, value=False, reason=f"{launch.reason}, but it cannot be captured")
    return graphed, launch


def has_choice_of_attention(precision: str) -> bool:
    """Whether torch's own order of attention kernels is worth a measurement: in half precision, on Hopper alone."""
    return precision != "fp32" and torch.cuda.get_device_capability() == (9, 0)


def choose_attention(device: Device, models: Sequence[ImageModel], batch_size: int) -> Measured:
    """The attention with which all models together take less time; torch's own where the other can't be measured.

    Measured before the models are compiled, by whole forwards, by turns: the switch is torch's, for the whole process.
    """
    work = [(model.net, model.black_images(batch_size)) for model in models]
    seconds: dict[Attention, list[float]] = {kind: [] for kind in ATTENTIONS}
    try:
        for _ in range(1 + ROUNDS):
            for kind in ATTENTIONS:
                with attending(kind):
                    seconds[kind].append(sum(device.times(net, pixels).device_s for net, pixels in work))
    # No memory, or a shape that no kernel takes: the forward itself will say so where it is the default's.
    except RuntimeError as error:
        return Measured("default", f"flash could not be measured: {(str(error).splitlines() or [''])[0]}")
    default_ms, flash_ms = (1000 * statistics.median(seconds[kind][1:]) for kind in ATTENTIONS)
    return Measured(
        "flash" if flash_ms < (1 - MARGIN) * default_ms else "default",
        f"a batch takes {default_ms:.1f} ms by torch's own choice, {flash_ms:.1f} ms by flash",
        {"default_ms": round(default_ms, 3), "flash_ms": round(flash_ms, 3)},
    )


@contextlib.contextmanager
def attending(kind: Attention) -> Iterator[None]:
    """Have torch attend by its own choice, or without cuDNN.

    What is compiled meanwhile keeps that attention. The compiler's cache on disk does not ask for it (torch 2.14 hands
    out code that was compiled under the other), so under a choice that is not torch's own its entries are marked.
    """
    if kind == "default":
        yield
        return
    was_enabled = torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call, unused-ignore]
    tag = torch.compiler.config.cache_key_tag
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.compiler.config.cache_key_tag = f"{tag} {kind}"
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(was_enabled)
        torch.compiler.config.cache_key_tag = tag
