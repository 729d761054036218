"""Pixels to predictions: every model on one decoded batch, then the row kernel.

The forward comes between the decoder and the loop. `make_forward` chooses between `forward_cpu` and `forward_cuda`,
which give the same predictions.
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
    """Make the forward for the models' device.

    Args:
        models: loaded models.
        device_id: the models' GPU; None for the CPU.
        num_workers: batches computed in parallel on a CPU; a GPU computes them in order.
        options: the other arguments of `Forward`.

    Raises:
        SetupError: the GPU's kernels cannot be used.
    """
    if device_id is None:
        return Forward(models, num_workers=num_workers, **options)
    from vitscore.engine.cuda_device import CudaDevice
    from vitscore.engine.forward_cuda import CudaForward

    return CudaForward(models, device=CudaDevice(device_id), **options)
