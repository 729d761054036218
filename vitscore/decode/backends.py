"""Check which JPEG decoders work on this machine by decoding a JPEG with each backend of nvImageCodec, DALI's decoder.

Used by `vitscore doctor`, the first command on a new GPU machine. That a package is installed proves little: the
hardware decoder also needs the driver's `libnvcuvid.so.1`, and without it nvJPEG falls back silently. Imports neither
torch nor DALI.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from io import BytesIO
from typing import IO, Any

HARDWARE, NVJPEG, CPU = "HW_GPU_ONLY", "HYBRID_CPU_GPU", "CPU_ONLY"
BACKENDS = (HARDWARE, NVJPEG, "GPU_ONLY", CPU)
"""In the order in which DALI tries them. In nvImageCodec 0.9 `GPU_ONLY` decodes only JPEG 2000 and TIFF."""
NVCUVID = "libnvcuvid.so.1"
"""The driver's decoder library; a container has it only if NVIDIA_DRIVER_CAPABILITIES includes `video`."""

_COLOR = (200, 30, 60)
_TOLERANCE = 12
"""Accepted error of a single-colour JPEG, in levels of 255."""
_LONGEST = 160


def jpeg_backends(device_id: int = 0) -> dict[str, str | None]:
    """Return for each backend None if it decodes a small JPEG, else the reason why it does not, in one line.

    Args:
        device_id: the GPU for the backends that need one.
    """
    return {backend: _failure_of(backend, device_id) for backend in BACKENDS}


def failure_to_load(library: str) -> str | None:
    """Return None if a shared library can be loaded, else the reason why it cannot, in one line."""
    try:
        ctypes.CDLL(library)
    except OSError as error:
        return _first_line(str(error))
    return None


def _failure_of(backend: str, device_id: int) -> str | None:
    with tempfile.TemporaryFile() as log, _captured(log):
        try:
            failure = _pixel_fault(_decoded(backend, device_id))
        except Exception as error:
            failure = _first_line(str(error)) or type(error).__name__
        log.seek(0)
        # The library prints the cause; its exception carries only a number.
        causes = re.findall(r"\[(?:ERROR|WARNING)\]\s*(?:\[\w+\]\s*)?(.+)", _plain(log.read()))
    return f"{failure} ({_first_line(causes[0]).partition('. ')[0]})" if failure and causes else failure


def _decoded(backend: str, device_id: int) -> Any:
    """Decode a small JPEG with this backend; return (H, W, 3) pixels, or None if it cannot."""
    import numpy as np
    from PIL import Image

    nvimgcodec: Any = importlib.import_module("nvidia.nvimgcodec")
    file = BytesIO()
    Image.new("RGB", (64, 48), _COLOR).save(file, "JPEG")
    kind = nvimgcodec.BackendKind.__members__[backend]
    device = nvimgcodec.NVIMGCODEC_DEVICE_CPU_ONLY if backend == CPU else device_id
    decoder = nvimgcodec.Decoder(device_id=device, max_num_cpu_threads=1, backends=[nvimgcodec.Backend(kind)])
    image = decoder.decode(file.getvalue())
    return None if image is None else np.asarray(image.cpu())


def _pixel_fault(pixels: Any) -> str | None:
    if pixels is None:
        return "it does not decode JPEGs here"
    if pixels.shape != (48, 64, 3) or abs(pixels.reshape(-1, 3).mean(0) - _COLOR).max() > _TOLERANCE:
        return "it decodes to other pixels"
    return None


@contextlib.contextmanager
def _captured(file: IO[bytes]) -> Iterator[None]:
    """Redirect the output of C libraries to a file."""
    before = {descriptor: os.dup(descriptor) for descriptor in (1, 2)}
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    try:
        for descriptor in before:
            os.dup2(file.fileno(), descriptor)
        yield
    finally:
        for descriptor, own in before.items():
            os.dup2(own, descriptor)
            os.close(own)


def _plain(text: bytes) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text.decode(errors="replace"))


def _first_line(text: str) -> str:
    """Return the first line of an error's text, without its source location."""
    line = next(iter(text.strip().splitlines()), "")
    return re.sub(r" at /\S+:\d+|^Internal error - ", "", line)[:_LONGEST].rstrip()
