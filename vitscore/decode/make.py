"""The choice between the two decoders, DALI and torchvision."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vitscore.decode.failures import cause_of, out_of_memory
from vitscore.decode.pixels import HW_DECODER_LOAD, MAX_PIXELS, AnyGeometry, Decoder, DecoderKind
from vitscore.errors import SetupError


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
        geometries: the resize and crop of every model; the decoder returns one tensor per geometry, in this order.
        batch_size: the largest number of images in a batch.
        num_threads: the number of decoding threads.
        device_id: the GPU that receives the pixels, or None for the CPU.
        max_pixels: images that declare more pixels are refused before they are decoded.
        hw_decoder_load: the share of JPEGs for the GPU's hardware decoder, if it has one.

    Raises:
        SetupError: DALI was requested and cannot be imported, cannot use the GPU, or has too little memory.
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
