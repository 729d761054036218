"""The operators as a DALI graph: a batch of resized images in, one batch out for each recipe, on CPU or GPU.

A recipe is a chain of operators with their values. Recipes with the same operator share its work: the noise of a sample
is drawn once for all severities. The graph computes its random numbers with the same integer arithmetic as NumPy, bit
for bit (`seeds`), because DALI's generators depend on a sample's place in the batch, and scores must not. The other
arithmetic is that of `plain`, against which the tests compare this graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import nvidia.dali.fn as fn
import nvidia.dali.math as dmath
import nvidia.dali.types as types

from vitscore.augment import seeds, tables
from vitscore.augment.conditions import Recipe
from vitscore.augment.plain import TWO_PI


def graph(recipes: Sequence[Recipe], *, height: int, width: int, is_gpu: bool) -> tuple[Any, ...]:
    """Define one output for each recipe, and inputs `pixels` (uint8 HWC) and `words` (uint32 (2,), on the host)."""
    device = "gpu" if is_gpu else "cpu"
    pixels = fn.external_source(name="pixels", dtype=types.UINT8, ndim=3, layout="HWC", device=device)
    words = fn.external_source(name="words", dtype=types.UINT32, ndim=1)
    studio = _Studio(height, width, words, is_gpu=is_gpu)
    return tuple(studio.follow(pixels, recipe) for recipe in recipes)


class _Studio:
    """Builds the operators for pictures of one size, and keeps the random numbers that recipes share."""

    def __init__(self, height: int, width: int, words: Any, *, is_gpu: bool) -> None:
        self.size = height, width
        self._words = words
        self._is_gpu = is_gpu
        self._noise: dict[tuple[str, int], Any] = {}

    def follow(self, pixels: Any, recipe: Recipe) -> Any:
        for position, step in enumerate(recipe):
            if step.name in _RANDOM:
                pixels = _RANDOM[step.name](self, pixels, seeds.salt(step.name, position), *step.values)
            else:
                pixels = _FIXED[step.name](self, pixels, *step.values)
        return pixels

    def constant(self, values: Any) -> Any:
        return types.Constant(np.asarray(values), device="gpu" if self._is_gpu else "cpu")

    def uniform(self, salt: int) -> Any:
        """Return a number in (0, 1) for every value of the picture; like all noise, drawn once for all recipes."""
        return self._once("uniform", salt, lambda: _uniform(self.bits(salt)))

    def normal(self, salt: int) -> Any:
        """Return a normal number for every value, by the Box-Muller transform."""

        def draw() -> Any:
            angle = _uniform(_mixed(self.bits(salt) ^ _word(seeds.SECOND))) * TWO_PI
            return dmath.sqrt(dmath.log(self.uniform(salt)) * -2.0) * dmath.cos(angle)

        return self._once("normal", salt, draw)

    def place(self, axis: int, salt: int) -> Any:
        """Return one number in (0, 1) for the sample, on the host."""
        index = types.Constant(axis, dtype=types.UINT32)
        return _uniform(_mixed(_mixed(index ^ self._words[0]) ^ self._words[1] ^ _word(salt)))

    def bits(self, salt: int) -> Any:
        """Return a uint32 for every value, as `seeds.random_words` does."""

        def draw() -> Any:
            places = self.constant(np.arange(3 * self.size[0] * self.size[1], dtype=np.uint32).reshape(*self.size, 3))
            first, second = (self._words[at].gpu() if self._is_gpu else self._words[at] for at in (0, 1))
            return _mixed(_mixed(places ^ first) ^ second ^ _word(salt))

        return self._once("bits", salt, draw)

    def _once(self, kind: str, salt: int, draw: Callable[[], Any]) -> Any:
        if (kind, salt) not in self._noise:
            self._noise[kind, salt] = draw()
        return self._noise[kind, salt]


def _word(value: int) -> Any:
    return types.Constant(value, dtype=types.UINT32)


def _mixed(words: Any) -> Any:
    """`seeds.mix` in DALI, which has no shifts and divides instead."""
    for multiplier, shift in zip(seeds.MULTIPLIERS, seeds.SHIFTS, strict=False):
        words = (words ^ (words // _word(1 << shift))) * _word(multiplier)
    return words ^ (words // _word(1 << seeds.SHIFTS[2]))


def _uniform(words: Any) -> Any:
    return (_float(words // _word(1 << 9)) + 0.5) * 2.0**-23


def _float(values: Any) -> Any:
    return fn.cast(values, dtype=types.FLOAT)


def _bytes(values: Any) -> Any:
    """Round, and clip to 0..255."""
    return fn.cast(values, dtype=types.UINT8)


def _extreme(reduce: Any, pixels: Any) -> Any:
    """Return the largest or smallest of a pixel's three values."""
    return reduce(pixels, axes=(2,), keep_dims=True)


def _brightness(studio: _Studio, images: Any, delta: float) -> Any:
    pixels = _float(images)
    value = _extreme(fn.reductions.max, pixels)
    lighter = dmath.clamp(value + 255.0 * delta, 0.0, 255.0)
    return _bytes(pixels * (lighter / dmath.max(value, 1.0)) + _float(value == 0.0) * lighter)


