"""Pixels to predictions: every model of the run over one decoded batch, then the row kernel.

Between decoder and loop. Chooses between `forward_cpu` and `forward_cuda`, which give the same answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vitscore.engine.forward_cpu import Forward
from vitscore.engine.ranked import AnyForward

if TYPE_CHECKING:
    from vitscore.models.image_model import ImageModel


def make_forward(
    models: Sequence[ImageModel], *, device_id: int | None, num_workers: int, **options: Any
) -> AnyForward:
    """The forward for where the models are.

    Args:
        models: loaded.
        device_id: their GPU, None for the CPU.
        num_workers: batches side by side on a CPU; on a GPU they are computed in order.
        options: `Forward`'s others.

    Raises:
        SetupError: the GPU's kernels cannot be used.
    """
    if device_id is None:
        return Forward(models, num_workers=num_workers, **options)
    from vitscore.engine.cuda_device import CudaDevice
    from vitscore.engine.forward_cuda import CudaForward

    return CudaForward(models, device=CudaDevice(device_id), **options)
