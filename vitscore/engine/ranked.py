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
    """bool (B,): whether the row's logits are numbers, at the latest in fp32."""
    num_redone: int
    """Rows that were computed again in fp32."""


def share_geometries(
    models: Sequence[ImageModel],
) -> tuple[list[Geometry | ProcessorGeometry], dict[str, int]]:
    """The distinct geometries of all models, and for each model which one is its own."""
    geometries = list(dict.fromkeys(model.geometry for model in models))
    return geometries, {model.name: geometries.index(model.geometry) for model in models}


def pad(pixels: torch.Tensor, batch_size: int) -> torch.Tensor:
    """Zero rows up to `batch_size`, so that every forward has one shape."""
    missing = batch_size - len(pixels)
    if missing == 0:
        return pixels
    return torch.cat([pixels, pixels.new_zeros((missing, *pixels.shape[1:]))])


class Awaited(Protocol):
    """A batch under way."""

    def result(self) -> Mapping[str, Ranked]:
        """Wait for its predictions, by model."""


class AnyForward(Protocol):
    """`Forward`, or its twin on a GPU."""

    geometries: list[Geometry | ProcessorGeometry]
    source: dict[str, int]
    depth: int
    """How many batches may be under way after one is submitted."""

    @property
    def measured(self) -> Mapping[str, Measured]:
        """By model, whether its forward is launched as a graph, where that is a choice."""

    def submit(self, decoded: Decoded, labels: Array) -> Awaited:
        """Begin to compute a batch's predictions."""

    def close(self) -> None:
        """Stop."""
