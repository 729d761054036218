"""Encoded images to pixels: the types that both decoders share, and the choice between them.

In the flow, bytes of samples come in (`submit`) and batches of pixels go out in the same order (`collect`), one tensor
for each geometry asked for, all from one decode of each image. Several batches may be under way, so that decoding goes
on while a model computes. A bad image is a row of zeros and a reason, never an exception.

On a CPU, whatever the decoder, an image's pixels depend on that image alone: not on its neighbours, its place, the
batch size or the number of threads. On a GPU its place may decide which of two JPEG decoders it goes to. This module
does not normalise: bytes leave as bytes.
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
from vitscore.decode.failures import cause_of, out_of_memory
from vitscore.errors import SetupError
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


def make_decoder(
    kind: DecoderKind,
    geometries: Sequence[AnyGeometry],
    *,
    batch_size: int,
    num_threads: int,
    device_id: int | None = None,
    max_pixels: int = MAX_PIXELS,
    hw_decoder_load: float = HW_DECODER_LOAD,
) -> Decoder:
    """Make a decoder for these geometries.

    Args:
        kind: "dali" or "torchvision".
        geometries: what each model wants; one tensor of pixels for each, in this order.
        batch_size: the most images a batch may have.
        num_threads: threads that decode.
        device_id: the GPU that pixels are for, or None for the CPU.
        max_pixels: an image that declares more is refused before it is decoded.
        hw_decoder_load: the share of JPEGs that a GPU's own decoder takes, where it has one.

    Raises:
        SetupError: DALI is asked for and cannot be imported, or cannot use the GPU, or there is no memory for it.
    """
    if kind == "torchvision":
        from vitscore.decode.torchvision import TorchvisionDecoder

        return TorchvisionDecoder(
            geometries, batch_size=batch_size, num_threads=num_threads, device_id=device_id, max_pixels=max_pixels
        )
    try:
        from vitscore.decode.dali import DaliDecoder
    except (ImportError, OSError) as failure:
        raise SetupError(
            "DALI cannot be imported",
            got=str(failure),
            next_step="Run `pip install nvidia-dali-cuda130` (Linux only), or use --decoder torchvision.",
        ) from failure
    try:
        return DaliDecoder(
            geometries,
            batch_size=batch_size,
            num_threads=num_threads,
            device_id=device_id,
            max_pixels=max_pixels,
            hw_decoder_load=hw_decoder_load,
        )
    except RuntimeError as failure:
        if cause_of(str(failure)) == "memory":
            device = None if device_id is None else torch.device("cuda", device_id)
            raise out_of_memory(str(failure), batch_size=batch_size, device=device) from failure
        if device_id is None:
            raise
        raise SetupError(
            "DALI cannot use the GPU",
            where=f"cuda:{device_id}",
            got=" ".join(str(failure).split())[:200],
            next_step="Check the driver with nvidia-smi, or use --device cpu.",
        ) from failure


def too_large(width: int, height: int, *, max_pixels: int) -> BadImage:
    return BadImage(f"{IMAGE_TOO_LARGE}: {width}x{height}, limit {max_pixels} pixels")
