"""A failed batch, decoded once more in parts, so that only what cannot be decoded is lost.

One undecodable image fails all that goes through DALI with it. The others are decoded again through pipelines of the
same definition, so that their pixels are the same bits as in any other batch. On a CPU those pipelines take one image
at a time and run side by side, one a thread: each image is decoded once more and never twice (64 photos: 33 ms against
the batch's 25; 64 small digits: 6 ms against 1). On a GPU a batch of one costs nearly as much as a batch of many, so a
failed batch is halved there until the bad image stands alone.

What fails by itself is left to the caller, who asks whether a good image fails too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from vitscore.decode.dali_pipeline import GOOD_IMAGE, GOOD_SIZE, DaliPipeline, Misplaced, Sizes
from vitscore.decode.failures import Failed, out_of_memory
from vitscore.decode.pixels import EncodedImage
from vitscore.decode.threads import Threads

_BYTES_A_PIXEL = 12
"""What decoding takes on a GPU: the pixels, the planes that they are made of, and coefficients of two bytes."""


@dataclass(frozen=True, eq=False)
class Found:
    """What DALI made of some images of a batch.

    Args:
        positions: of those images.
        sizes: their upright sizes.
        tensors: one for each geometry, or without any one for each image.
    """

    positions: Sequence[int]
    sizes: Sizes
    tensors: list[torch.Tensor]


class SecondTry(Protocol):
    """Decodes a failed batch once more."""

    def decode(self, images: Sequence[EncodedImage], sizes: Sizes) -> list[Found]:
        """Decode what can be decoded; the positions that no part has are of images that failed by themselves.

        Raises:
            SetupError: there is no memory, or the device does not work.
        """

    def failure_with_good_image(self) -> Failed | None:
        """How a good image fails: then it is the pipeline that does not work. None where it can be decoded."""


class OneAtATime:
    """A pipeline that is fed a batch and waited for; made when it is first needed, and anew where it loses its place.

    Args:
        options: `DaliPipeline`'s, but for the depth.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        self._options = {**options, "depth": 1}
        self._device = None if options["device_id"] is None else torch.device("cuda", options["device_id"])
        self._pipeline: DaliPipeline | None = None
        self._serial = 0

    def make(self) -> DaliPipeline:
        self._pipeline = self._pipeline or DaliPipeline(**self._options)
        return self._pipeline

    def decode(self, images: Sequence[EncodedImage], sizes: Sizes) -> tuple[Sizes, list[torch.Tensor]]:
        """Decode a batch.

        Raises:
            Failed: an image of it cannot be decoded, or there is no memory for it.
            SetupError: there is no memory for one image, or the device does not work.
        """
        try:
            return self._decode(images, sizes)
        except Failed as failure:
            if len(images) == 1 and failure.cause == "memory" and lacks_memory(sizes[0], device=self._device):
                raise out_of_memory(str(failure), batch_size=1, device=self._device) from failure
            raise

    def failure_with_good_image(self) -> Failed | None:
        try:
            self._decode([GOOD_IMAGE], [GOOD_SIZE])
        except Failed as failure:
            return failure
        return None

    def _decode(self, images: Sequence[EncodedImage], sizes: Sizes) -> tuple[Sizes, list[torch.Tensor]]:
        for _ in range(2):
            self._serial += 1
            pipeline = self.make()
            try:
                pipeline.feed(images, sizes, serial=self._serial)
                return pipeline.outputs(self._serial)
            except Misplaced:
                del pipeline
                self._pipeline = None
        raise Failed("DALI answered with another batch")


class Singles:
    """A `SecondTry` that decodes every image by itself, side by side.

    Args:
        options: `DaliPipeline`'s.
        threads: one pipeline for each, made when the first batch fails.
    """

    def __init__(self, options: dict[str, Any], threads: Threads) -> None:
        options = {**options, "batch_size": 1, "num_threads": 1}
        self._threads = threads
        self._pipelines = [OneAtATime(options) for _ in range(threads.count)]
        self._resizes = bool(options["geometries"])

    def decode(self, images: Sequence[EncodedImage], sizes: Sizes) -> list[Found]:
        outputs: dict[int, tuple[Sizes, list[torch.Tensor]]] = {}

        def work(worker: int) -> None:
            pipeline = self._pipelines[worker]
            for position in range(worker, len(images), self._threads.count):
                try:
                    outputs[position] = pipeline.decode([images[position]], [sizes[position]])
                except Failed:
                    continue

        self._threads.share(work)
        positions = sorted(outputs)
        tensors = [outputs[position][1] for position in positions]
        upright = [size for position in positions for size in outputs[position][0]]
        if self._resizes and positions:
            return [Found(positions, upright, [torch.cat(images_1HWC) for images_1HWC in zip(*tensors, strict=True)])]
        return [Found(positions, upright, [image_HWC for images_HWC in tensors for image_HWC in images_HWC])]

    def failure_with_good_image(self) -> Failed | None:
        return self._pipelines[0].failure_with_good_image()


class Halves:
    """A `SecondTry` that halves a failing group until what fails stands alone.

    Its pipeline is made at once, for half a batch: in the middle of a run that would take seconds, and memory that
    nothing reckons with.

    Args:
        options: `DaliPipeline`'s.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        self._half = OneAtATime({**options, "batch_size": -(-options["batch_size"] // 2)})
        self._half.make()

    def decode(self, images: Sequence[EncodedImage], sizes: Sizes) -> list[Found]:
        return self._halves_of(images, sizes, range(len(images)))

    def failure_with_good_image(self) -> Failed | None:
        return self._half.failure_with_good_image()

    def _halves_of(self, images: Sequence[EncodedImage], sizes: Sizes, positions: range) -> list[Found]:
        """Decode a group that has failed, half by half."""
        middle = -(-len(positions) // 2)
        found: list[Found] = []
        for half in filter(None, (positions[:middle], positions[middle:])):
            try:
                found.append(Found(half, *self._half.decode([images[at] for at in half], [sizes[at] for at in half])))
            except Failed:
                found += self._halves_of(images, sizes, half) if len(half) > 1 else []
        return found


def lacks_memory(size: tuple[int, int], *, device: torch.device | None) -> bool:
    """Whether there is no memory to decode one image of this upright size.

    Where there is, a decoder that asked for too much was misled by the image's bytes.
    """
    num_pixels = size[0] * size[1]
    if device is not None:
        return torch.cuda.mem_get_info(device)[0] < _BYTES_A_PIXEL * num_pixels
    try:
        np.empty(3 * num_pixels, np.uint8)
    except MemoryError:
        return True
    return False
