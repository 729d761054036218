"""The kernel that cuts images into normalised patches, compared with its NumPy twin and with the module it replaces."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from vitscore.errors import UsageError
from vitscore.kernels.cpu_bf16 import patches_bfloat16
from vitscore.kernels.cpu_bf16.reference import patches_reference
from vitscore.models.heads import PixelNormalizer

FACTOR = np.array([0.0171, 0.0175, 0.0174], np.float32)
OFFSET = np.array([-2.1179, -2.0357, -1.8044], np.float32)


def images(num: int, height: int, width: int) -> Any:
    return np.random.default_rng(0).integers(0, 256, (num, height, width, 3), np.uint8)


def patches(pixels: Any, edge: int) -> torch.Tensor:
    num, height, width, _ = pixels.shape
    out = torch.full((num * (height // edge) * (width // edge), edge * edge * 3), torch.nan).bfloat16()
    factor, offset = np.tile(FACTOR, edge), np.tile(OFFSET, edge)
    patches_bfloat16(pixels, factor, offset, edge=edge, out_PF=out.view(torch.int16).numpy())
    return out


@pytest.mark.parametrize(("height", "width", "edge"), [(32, 32, 8), (48, 16, 16), (14, 28, 14), (35, 33, 8), (5, 7, 1)])
def test_equals_the_rounded_numpy_twin(height: int, width: int, edge: int) -> None:
    pixels = images(3, height, width)
    exact = torch.from_numpy(patches_reference(pixels, FACTOR, OFFSET, edge)).bfloat16()
    assert torch.equal(patches(pixels, edge), exact)


def test_equals_the_normaliser_bit_for_bit() -> None:
    pixels = images(2, 64, 64)
    normalizer = PixelNormalizer(None, torch.bfloat16)
    normalizer.factor, normalizer.offset = (torch.from_numpy(np.tile(row, 64)) for row in (FACTOR, OFFSET))
    values = normalizer(torch.from_numpy(pixels))
    apart = values.unfold(2, 16, 16).unfold(3, 16, 16).permute(0, 2, 3, 4, 5, 1).reshape(-1, 16 * 16 * 3)
    assert torch.equal(patches(pixels, 16), apart)


@pytest.mark.parametrize("case", ["type", "shape", "factor", "strided"])
def test_other_arrays_are_refused(case: str) -> None:
    pixels, out, factor = images(1, 16, 16), np.zeros((4, 192), np.int16), np.tile(FACTOR, 8)
    if case == "type":
        pixels = pixels.astype(np.int16)
    if case == "shape":
        out = out[:3]
    if case == "factor":
        factor = FACTOR
    if case == "strided":
        pixels = pixels[:, :, ::-1]
    with pytest.raises(UsageError, match="cannot cut images into patches"):
        patches_bfloat16(pixels, factor, factor, edge=8, out_PF=out)
