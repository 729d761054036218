"""Choices measured on a GPU at every start: how a forward is launched, and which attention kernel it uses.

Neither is part of the run's identity. run.json keeps both, with their figures, in the entry of the start that measured
them. A resumed run measures again, and so does every rank on its own GPU.

Launches: Python launches about 270 kernels, one by one, for a ViT of twelve layers; a CUDA graph launches them at once.

Attention: on Hopper, torch prefers cuDNN's kernel to flash attention from cuDNN 9.15.1 on (which torch 2.11 and later
bring). cuDNN is up to twice as fast for long sequences, but may be slower for the 50 to 577 tokens of an image.
cuDNN is never forced if torch does not choose it: older versions read past the end of sequences whose length is not a
multiple of 128.
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
"""A forward is launched as a graph if launching it takes more than this share of the device's time for it. The thread
that launches the forwards also submits images to the decoder, takes its pixels and writes rows: 15 to 18 ms for 256
photographs, three quarters of the 23 ms that ViT-B/16's forward is expected to take on an H100. A graph costs the
memory of one more forward."""
MARGIN = 0.03
"""Flash attention replaces torch's choice only if it takes less time by this share."""
ROUNDS = 5
"""Timed forwards, of which the median counts; libraries choose their kernels in one untimed forward before them."""


def choose_launch(device: Device, forward: Run, pixels: torch.Tensor) -> Measured:
    """Decide whether to launch a forward as a graph.

    Args:
        device: the GPU, idle.
        forward: the forward without a graph.
        pixels: a full batch.
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
    """Return the forward as a graph, or None, and the choice with the reason; a forward may resist capture."""
    graphed = device.graphed(forward, pixels) if launch.value else None
    if launch.value and graphed is None:
        launch = replace(launch, value=False, reason=f"{launch.reason}, but it cannot be captured")
    return graphed, launch


def has_choice_of_attention(precision: str) -> bool:
    """Whether attention kernels are measured: only in half precision on Hopper."""
    return precision != "fp32" and torch.cuda.get_device_capability() == (9, 0)


def choose_attention(device: Device, models: Sequence[ImageModel], batch_size: int) -> Measured:
    """Choose the attention that is faster for all models together; torch's default if flash cannot be measured.

    Whole forwards are timed, alternating between the two, before the models are compiled. There is one choice for all
    models because torch's switch is global to the process.
    """
    work = [(model.net, model.black_images(batch_size)) for model in models]
    seconds: dict[Attention, list[float]] = {kind: [] for kind in ATTENTIONS}
    try:
        for _ in range(1 + ROUNDS):
            for kind in ATTENTIONS:
                with attending(kind):
                    seconds[kind].append(sum(device.times(net, pixels).device_s for net, pixels in work))
    # No memory, or a shape that no kernel accepts. If the default fails too, the forward raises it later.
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
    """Use torch's default choice of attention kernels, or exclude cuDNN.

    Code compiled inside keeps that attention. The compiler's disk cache does not include the attention in its keys
    (torch 2.14 returns code compiled under the other one), so a tag is added to the keys if cuDNN is excluded.
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
