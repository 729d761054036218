"""Convert images to normalised patches, as the rows of a matrix product.

First step of a vision transformer on a CPU: one pass replaces conversion to fp32, product, sum, rounding to bfloat16,
permutation of axes, and the copies of a convolution. The result equals that of `vitscore.models.heads.PixelNormalizer`
bit for bit.
"""

from __future__ import annotations

import numpy as np

from vitscore.errors import UsageError
from vitscore.kernels.arrays import FloatArray, IntArray
from vitscore.kernels.bits import bfloat16_of_float
from vitscore.kernels.compiled import compiled

# Axes: B images, H W pixels, C channels, P patches of all images, F numbers of a patch, R numbers of a row of a patch.


def patches_bfloat16(
    pixels_BHWC: IntArray, factor_R: FloatArray, offset_R: FloatArray, *, edge: int, out_PF: IntArray
) -> None:
    """Write byte * factor + offset for each pixel of each whole patch; pixels beyond whole patches are omitted.

    Args:
        pixels_BHWC: uint8, C-contiguous.
        factor_R: float32 (edge * C), the channels' factors, repeated for every pixel of a row of a patch.
        offset_R: float32 (edge * C), the channels' offsets, repeated likewise.
        edge: edge length of a patch, in pixels.
        out_PF: int16 (B * (H // edge) * (W // edge), edge * edge * C), the bits of bfloat16 numbers: patches by image,
            row and column, their numbers by row, column and channel.

    Raises:
        UsageError: an array has the wrong type or shape.
    """
    num_images, height, width, num_channels = pixels_BHWC.shape
    expected = (num_images * (height // edge) * (width // edge), edge * edge * num_channels)
    are_types = pixels_BHWC.dtype == np.uint8 and out_PF.dtype == np.int16
    are_contiguous = pixels_BHWC.flags.c_contiguous and out_PF.flags.c_contiguous
    width_R = (edge * num_channels,)
    are_rows = all(row.shape == width_R and row.dtype == np.float32 for row in (factor_R, offset_R))
    if not (are_types and are_contiguous and are_rows and out_PF.shape == expected):
        got = f"{pixels_BHWC.dtype} {pixels_BHWC.shape} to {out_PF.dtype} {out_PF.shape}, factors {factor_R.shape}"
        raise UsageError("cannot cut images into patches", expected=f"uint8 (B, H, W, C) to int16 {expected}", got=got)
    _patches(pixels_BHWC.reshape(num_images, height, width * num_channels), factor_R, offset_R, edge, out_PF)


@compiled
def _patches(rows: IntArray, factor_R: FloatArray, offset_R: FloatArray, edge: int, out_PF: IntArray) -> None:
    num_images, height, _ = rows.shape
    length = len(factor_R)
    num_down, num_across = height // edge, rows.shape[2] // length
    patch = 0
    for image in range(num_images):
        for down in range(num_down):
            for across in range(num_across):
                out_F = out_PF[patch]
                patch += 1
                for y in range(edge):
                    from_R = rows[image, down * edge + y, across * length : (across + 1) * length]
                    to_R = out_F[y * length : (y + 1) * length]
                    for j in range(length):
                        scaled = np.float32(np.float32(np.int32(from_R[j])) * factor_R[j])
                        to_R[j] = bfloat16_of_float(np.float32(scaled + offset_R[j]))
