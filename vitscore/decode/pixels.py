"""Encoded images to pixels: the types that both decoders share.

In the flow, bytes of samples come in (`submit`) and batches of pixels go out in the same order (`collect`), one tensor
for each geometry, all from one decode of each image. Several batches may be under way, so that decoding goes on while a
model computes. A bad image is a row of zeros and a reason, never an exception. Bytes leave as bytes: models normalise.

On a CPU an image's pixels depend on that image only, with either decoder: not on its neighbours, its place, the batch
size or the number of threads. On a GPU its place may decide which of two JPEG decoders takes it.
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
"""The share of a batch's JPEGs that goes to a GPU's own decoder, where it has one; DALI's default.

Not an option: that decoder and nvJPEG's kernels may differ by a level of 255, so the share would belong to the run's
identity. Benches sweep it through `make_decoder`."""

# 13,000 x 13,000: twice the size from which Pillow warns of a decompression bomb, and where it refuses.
MAX_PIXELS = 178_956_970


class BadImage(Exception):
    """One image cannot be decoded; its text is the row's reason."""


@dataclass
class Decoded:
    """One batch of pixels.

    Args:
        pixels: for each geometry uint8 (B, H, W, 3), contiguous; for a `ProcessorGeometry` float32 (B, 3, H, W).
        faults: row to reason; such a row's pixels are zeros.
        held: on a GPU what the pixels are made from, which it may still be reading (the encoded images, and pixels that
            these are copied from): kept as long as the pixels are.
    """

    pixels: tuple[torch.Tensor, ...]
    faults: dict[int, str] = field(default_factory=dict)
    held: tuple[object, ...] = ()


class Decoder(Protocol):
    """Batches in, pixels out, in order; one thread calls it."""

    depth: int
    """How many batches may be submitted and not yet collected."""
    again: DecodedAgain
    """How often something was decoded more than once, so far."""

    def submit(self, images: Sequence[EncodedImage]) -> None:
        """Begin to decode a batch of 1 to `batch_size` images; their bytes must stay as they are until collected."""

    def collect(self) -> Decoded:
        """Wait for the oldest batch that was submitted.

        Raises:
            SetupError: there is no memory to decode it, or the decoder does not work.
        """

    def close(self) -> None:
        """Stop, and drop what was not collected."""


def is_dali_available() -> bool:
    """Whether DALI is installed; nothing is imported."""
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:
        return False


def too_large(width: int, height: int, *, max_pixels: int) -> BadImage:
    return BadImage(f"{IMAGE_TOO_LARGE}: {width}x{height}, limit {max_pixels} pixels")
