"""Second decoding of a failed batch, in parts, so that only the images that cannot be decoded are lost.

One undecodable image fails the whole batch that goes through DALI with it. The batch is decoded again through pipelines
of the same definition, so that the good images get the same bits as in any other batch. On a CPU these pipelines take
one image at a time and run in parallel, one per thread, so that every image is decoded exactly once more (64 photos:
33 ms against 25 ms for the batch; 64 small digits: 6 ms against 1 ms). On a GPU a batch of one costs nearly as much as
a batch of many, so a failed batch is halved until the bad image is by itself.

Images that fail by themselves are left to the caller, who then checks whether a good image fails too.
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
"""GPU memory that decoding needs per pixel: the pixels, their colour planes, and coefficients of two bytes."""


@dataclass(frozen=True, eq=False)
class DecodedGroup:
    """The pixels of some images of a batch, as DALI decoded them.

    Args:
        positions: the images' positions in the batch.
        sizes: their upright sizes.
        tensors: one per geometry; one per image if the pipeline has no geometries.
    """

    positions: Sequence[int]
    sizes: Sizes
    tensors: list[torch.Tensor]


class SecondTry(Protocol):
    """A way to decode a failed batch again."""

    def decode(self, images: Sequence[EncodedImage], sizes: Sizes) -> list[DecodedGroup]:
        """Decode all images that can be decoded; images that fail by themselves are in none of the groups.

        Raises:
            SetupError: there is not enough memory, or the device does not work.
        """

    def failure_with_good_image(self) -> Failed | None:
        """Return the error for a known good image, which shows that the pipeline is broken; None if it decodes."""


class SynchronousPipeline:
    """A pipeline with one batch under way, built on first use and rebuilt if it returns the wrong batch.

    Args:
        options: the arguments of `DaliPipeline`, except for the depth.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        self._options = {**options, "depth": 1}
        self._device = None if options["device_id"] is None else torch.device("cuda", options["device_id"])
        self._pipeline: DaliPipeline | None = None
        self._serial = 0

    def make(self) -> DaliPipeline:
        """Return the pipeline, building it if there is none yet."""
        self._pipeline = self._pipeline or DaliPipeline(**self._options)
        return self._pipeline

    def decode(self, images: Sequence[EncodedImage], sizes: Sizes) -> tuple[Sizes, list[torch.Tensor]]:
        """Decode a batch and wait for it.

        Raises:
            Failed: an image of it cannot be decoded, or there is not enough memory for the batch.
            SetupError: there is not enough memory for a single image, or the device does not work.
        """
        try:
            return self._decode(images, sizes)
        except Failed as failure:
            if len(images) == 1 and failure.cause == "memory" and lacks_memory(sizes[0], device=self._device):
                raise out_of_memory(str(failure), batch_size=1, device=self._device) from failure
            raise

    def failure_with_good_image(self) -> Failed | None:
        """Return the error for a known good image; None if it can be decoded."""
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
        raise Failed("DALI returned another batch")


class Singles:
    """A `SecondTry` that decodes every image by itself, in parallel.

    Args:
        options: the arguments of `DaliPipeline`.
        threads: one pipeline per thread, built when the first batch fails.
    """

    def __init__(self, options: dict[str, Any], threads: Threads) -> None:
        options = {**options, "batch_size": 1, "num_threads": 1}
        self._threads = threads
        self._pipelines = [SynchronousPipeline(options) for _ in range(threads.count)]
        self._resizes = bool(options["geometries"])

    def decode(self, images: Sequence[EncodedImage], sizes: Sizes) -> list[DecodedGroup]:
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
            pixels = [torch.cat(images_1HWC) for images_1HWC in zip(*tensors, strict=True)]
        else:
            pixels = [image_HWC for images_HWC in tensors for image_HWC in images_HWC]
        return [DecodedGroup(positions, upright, pixels)]

    def failure_with_good_image(self) -> Failed | None:
        return self._pipelines[0].failure_with_good_image()


class Halves:
    """A `SecondTry` that halves a failing group until the bad image is by itself.

    Its pipeline, for half a batch, is built at the start: building it in the middle of a run would take seconds, and
    memory that was not reserved.

    Args:
        options: the arguments of `DaliPipeline`.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        self._half = SynchronousPipeline({**options, "batch_size": -(-options["batch_size"] // 2)})
        self._half.make()

    def decode(self, images: Sequence[EncodedImage], sizes: Sizes) -> list[DecodedGroup]:
        return self._halves_of(images, sizes, range(len(images)))

    def failure_with_good_image(self) -> Failed | None:
        return self._half.failure_with_good_image()

    def _halves_of(self, images: Sequence[EncodedImage], sizes: Sizes, positions: range) -> list[DecodedGroup]:
        """Decode a group that has failed, half by half."""
        middle = -(-len(positions) // 2)
        groups: list[DecodedGroup] = []
        for half in filter(None, (positions[:middle], positions[middle:])):
            try:
                outputs = self._half.decode([images[at] for at in half], [sizes[at] for at in half])
                groups.append(DecodedGroup(half, *outputs))
            except Failed:
                groups += self._halves_of(images, sizes, half) if len(half) > 1 else []
        return groups


def lacks_memory(size: tuple[int, int], *, device: torch.device | None) -> bool:
    """Return whether there is too little memory to decode one image of this upright size.

    If there is enough, a decoder that asked for too much was misled by damaged bytes of the image.
    """
    num_pixels = size[0] * size[1]
    if device is not None:
        return torch.cuda.mem_get_info(device)[0] < _BYTES_A_PIXEL * num_pixels
    try:
        np.empty(3 * num_pixels, np.uint8)
    except MemoryError:
        return True
    return False
