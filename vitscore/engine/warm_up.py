"""Between loading and scoring on a GPU: the batch is made to fit its memory, and the models are compiled for it.

On a CPU there is nothing to do here. On a GPU rank 0 of a new run lowers an automatic batch size by what the models
were seen to need, every rank chooses the attention (before anything is compiled, which fixes it), then sends one batch
through its models; should that run out of memory all the same, a new run's automatic batch is halved again. How each
forward is launched is measured after that, where it is put into the loop (`forward_cuda`). A batch size that was asked
for, or that a run has begun with, is never changed: it is part of the run's identity.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from vitscore.engine.cuda_choices import attending, choose_attention, has_choice_of_attention
from vitscore.engine.cuda_device import STREAM_VARIABLE, Device, run_stream, stream_kind
from vitscore.engine.cuda_memory import Footprint, fitting, is_out_of_memory, out_of_memory
from vitscore.plan.choices import Choice, Measured

if TYPE_CHECKING:
    from vitscore.models.image_model import ImageModel
    from vitscore.plan.plan import Plan

FEW, MANY = 8, 32
"""Rows of the two forwards that a model's memory is reckoned from."""


@contextlib.contextmanager
def on_device(plan: Plan, index: int) -> Iterator[None]:
    """On a GPU this thread's work on the run's stream, with the attention that was chosen; on a CPU nothing.

    Everything between loading and the end of the loop happens in it: warm-up, decoders, capture, forwards, audit.
    """
    if plan.choices.device != "cuda":
        yield
        return
    chosen = plan.measured.get("attention")
    with run_stream(index), attending(chosen.value if chosen else "default"):
        yield


def warm_up(plan: Plan, models: Sequence[ImageModel], *, device: Device, may_lower: bool) -> Plan:
    """Warm the models up on their GPU; the plan with the batch size that fits, and what was measured.

    Args:
        plan: the run's.
        models: loaded.
        device: the models' GPU.
        may_lower: whether the batch size is automatic, and the run new.

    Raises:
        SetupError: the GPU has no memory for a batch.
    """
    batch_size = plan.choices.all()["batch_size"]
    if may_lower:
        footprints = [found for found in map(footprint, models) if found is not None]
        batch_size = fitting(batch_size, footprints, free_bytes=free_bytes())
    attention = Measured("default", "measured on Hopper in half precision alone")
    if has_choice_of_attention(plan.choices.precision):
        attention = choose_attention(device, models, batch_size.value)
        device.free_memory()
    with attending(attention.value):
        batch_size = settled(batch_size, models, may_lower=may_lower, free_memory=torch.cuda.empty_cache)
    measured = {"attention": attention}
    if stream_kind() != "own":
        measured["stream"] = Measured(stream_kind(), STREAM_VARIABLE)
    return dataclasses.replace(with_batch_size(plan, batch_size), measured=measured)


def with_batch_size(plan: Plan, batch_size: Choice) -> Plan:
    """The plan of the run whose batches have this size."""
    return dataclasses.replace(
        plan,
        choices=plan.choices.with_batch_size(batch_size),
        identity={**plan.identity, "batch_size": batch_size.value},
    )


def settled(
    batch_size: Choice, models: Sequence[ImageModel], *, may_lower: bool, free_memory: Callable[[], None]
) -> Choice:
    """The batch size at which every model's forward has its memory: halved until then, where that is allowed.

    Raises:
        SetupError: it may not be halved, or is one image already.
    """
    while not all(has_memory(model, batch_size.value) for model in models):
        size: int = batch_size.value
        if not may_lower or size == 1:
            next_step = f"Name a smaller one (-b {max(1, size // 2)}), or free the GPU."
            raise out_of_memory(size, next_step=next_step)
        free_memory()
        batch_size = Choice(size // 2, f"{size} ran out of GPU memory")
    return batch_size


def has_memory(model: ImageModel, batch_size: int) -> bool:
    """Send one batch through; False where memory was not enough."""
    try:
        model.warm_up(batch_size)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return False
    return True


def footprint(model: ImageModel) -> Footprint | None:
    """What a model's forward needs, from two small ones; None where even these have no memory.

    The module is measured as it is before compilation, which would need more: compiled, fewer results lie about.
    """
    try:
        peak_bytes(model, FEW)  # with it cuBLAS takes its workspace, once
        return Footprint.through((FEW, peak_bytes(model, FEW)), (MANY, peak_bytes(model, MANY)))
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return None


def peak_bytes(model: ImageModel, num_rows: int) -> int:
    """Memory that a forward takes on the model's GPU at its height, beside the weights."""
    pixels = model.black_images(num_rows)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with torch.inference_mode():
        model.net(pixels.to("cuda"))
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def free_bytes() -> int:
    """What is free on the current GPU, torch's own unused reserve included."""
    free, _ = torch.cuda.mem_get_info()
    return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
