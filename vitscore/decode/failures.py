"""Classify errors of DALI and nvImageCodec by their text: a bad image, too little memory, or a broken device.

A bad image becomes a row with a reason, and the run goes on. Without memory, or on a broken device, every image fails,
and the run must end before they are all recorded as bad.

The texts are those of DALI 2.4, nvImageCodec 0.9 and nvJPEG 13.3, compared with the strings in their libraries:

- dali/core/cuda_error.h: `CUDABadAlloc` and `CUDAError`, of the runtime and of the driver.
- dali/operators/imgcodec/image_decoder.h: "Failed to decode sample #N" for any failure of nvImageCodec, including a
  broken device; dali/operators/imgcodec/util/nvimagecodec_types.h: "nvImageCodec failure: '#N'".
- nvimgcodec.h: the numbers. On a CPU 2,400 damaged images gave 2, 3, 4 and 17, and `std::bad_alloc` when the decoder
  trusts an absurd size.
- extensions/nvjpeg/exception.cpp, src/imgproc/exception.h: the lines that nvImageCodec prints when nvJPEG or CUDA
  fails. It raises nothing, but tries the next decoder, and finally one on the CPU.
"""

from __future__ import annotations

import re
from typing import Literal

import torch

from vitscore.errors import SetupError

Cause = Literal["image", "memory", "device"]

_MEMORY_IN_LOG = re.compile(
    r"nvjpeg error #5 \(|(?:device|pinned) allocator failed|Memory allocator error"
    r"|CUDA error #2 when running|CUDA Runtime failure:? '#2'"
)
_DEVICE_IN_LOG = re.compile(r"CUDA error #\d+ when running|CUDA Runtime failure:? '#\d+'|Error in the CUDA API call")
_MEMORY = re.compile(
    r"Can't allocate \d+ bytes|CUDA allocation failed|std::bad_alloc|Could not allocate virtual address space"
    r"|cudaErrorMemoryAllocation|CUDA_ERROR_OUT_OF_MEMORY|out of memory|nvImageCodec failure: '#(?:5|15)'"
)
# The shape of an image can cause these: a kernel cannot be launched with the grid that it leads to.
_BY_SHAPE = re.compile(r"\b(?:cudaErrorInvalidValue|cudaErrorInvalidConfiguration|CUDA_ERROR_INVALID_VALUE)\b")
_DEVICE = re.compile(
    r"CUDA (?:runtime|driver) API error|CUDA error: |nvImageCodec failure: '#(?:1|6|7|10|11|16|20|21)'"
)
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_CALL = re.compile(r"( when running \w+).*", re.DOTALL)
# The text around the reason: marks, source locations, hints.
_AROUND = re.compile(
    r"\[ERROR\]|\[/opt/\S+:\d+\]|Critical error in pipeline:|Current pipeline object is no longer valid\.?"
    r"|\bStacktrace \(.*|\bCUDA kernel errors might be .*| at /\S+:\d+",
    re.DOTALL,
)
_LONGEST = 160


class Failed(RuntimeError):
    """An image of a batch cannot be decoded, or there is not enough memory for the batch; the text is DALI's."""

    def __init__(self, text: str, cause: Cause = "image") -> None:
        super().__init__(text)
        self.cause = cause


class DecoderBroken(SetupError):
    """The decoder does not work: no image is at fault."""


def cause_of(text: str) -> Cause:
    """Return the cause that an error's text names, by default an image."""
    if _MEMORY.search(text) or _MEMORY_IN_LOG.search(text):
        return "memory"
    if _BY_SHAPE.search(text):
        return "image"
    return "device" if _DEVICE.search(text) or _DEVICE_IN_LOG.search(text) else "image"


def complaint_in(line: str) -> Cause | None:
    """Return the cause if a line on stderr is nvImageCodec's complaint about memory or the device, else None."""
    if _MEMORY_IN_LOG.search(line):
        return "memory"
    return "device" if _DEVICE_IN_LOG.search(line) else None


def gist(text: str) -> str:
    """Return the reason within an error of DALI or a line of nvImageCodec, shortened to one line."""
    text = text.rpartition("encountered:\n")[2] or text
    return " ".join(_AROUND.sub(" ", _CALL.sub(r"\1", _COLOUR.sub("", text))).split())[:_LONGEST].rstrip(" :-")


def failure_of(error: Exception, *, device: torch.device | None) -> Failed | SetupError:
    """Convert an error of DALI: to `Failed` if the batch may be tried in parts, else to the error that ends the run."""
    text = str(error)
    cause: Cause = "memory" if isinstance(error, MemoryError) else cause_of(text)
    return decoder_failed(text, device=device) if cause == "device" else Failed(text, cause)


def end_of_run(error: Exception, *, batch_size: int, device: torch.device | None) -> SetupError:
    """Convert an error of DALI to the error that ends the run, when no image can be at fault."""
    failure = failure_of(error, device=device)
    if isinstance(failure, SetupError):
        return failure
    if failure.cause == "memory":
        return out_of_memory(str(error), batch_size=batch_size, device=device)
    return decoder_failed(str(error), device=device)


def decoder_failed(text: str, *, device: torch.device | None) -> DecoderBroken:
    """Return the error for a decoder that does not work, though no image is at fault."""
    look = "Look at the GPU with nvidia-smi; the" if device is not None else "The"
    return DecoderBroken(
        "decoder failed",
        where=str(device or "cpu"),
        got=gist(text),
        next_step=f"{look} same command goes on from the parts that are done.",
    )


def out_of_memory(text: str, *, batch_size: int, device: torch.device | None) -> SetupError:
    """Return the error for too little memory to decode a batch."""
    kind, free = ("GPU memory", "Free the GPU") if device is not None else ("memory", "Free memory")
    return SetupError(
        f"out of {kind}",
        where=f"decoding a batch of {batch_size}",
        got=gist(text),
        next_step=f"{free}, and the same command goes on; or score anew with a smaller -b and --overwrite.",
    )
