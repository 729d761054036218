"""Warm-up on a GPU, between loading and scoring: fit the batch size to the memory, and compile the models for it.

On a CPU there is no warm-up here. On a GPU, rank 0 of a new run lowers an automatic batch size to fit the memory that
the models need. Every rank then chooses its attention, before compilation fixes it, and sends one batch through its
models. If that runs out of memory, a new run's automatic batch size is halved again. `forward_cuda` measures later how
to launch each forward. A batch size that was asked for, or that a run started with, never changes: it is part of the
run's identity.
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
"""Rows of the two forwards from which a model's memory is estimated."""


@contextlib.contextmanager
def on_device(plan: Plan, index: int) -> Iterator[None]:
    """Use the run's stream and the chosen attention on a GPU; do nothing on a CPU.

    Everything from loading to the end of the loop runs inside: warm-up, decoders, capture, forwards, audit.
    """
    if plan.choices.device != "cuda":
        yield
        return
    chosen = plan.measured.get("attention")
    with run_stream(index), attending(chosen.value if chosen else "default"):
        yield


def warm_up(plan: Plan, models: Sequence[ImageModel], *, device: Device, may_lower: bool) -> Plan:
    """Warm up the models on their GPU; return the plan with the batch size that fits and with the measured choices.

    Args:
        plan: the run's plan.
        models: loaded models.
        device: the models' GPU.
        may_lower: whether the batch size may be lowered: it is automatic, and the run is new.

    Raises:
        SetupError: the GPU has no memory for a batch.
    """
    batch_size = plan.choices.all()["batch_size"]
    if may_lower:
        footprints = [measured for measured in map(footprint, models) if measured is not None]
        batch_size = fitting(batch_size, footprints, free_bytes=free_bytes())
    attention = Measured("default", "measured only on Hopper in half precision")
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
    """Return the plan with another batch size, in its identity too."""
    return dataclasses.replace(
        plan,
        choices=plan.choices.with_batch_size(batch_size),
        identity={**plan.identity, "batch_size": batch_size.value},
    )


def settled(
    batch_size: Choice, models: Sequence[ImageModel], *, may_lower: bool, free_memory: Callable[[], None]
) -> Choice:
    """Return the batch size at which every model's forward fits in memory, halving it as needed if that is allowed.

    Raises:
        SetupError: a batch does not fit, and may not be halved or is already one image.
    """
    while not all(has_memory(model, batch_size.value) for model in models):
        size: int = batch_size.value
        if not may_lower or size == 1:
            next_step = f"Use a smaller batch (-b {max(1, size // 2)}), or free GPU memory."
            raise out_of_memory(size, next_step=next_step)
        free_memory()
        batch_size = Choice(size // 2, f"{size} ran out of GPU memory")
    return batch_size


def has_memory(model: ImageModel, batch_size: int) -> bool:
    """Send one batch through the model; return False if memory runs out."""
    try:
        model.warm_up(batch_size)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return False
    return True


def footprint(model: ImageModel) -> Footprint | None:
    """Estimate the memory of a model's forward from two small ones; None if even these run out of memory.

    The model is measured before compilation, which gives an upper bound: a compiled model keeps fewer intermediate
    results.
    """
    try:
        peak_bytes(model, FEW)  # the first call also allocates cuBLAS's workspace
        return Footprint.through((FEW, peak_bytes(model, FEW)), (MANY, peak_bytes(model, MANY)))
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return None


def peak_bytes(model: ImageModel, num_rows: int) -> int:
    """Measure the peak memory of a forward on the model's GPU, without the weights."""
    pixels = model.black_images(num_rows)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with torch.inference_mode():
        model.net(pixels.to("cuda"))
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def free_bytes() -> int:
    """Return the free memory of the current GPU, including memory that torch has reserved but does not use."""
    free, _ = torch.cuda.mem_get_info()
    return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
