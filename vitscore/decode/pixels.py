"""Types that both decoders share: encoded images, decoded batches, the `Decoder` protocol.

A decoder takes the bytes of samples (`submit`) and returns batches of pixels in the same order (`collect`), with one
tensor per geometry, all from one decode of each image. Several batches may be under way, so that decoding continues
while a model computes. A bad image is a row of zeros with a reason, never an exception. Pixels are uint8; the models
normalise them.

On a CPU, with either decoder, the pixels of an image depend on that image only: not on the other images, its place in
the batch, the batch size or the number of threads. On a GPU its place may decide which of two JPEG decoders takes it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from vitscore.decode.counts import DecodedAgain
from vitscore.preprocess import Geometry, ProcessorGeometry
from vitscore.shards.reasons import IMAGE_TOO_LARGE

EncodedImage = NDArray[np.uint8]
AnyGeometry = Geometry | ProcessorGeometry
DecoderKind = Literal["dali", "torchvision"]


HW_DECODER_LOAD = 0.65
"""The share of a batch's JPEGs for the GPU's hardware decoder, if it has one; DALI's default.

It is not an option of a run: the hardware decoder and nvJPEG's kernels may differ by one level of 255, so the share
would be part of the run's identity. Benches vary it through `make_decoder`."""

# 13,000 x 13,000: twice the size at which Pillow warns of a decompression bomb, and the size at which it refuses.
MAX_PIXELS = 178_956_970


class BadImage(Exception):
    """An image cannot be decoded; the text is the row's reason."""


@dataclass
class Decoded:
    """A batch of pixels.

    Args:
        pixels: one tensor per geometry: uint8 (B, H, W, 3), contiguous; float32 (B, 3, H, W) for a `ProcessorGeometry`.
        faults: reasons by row; the pixels of these rows are zeros.
        held: the sources that a GPU may still be reading (the encoded images, and pixels that were copied), kept as
            long as the pixels.
    """

    pixels: tuple[torch.Tensor, ...]
    faults: dict[int, str] = field(default_factory=dict)
    held: tuple[object, ...] = ()


class Decoder(Protocol):
    """Decodes batches in order; not thread-safe."""

    depth: int
    """The largest number of batches that are submitted and not yet collected."""
    again: DecodedAgain
    """Counts of the work that was done more than once, so far."""

    def submit(self, images: Sequence[EncodedImage]) -> None:
        """Start decoding a batch of 1 to `batch_size` images; their bytes must not change until it is collected."""

    def collect(self) -> Decoded:
        """Wait for the oldest batch that was submitted, and return its pixels.

        Raises:
            SetupError: there is not enough memory to decode it, or the decoder does not work.
        """

    def close(self) -> None:
        """Stop, and drop all batches that were not collected."""


def is_dali_available() -> bool:
    """Return whether DALI is installed, without importing it."""
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:
        return False


def too_large(width: int, height: int, *, max_pixels: int) -> BadImage:
    return BadImage(f"{IMAGE_TOO_LARGE}: {width}x{height}, limit {max_pixels} pixels")
