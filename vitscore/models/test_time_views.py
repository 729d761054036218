"""Test-time views: a model sees each image several times, and its logits are averaged.

Between pixels and logits, on the model's device; the decoder and the rows know nothing of it. Embeddings are the plain
view's: an average of two would be neither image's. Each view costs one forward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from vitscore.models.image_model import ImageModel, ModelOutput

Flip = Callable[[torch.Tensor], torch.Tensor]


def mirrored(pixels: torch.Tensor) -> torch.Tensor:
    """Left and right changed over; uint8 (B, H, W, 3), or a processor's float (B, 3, H, W)."""
    return torch.flip(pixels, (2,) if pixels.dtype == torch.uint8 else (3,))


_VIEWS: dict[str, tuple[Flip, ...]] = {"none": (), "hflip": (mirrored,)}
"""By the name that `--tta` takes: the views beside the plain one."""


def over_views(
    model: ImageModel | Callable[[torch.Tensor], ModelOutput], pixels: torch.Tensor, tta: str
) -> ModelOutput:
    """What the model gives for the mean over views of its logits, in fp32, and the plain view's embedding."""
    plain = model(pixels)
    views = [model(view(pixels)).logits for view in _VIEWS[tta]]
    return replace(plain, logits=sum(views, plain.logits) / (1 + len(views))) if views else plain
