"""Test-time augmentation: average a model's logits over several views of an image.

This happens between pixels and logits on the model's device; decoder and rows are not affected. Embeddings are those of
the plain view, because an average would belong to neither image. Every view costs one forward.
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
    """Mirror images left to right: uint8 (B, H, W, 3), or a processor's float (B, 3, H, W)."""
    return torch.flip(pixels, (2,) if pixels.dtype == torch.uint8 else (3,))


_VIEWS: dict[str, tuple[Flip, ...]] = {"none": (), "hflip": (mirrored,)}
"""The views in addition to the plain one, by the name that `--tta` takes."""


def over_views(
    model: ImageModel | Callable[[torch.Tensor], ModelOutput], pixels: torch.Tensor, tta: str
) -> ModelOutput:
    """Return the mean of the model's logits over the views, in fp32, and the plain view's embedding."""
    plain = model(pixels)
    views = [model(view(pixels)).logits for view in _VIEWS[tta]]
    return replace(plain, logits=sum(views, plain.logits) / (1 + len(views))) if views else plain