def _contrast(studio: _Studio, images: Any, factor: float) -> Any:
    pixels = _float(images)
    mean = fn.reductions.mean(pixels, axes=(0, 1), keep_dims=True)
    return _bytes((pixels - mean) * float(factor) + mean)


def _saturation(studio: _Studio, images: Any, factor: float, offset: float) -> Any:
    pixels = _float(images)
    value, least = _extreme(fn.reductions.max, pixels), _extreme(fn.reductions.min, pixels)
    span = value - least
    wanted = dmath.clamp(span / dmath.max(value, 1.0) * float(factor) + float(offset), 0.0, 1.0)
    coloured = value - (value - pixels) * (wanted * value / dmath.max(span, 1.0))
    red = value * (1.0 - wanted * studio.constant(np.array([0, 1, 1], np.float32).reshape(1, 1, 3)))
    is_grey = _float(span == 0.0)
    return _bytes(is_grey * red + (1.0 - is_grey) * coloured)


def _hue(studio: _Studio, images: Any, angle: float) -> Any:
    matrix = tables.hue_matrix(angle)
    return fn.coord_transform(images, M=matrix.ravel().tolist(), dtype=types.UINT8)


def _gaussian_blur(studio: _Studio, images: Any, sigma: float) -> Any:
    kernel = tables.gaussian_kernel(tables.pixels_of(sigma, *studio.size))
    rows = fn.filter(_float(images), studio.constant(kernel[:, None]), border="clamp")
    return _bytes(fn.filter(rows, studio.constant(kernel[None, :]), border="clamp"))


def _defocus_blur(studio: _Studio, images: Any, radius: float, alias: float) -> Any:
    kernel = tables.disk_kernel(tables.pixels_of(radius, *studio.size), tables.pixels_of(alias, *studio.size))
    return _bytes(fn.filter(_float(images), studio.constant(kernel), border="101"))


def _jpeg_compression(studio: _Studio, images: Any, quality: float) -> Any:
    return fn.jpeg_compression_distortion(images, quality=int(quality))


def _pixelate(studio: _Studio, images: Any, scale: float) -> Any:
    for axis in (1, 0):
        side = studio.size[axis]
        pixels, total = _float(images), None
        for offset, weights in tables.block_weights(side, scale).items():
            # A slice moves the picture; values from outside it have weight 0.
            moved = fn.slice(
                pixels, start=(offset,), shape=(side,), axes=(axis,), out_of_bounds_policy="pad", fill_values=0
            )
            part = moved * studio.constant(weights.reshape((1, side, 1) if axis else (side, 1, 1)))
            total = part if total is None else total + part
        images = _bytes(total)
    return images


def _rotate(studio: _Studio, images: Any, angle: float) -> Any:
    place = tables.turn_map(*studio.size, degrees=angle)
    return fn.warp_affine(images, matrix=place.ravel().tolist(), interp_type=types.INTERP_LINEAR, fill_value=0)


def _zoom(studio: _Studio, images: Any, factor: float) -> Any:
    place = tables.turn_map(*studio.size, factor=factor)
    return fn.warp_affine(images, matrix=place.ravel().tolist(), interp_type=types.INTERP_LINEAR)


def _occlusion(studio: _Studio, images: Any, salt: int, share: float) -> Any:
    size = tables.occlusion_size(*studio.size, share)
    corner = [
        dmath.floor(studio.place(axis, salt) * float(side - hidden + 1))
        for axis, (side, hidden) in enumerate(zip(studio.size, size, strict=True))
    ]
    return fn.erase(
        images,
        anchor=fn.stack(*corner),
        shape=[float(side) for side in size],
        axis_names="HW",
        fill_value=tables.GREY,
    )


def _gaussian_noise(studio: _Studio, images: Any, salt: int, sigma: float) -> Any:
    return _bytes(_float(images) + studio.normal(salt) * (255.0 * sigma))


def _impulse_noise(studio: _Studio, images: Any, salt: int, share: float) -> Any:
    uniform = studio.uniform(salt)
    is_kept = _float(uniform >= float(share))
    is_full = _float(uniform >= share / 2) * (1.0 - is_kept)
    return _bytes(_float(images) * is_kept + is_full * 255.0)


def _shot_noise(studio: _Studio, images: Any, salt: int, photons: float) -> Any:
    words = studio.bits(salt)
    # A table's keys have sixteen bits: eight of the value and eight random ones.
    slices = fn.cast(words // _word(1 << 24), dtype=types.INT32)
    places = fn.cast(fn.cast(images, dtype=types.INT32) * tables.STRATA + slices, dtype=types.UINT16)
    lower, chance = (
        fn.lookup_table(places, keys=list(range(len(table))), values=table.tolist(), dtype=types.FLOAT)
        for table in tables.photon_table(photons)
    )
    is_more = _float(_float(words & _word(0xFFFFFF)) * 2.0**-24 < chance)
    return _bytes((lower + is_more) * (255 / photons))


_FIXED: Mapping[str, Callable[..., Any]] = {
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
_RANDOM: Mapping[str, Callable[..., Any]] = {
    "occlusion": _occlusion,
    "gaussian_noise": _gaussian_noise,
    "impulse_noise": _impulse_noise,
    "shot_noise": _shot_noise,
}
