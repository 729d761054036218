"""Random warps of small grey images, a batch at a time, which make 1,297 digits enough to train on.

Used by both trainings of `vitscore.demo.make`. Each image gets a random rotation, scale, shear and shift, a smooth
elastic field, and a random contrast; one `grid_sample` applies all the warps. `WarpedDigits` is a data set for
transformers' `Trainer` or a plain loader. It does not depend on the model; the checkpoint's processor gives the
constants for normalisation.

Axes: B images, C channels, H and W pixels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset

from vitscore.demo.digits import Digits

# Chosen on a validation part of the training digits, without the held-out digits.
MAX_ROTATION = 0.25  # radians
MAX_SCALE = 0.15
MAX_SHEAR = 0.2
MAX_SHIFT = 0.12  # of half an image: two pixels of 32, half a pixel of the scan
ELASTIC = 0.06  # of half an image, at the nodes of a coarse field
ELASTIC_NODES = 4
MIN_CONTRAST = 0.7


class WarpedDigits(Dataset[dict[str, Any]]):
    """Training digits with a new warp on every access, normalised as by `processor`.

    Args:
        digits: the scans.
        processor: a transformers image processor; its rescale factor, mean and standard deviation are used.
        seed: the seed of the warps; the loader decides the order of the digits.
    """

    def __init__(self, digits: Digits, processor: Any, *, seed: int) -> None:
        self.images_BHW = torch.from_numpy(digits.images_BHW.copy())
        self.labels_B = torch.from_numpy(digits.labels_B)
        self.scale = float(processor.rescale_factor)
        self.mean_C11 = torch.tensor(processor.image_mean).view(3, 1, 1)
        self.std_C11 = torch.tensor(processor.image_std).view(3, 1, 1)
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self.labels_B)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        """Return a batch of samples; torch's loader prefers this to one call per sample."""
        grey_BHW = warp(self.images_BHW[indices] * self.scale, self.generator)
        pixels_BCHW = (grey_BHW[:, None] - self.mean_C11) / self.std_C11
        return [
            {"pixel_values": pixels_CHW, "labels": label}
            for pixels_CHW, label in zip(pixels_BCHW, self.labels_B[indices].tolist(), strict=True)
        ]


def warp(grey_BHW: Tensor, generator: torch.Generator) -> Tensor:
    """Warp every image and scale its contrast by random amounts; pixels from outside the image are black."""
    num_images, height, width = grey_BHW.shape

    def uniform(*shape: int, limit: float) -> Tensor:
        return (torch.rand(num_images, *shape, generator=generator) * 2 - 1) * limit

    angle_B = uniform(limit=MAX_ROTATION)
    cos_B, sin_B = angle_B.cos(), angle_B.sin()
    scale_B2 = 1 + uniform(2, limit=MAX_SCALE)
    shear_B = uniform(limit=MAX_SHEAR)
    rows_B2 = [
        torch.stack([cos_B * scale_B2[:, 0], (shear_B - sin_B) * scale_B2[:, 1]], dim=1),
        torch.stack([sin_B * scale_B2[:, 0], cos_B * scale_B2[:, 1]], dim=1),
    ]
    linear_B22 = torch.stack(rows_B2, dim=1)
    affine_B23 = torch.cat([linear_B22, uniform(2, 1, limit=MAX_SHIFT)], dim=2)
    grid_BHW2 = functional.affine_grid(affine_B23, [num_images, 1, height, width], align_corners=False)
    nodes_B2NN = uniform(2, ELASTIC_NODES, ELASTIC_NODES, limit=ELASTIC)
    field_B2HW = functional.interpolate(nodes_B2NN, size=(height, width), mode="bicubic", align_corners=True)
    warped_B1HW = functional.grid_sample(
        grey_BHW[:, None], grid_BHW2 + field_B2HW.permute(0, 2, 3, 1), align_corners=False
    )
    contrast_B11 = 1 - (uniform(1, 1, limit=0.5) + 0.5) * (1 - MIN_CONTRAST)
    return warped_B1HW[:, 0] * contrast_B11
