"""Predictions of a batch, and the protocol of the forwards that make them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from vitscore.decode.pixels import Decoded
from vitscore.plan.choices import Measured
from vitscore.preprocess import Geometry, ProcessorGeometry
from vitscore.rundir.parts import Predictions

if TYPE_CHECKING:
    from vitscore.models.image_model import ImageModel

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Ranked:
    """One model's predictions for a batch's B rows."""

    predictions: Predictions
    is_finite: Array
    """bool (B,): whether all logits of the row are finite, after a rerun in fp32 if there was one."""
    num_redone: int
    """Number of rows computed again in fp32."""


def share_geometries(
    models: Sequence[ImageModel],
) -> tuple[list[Geometry | ProcessorGeometry], dict[str, int]]:
    """Return the distinct geometries of the models, and the index of each model's geometry by model name."""
    geometries = list(dict.fromkeys(model.geometry for model in models))
    return geometries, {model.name: geometries.index(model.geometry) for model in models}


def pad(pixels: torch.Tensor, batch_size: int) -> torch.Tensor:
    """Pad with zero rows to `batch_size`, so that every forward has the same shape."""
    missing = batch_size - len(pixels)
    if missing == 0:
        return pixels
    return torch.cat([pixels, pixels.new_zeros((missing, *pixels.shape[1:]))])


class Awaited(Protocol):
    """A batch in flight."""

    def result(self) -> Mapping[str, Ranked]:
        """Wait for the batch, and return its predictions by model."""


class AnyForward(Protocol):
    """`forward_cpu.Forward` or `forward_cuda.CudaForward`."""

    geometries: list[Geometry | ProcessorGeometry]
    source: dict[str, int]
    depth: int
    """How many batches may be in flight after a submission."""

    @property
    def measured(self) -> Mapping[str, Measured]:
        """By model, whether its forward is launched as a graph; empty on a CPU."""

    def submit(self, decoded: Decoded, labels: Array) -> Awaited:
        """Start computing a batch's predictions."""

    def close(self) -> None:
        """Stop, and drop batches in flight."""
