"""The operators on one image, with NumPy, torch and Pillow; used with the torchvision decoder.

The arithmetic is that of the DALI graph, step by step. The bytes are equal, except where a float is rounded the other
way: by one level, in less than 0.1% of the values, or 3% for a rotation or a zoom.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from io import BytesIO
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from vitscore.augment import seeds, tables
from vitscore.augment.operators import Augmentation
from vitscore.augment.tables import as_bytes

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Words = NDArray[np.uint32]
TWO_PI = 2 * math.pi


def augment(image_HWC: Bytes, augmentation: Augmentation, sample: Words, *, position: int = 0) -> Bytes:
    """Apply one operator to one image.

    Args:
        image_HWC: uint8 RGB.
        augmentation: the operator with its values.
        sample: the sample's two words (`seeds.sample_words`).
        position: the operator's place in a chain.
    """
    name, values = augmentation.name, augmentation.values
    if name in _RANDOM:
        return _RANDOM[name](image_HWC, sample, seeds.salt(name, position), *values)
    return _FIXED[name](image_HWC, *values)


def _brightness(image_HWC: Bytes, delta: float) -> Bytes:
    pixels = image_HWC.astype(np.float32)
    value = pixels.max(axis=2, keepdims=True)
    lighter = np.clip(value + np.float32(255 * delta), 0, 255)
    # Black has no hue and becomes grey.
    ratio = lighter / np.maximum(value, np.float32(1))
    return as_bytes(pixels * ratio + (value == 0) * lighter)


def _contrast(image_HWC: Bytes, factor: float) -> Bytes:
    pixels = image_HWC.astype(np.float32)
    mean = pixels.mean(axis=(0, 1), keepdims=True, dtype=np.float64).astype(np.float32)
    return as_bytes((pixels - mean) * np.float32(factor) + mean)


def _saturation(image_HWC: Bytes, factor: float, offset: float) -> Bytes:
    pixels = image_HWC.astype(np.float32)
    value, least = pixels.max(axis=2, keepdims=True), pixels.min(axis=2, keepdims=True)
    span = value - least
    saturation = span / np.maximum(value, np.float32(1))
    wanted = np.clip(saturation * np.float32(factor) + np.float32(offset), 0, 1)
    ratio = wanted * value / np.maximum(span, np.float32(1))
    coloured = value - (value - pixels) * ratio
    # Grey has hue 0, so more saturation turns it red.
    red = value * (1 - wanted * np.array([0, 1, 1], np.float32))
    return as_bytes(np.where(span == 0, red, coloured))


def _hue(image_HWC: Bytes, angle: float) -> Bytes:
    matrix = tables.hue_matrix(angle)
    pixels = image_HWC.astype(np.float32)
    return as_bytes(sum(pixels[:, :, channel, None] * matrix[:, channel] for channel in range(3)))


def _gaussian_blur(image_HWC: Bytes, sigma: float) -> Bytes:
    height, width = image_HWC.shape[:2]
    kernel = tables.gaussian_kernel(tables.pixels_of(sigma, height, width))
    rows = _filtered(image_HWC.astype(np.float32), kernel[:, None], "replicate")
    return as_bytes(_filtered(rows, kernel[None, :], "replicate"))


def _defocus_blur(image_HWC: Bytes, radius: float, alias: float) -> Bytes:
    size = image_HWC.shape[:2]
    kernel = tables.disk_kernel(tables.pixels_of(radius, *size), tables.pixels_of(alias, *size))
    return as_bytes(_filtered(image_HWC.astype(np.float32), kernel, "reflect"))


def _filtered(pixels_HWC: Floats, kernel: Floats, border: str) -> Floats:
    """Correlate with a kernel of odd sides; the border is numpy.pad's edge ("replicate") or reflect."""
    reach = tuple(side // 2 for side in kernel.shape)
    mode: Any = "edge" if border == "replicate" else "reflect"
    padded = np.pad(pixels_HWC, ((reach[0],) * 2, (reach[1],) * 2, (0, 0)), mode=mode)
    planes = torch.from_numpy(np.ascontiguousarray(padded.transpose(2, 0, 1)))[:, None]
    blurred = torch.nn.functional.conv2d(planes, torch.from_numpy(np.ascontiguousarray(kernel))[None, None])
    result: Floats = blurred[:, 0].permute(1, 2, 0).numpy()
    return result


def _jpeg_compression(image_HWC: Bytes, quality: float) -> Bytes:
    file = BytesIO()
    Image.fromarray(image_HWC).save(file, "JPEG", quality=int(quality), subsampling="4:2:0")
    return np.asarray(Image.open(file))


def _pixelate(image_HWC: Bytes, scale: float) -> Bytes:
    pixels = image_HWC.astype(np.float32)
    for axis in (1, 0):  # Pillow's order; it rounds between the two
        side = pixels.shape[axis]
        total = np.zeros_like(pixels)
        for offset, weights in tables.block_weights(side, scale).items():
            places = np.clip(np.arange(side) + offset, 0, side - 1)
            total += pixels.take(places, axis) * weights.reshape((1, side, 1) if axis else (side, 1, 1))
        pixels = as_bytes(total).astype(np.float32)
    return pixels.astype(np.uint8)


def _rotate(image_HWC: Bytes, angle: float) -> Bytes:
    return _warped(image_HWC, tables.turn_map(*image_HWC.shape[:2], degrees=angle), "zeros")


def _zoom(image_HWC: Bytes, factor: float) -> Bytes:
    return _warped(image_HWC, tables.turn_map(*image_HWC.shape[:2], factor=factor), "border")


def _warped(image_HWC: Bytes, place: Floats, padding: str) -> Bytes:
    """Sample the image where the map points for each pixel, bilinearly."""
    height, width = image_HWC.shape[:2]
    y, x = np.mgrid[0:height, 0:width].astype(np.float32) + np.float32(0.5)
    seen = [place[axis, 0] * x + place[axis, 1] * y + place[axis, 2] for axis in (0, 1)]
    scaled = [2 * along / side - 1 for along, side in zip(seen, (width, height), strict=True)]
    grid = torch.from_numpy(np.stack(scaled, axis=2))[None]
    planes = torch.from_numpy(image_HWC.astype(np.float32).transpose(2, 0, 1))[None]
    warped = torch.nn.functional.grid_sample(planes, grid, mode="bilinear", padding_mode=padding, align_corners=False)
    return as_bytes(warped[0].permute(1, 2, 0).numpy())


def _occlusion(image_HWC: Bytes, sample: Words, salt: int, share: float) -> Bytes:
    height, width = image_HWC.shape[:2]
    size = tables.occlusion_size(height, width, share)
    places = [_uniform(word) for word in seeds.random_words(sample, 2, salt=salt)]
    top, left = (
        int(np.floor(place * np.float32(side - hidden + 1)))
        for place, side, hidden in zip(places, (height, width), size, strict=True)
    )
    result = image_HWC.copy()
    result[top : top + size[0], left : left + size[1]] = tables.GREY
    return result


def _uniform(words: Any) -> Any:
    """Convert uint32 to float32 in (0, 1): the middle of one of 2**23 steps, so that neither 0 nor 1 occurs."""
    return ((words >> np.uint32(9)).astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-23)


def _normal(words: Words) -> Floats:
    """Return normal numbers by the Box-Muller transform; the second random number is derived from the first."""
    angle = _uniform(seeds.mix(words ^ np.uint32(seeds.SECOND))) * np.float32(TWO_PI)
    result: Floats = np.sqrt(np.log(_uniform(words)) * np.float32(-2)) * np.cos(angle)
    return result


def _values_words(image_HWC: Bytes, sample: Words, salt: int) -> Words:
    return seeds.random_words(sample, image_HWC.size, salt=salt).reshape(image_HWC.shape)


def _gaussian_noise(image_HWC: Bytes, sample: Words, salt: int, sigma: float) -> Bytes:
    noise = _normal(_values_words(image_HWC, sample, salt))
    return as_bytes(image_HWC.astype(np.float32) + noise * np.float32(255 * sigma))


def _impulse_noise(image_HWC: Bytes, sample: Words, salt: int, share: float) -> Bytes:
    uniform = _uniform(_values_words(image_HWC, sample, salt))
    kept = image_HWC.astype(np.float32) * (uniform >= np.float32(share))
    return as_bytes(kept + ((uniform >= np.float32(share / 2)) & (uniform < np.float32(share))) * np.float32(255))


def _shot_noise(image_HWC: Bytes, sample: Words, salt: int, photons: float) -> Bytes:
    words = _values_words(image_HWC, sample, salt)
    lower, chance = _photon_table(photons)
    places = image_HWC.astype(np.uint32) * np.uint32(tables.STRATA) + (words >> np.uint32(24))
    is_more = (words & np.uint32(0xFFFFFF)).astype(np.float32) * np.float32(2.0**-24) < chance[places]
    return as_bytes((lower[places] + is_more) * np.float32(255 / photons))


_photon_table = lru_cache(16)(tables.photon_table)

_FIXED: Mapping[str, Callable[..., Bytes]] = {
    "brightness": _brightness,
    "contrast": _contrast,
    "saturation": _saturation,
    "hue": _hue,
    "gaussian_blur": _gaussian_blur,
    "defocus_blur": _defocus_blur,
    "jpeg_compression": _jpeg_compression,
    "pixelate": _pixelate,
    "rotate": _rotate,
    "zoom": _zoom,
}
_RANDOM: Mapping[str, Callable[..., Bytes]] = {
    "occlusion": _occlusion,
    "gaussian_noise": _gaussian_noise,
    "impulse_noise": _impulse_noise,
    "shot_noise": _shot_noise,
}
