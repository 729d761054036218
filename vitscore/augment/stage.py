"""The stage after the decoder: one batch of resized pixels in, the same batch under every condition out.

A condition is a name and a recipe (a chain of operators); the empty recipe leaves the picture unchanged. A run has one
condition, a robustness grid one for each operator and severity. Recipes that differ only in severity share a DALI
pipeline. Batches come out one condition at a time, so the memory in use does not grow with the grid.

DALI decodes and resizes first (on a CPU torchvision resizes), then these pipelines take the pixels in place. So rows
that Pillow decoded are treated like all others, and one decode serves any number of conditions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from vitscore.augment.conditions import Condition, Recipe
from vitscore.decode.pixels import AnyGeometry, Decoded, DecoderKind
from vitscore.errors import UsageError
from vitscore.preprocess import Geometry

Words = NDArray[np.uint32]


class Studio(Protocol):
    """Applies recipes that share their operators to batches of pictures of one size."""

    def apply(self, pixels_BHWC: torch.Tensor, words: Words) -> Sequence[torch.Tensor]:
        """Return the pictures under each recipe, in the recipes' order."""

    def close(self) -> None:
        """Stop the threads."""


class Stage:
    """Applies all conditions of a run.

    Args:
        conditions: the conditions, in the order of the output.
        kind: the decoder's kind: "dali" or "torchvision".
        geometries: the geometries of the decoder, with one tensor of pixels each.
        (the others: see `make_decoder`)
    """

    def __init__(
        self,
        conditions: Sequence[Condition],
        kind: DecoderKind,
        geometries: Sequence[AnyGeometry],
        *,
        batch_size: int,
        num_threads: int,
        device_id: int | None = None,
    ) -> None:
        self.conditions = tuple(conditions)
        self._geometries = tuple(geometries)
        self._kind: DecoderKind = kind
        self._batch_size = batch_size
        self._num_threads = num_threads
        self._device_id = device_id
        self._studios: dict[tuple[tuple[Recipe, ...], tuple[int, int]], Studio] = {}
        self.is_random = any(condition.is_random for condition in conditions)

    def apply(self, decoded: Decoded, words: Words) -> Iterator[tuple[Condition, Decoded]]:
        """Yield the batch under each condition.

        Args:
            decoded: a batch from the decoder.
            words: uint32 (B, 2), the samples' words (`seeds.sample_words`); zeros if no operator is random.
        """
        for _, group in groupby(self.conditions, key=lambda condition: [step.name for step in condition.recipe]):
            conditions = tuple(group)
            if not conditions[0].recipe:
                yield from ((condition, decoded) for condition in conditions)
                continue
            recipes = tuple(condition.recipe for condition in conditions)
            held = (decoded,) if self._device_id is not None else ()
            sets = [
                self._studio(recipes, geometry).apply(pixels, words)
                for geometry, pixels in zip(self._geometries, decoded.pixels, strict=True)
            ]
            for condition, pixels in zip(conditions, zip(*sets, strict=True), strict=True):
                yield condition, Decoded(pixels, decoded.faults, held)

    def close(self) -> None:
        for studio in self._studios.values():
            studio.close()
        self._studios.clear()

    def _studio(self, recipes: tuple[Recipe, ...], geometry: AnyGeometry) -> Studio:
        size = geometry.height, geometry.width
        if (recipes, size) not in self._studios:
            self._studios[recipes, size] = self._make(recipes, size)
        return self._studios[recipes, size]

    def _make(self, recipes: Sequence[Recipe], size: tuple[int, int]) -> Studio:
        if self._kind == "torchvision":
            return PlainStudio(recipes, num_threads=self._num_threads)
        from vitscore.augment.dali import DaliStudio

        return DaliStudio(
            recipes, size, batch_size=self._batch_size, num_threads=self._num_threads, device_id=self._device_id
        )


class PlainStudio:
    """A `Studio` on a pool of threads, each with one image at a time."""

    def __init__(self, recipes: Sequence[Recipe], *, num_threads: int) -> None:
        self._recipes = recipes
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="augment")

    def apply(self, pixels_BHWC: torch.Tensor, words: Words) -> Sequence[torch.Tensor]:
        from vitscore.augment.plain import augment

        images = pixels_BHWC.cpu().numpy()
        results = [np.empty_like(images) for _ in self._recipes]

        def work(row: int) -> None:
            for result, recipe in zip(results, self._recipes, strict=True):
                image = images[row]
                for position, step in enumerate(recipe):
                    image = augment(image, step, words[row], position=position)
                result[row] = image

        list(self._pool.map(work, range(len(images))))
        return [torch.from_numpy(result).to(pixels_BHWC.device) for result in results]

    def close(self) -> None:
        self._pool.shutdown()


def require_bytes(geometries: Mapping[str, AnyGeometry]) -> None:
    """Raise UsageError if a model's processor returns normalised floats, which the operators cannot change."""
    for model, geometry in geometries.items():
        if not isinstance(geometry, Geometry):
            raise UsageError(
                "images cannot be augmented",
                where=model,
                expected="a processor that resizes, crops and normalises",
                got=f"{type(geometry.processor).__name__}, which returns normalised floats",
                next_step="Score this model without --augment.",
            )
