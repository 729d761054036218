"""Kernels, weights and maps of the operators for a picture of one size; NumPy, shared by both implementations.

Arguments in pixels are for a picture whose shorter side has 224 pixels; this module scales them to the picture. At
32 x 32 the blurs are then close to those that the benchmark's authors chose for CIFAR-10-C.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

SIDE = 224
"""The shorter side that arguments in pixels refer to."""
GREY = 128
"""The level of an occlusion's rectangle."""
SAMPLES = 16
"""Sample points per pixel and axis for the disk's edge."""
STRATA = 256
"""Strata of equal probability for drawing a Poisson number: the first eight random bits choose one."""

_RGB_TO_YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.321], [0.211, -0.523, 0.311]])


def pixels_of(value: float, height: int, width: int) -> float:
    """Scale an argument in pixels of 224 to this picture."""
    return value * min(height, width) / SIDE


def gaussian_kernel(sigma: float, *, truncate: float = 4.0) -> Floats:
    """Return a Gaussian kernel (2r + 1,) with sum 1, truncated at `truncate` sigmas as scikit-image does."""
    reach = max(1, int(truncate * sigma + 0.5))
    away = np.arange(-reach, reach + 1)
    weights = np.exp(-0.5 * (away / sigma) ** 2) if sigma > 0 else (away == 0).astype(np.float64)
    kernel: Floats = (weights / weights.sum()).astype(np.float32)
    return kernel


def disk_kernel(radius: float, alias: float) -> Floats:
    """Return a kernel (N, N) with sum 1: the share of each pixel that a disk covers, softened by a Gaussian.

    The benchmark counts a pixel fully or not at all, which has no effect at 32 x 32, with a radius below one pixel.
    """
    half = math.ceil(radius + 0.5) + 2
    inside = (np.arange(SAMPLES) + 0.5) / SAMPLES - 0.5
    places = (np.arange(-half, half + 1)[:, None] + inside).ravel()
    is_covered = places[:, None] ** 2 + places[None, :] ** 2 <= max(radius, 1 / SAMPLES) ** 2
    side = 2 * half + 1
    disk = is_covered.reshape(side, SAMPLES, side, SAMPLES).mean(axis=(1, 3))
    soft = gaussian_kernel(alias, truncate=1.0 / max(alias, 1e-6)) if alias > 0 else np.ones(1, np.float32)
    disk = np.apply_along_axis(np.convolve, 0, disk, soft, mode="same")
    disk = np.apply_along_axis(np.convolve, 1, disk, soft, mode="same")
    kernel: Floats = (disk / disk.sum()).astype(np.float32)
    return kernel


def block_weights(side: int, scale: float) -> dict[int, Floats]:
    """Return the weights (side,) by offset with which `pixelate` averages along an axis.

    Result x is the sum over offsets of weights[x] * picture[x + offset]. The blocks are those of a resize to
    int(side * scale) with a box filter, followed by a resize back to the picture's size.
    """
    num_blocks = max(1, int(side * scale))
    edges = [max(0, int(block * side / num_blocks + 0.5)) for block in range(num_blocks)] + [side]
    back = np.minimum(((np.arange(side) + 0.5) * num_blocks / side).astype(int), num_blocks - 1)
    starts, stops = np.array(edges[:-1])[back], np.array(edges[1:])[back]
    places = np.arange(side)
    weights: dict[int, Floats] = {}
    for offset in range(int((starts - places).min()), int((stops - places).max())):
        is_inside = (places + offset >= starts) & (places + offset < stops)
        weights[offset] = np.where(is_inside, 1.0 / (stops - starts), 0.0).astype(np.float32)
    return weights


def hue_matrix(degrees: float) -> Floats:
    """Return the (3, 3) matrix that rotates RGB around the grey axis in YIQ, as DALI and many cameras do."""
    angle = math.radians(degrees)
    turn = np.array(
        [[1, 0, 0], [0, math.cos(angle), math.sin(angle)], [0, -math.sin(angle), math.cos(angle)]], np.float64
    )
    matrix: Floats = (np.linalg.inv(_RGB_TO_YIQ) @ turn @ _RGB_TO_YIQ).astype(np.float32)
    return matrix


def turn_map(height: int, width: int, *, degrees: float = 0.0, factor: float = 1.0) -> Floats:
    """Return the (2, 3) map from a place in the result to its source (x, y; pixel centres are at halves)."""
    angle = math.radians(degrees)
    cosine, sine = math.cos(angle) / factor, math.sin(angle) / factor
    x, y = width / 2, height / 2
    return np.array([[cosine, -sine, x - cosine * x + sine * y], [sine, cosine, y - sine * x - cosine * y]], np.float32)


def occlusion_size(height: int, width: int, share: float) -> tuple[int, int]:
    """Return the (height, width) of the rectangle that hides this share of the area."""
    root = math.sqrt(share)
    return round(height * root), round(width * root)


def photon_table(photons: float) -> tuple[Floats, Floats]:
    """Return, at x * STRATA + s for a value x and a stratum s, the lower count and the probability of one more.

    A Poisson number is its quantile function at a uniform number. Within a stratum that function takes one value or two
    neighbouring ones, so that one random choice gives the exact distribution. Only in the first and the last strata may
    it take more values; there the choice preserves the mean.
    """
    most = math.ceil(photons + 12 * math.sqrt(photons)) + 12
    counts = np.arange(most)
    log_factorials = np.array([math.lgamma(count + 1) for count in counts])
    lower, chance = np.empty((2, 256, STRATA), np.float32)
    ends = (np.arange(STRATA) + 1) / STRATA
    for value in range(256):
        mean = max(photons * value / 255, 1e-30)
        cumulated = np.cumsum(np.exp(counts * math.log(mean) - mean - log_factorials))
        # The mean of the quantile function over a stratum: the sum over counts of the part above their probability.
        above = np.clip((ends[:, None] - cumulated[None, :]) * STRATA, 0, 1)
        expected = above.sum(axis=1)
        lower[value] = np.floor(expected + 1e-9)
        chance[value] = np.clip(expected - lower[value], 0, 1)
    return lower.ravel(), chance.ravel()


def as_bytes(values: Any) -> NDArray[np.uint8]:
    """Convert floats to bytes: rounded, halves up as DALI does on a CPU, and clipped to 0..255."""
    result: NDArray[np.uint8] = np.clip(np.floor(values + np.float32(0.5)), 0, 255).astype(np.uint8)
    return result
