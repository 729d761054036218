"""Which JPEG decoders work on this machine: each backend of nvImageCodec, with which DALI decodes, is given a JPEG.

For `doctor` and for the first step of a day on a GPU. An installed package says little: the hardware decoder also needs
the driver's `libnvcuvid.so.1`, and without it nvJPEG falls back in silence. Imports neither torch nor DALI.
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
"""In the order in which DALI tries them. With nvImageCodec 0.9 `GPU_ONLY` has decoders of JPEG 2000 and TIFF alone."""
NVCUVID = "libnvcuvid.so.1"
"""The driver's library of its decoders; in a container only where NVIDIA_DRIVER_CAPABILITIES includes `video`."""

_COLOR = (200, 30, 60)
_TOLERANCE = 12
"""Levels of 255 that a JPEG of one colour may be off."""
_LONGEST = 160


def jpeg_backends(device_id: int = 0) -> dict[str, str | None]:
    """For each backend None where it decodes a small JPEG, else why it does not, in one line.

    Args:
        device_id: the GPU that the backends use which need one.
    """
    return {backend: _failure_of(backend, device_id) for backend in BACKENDS}


def failure_to_load(library: str) -> str | None:
    """None where a shared library can be loaded, else why it cannot, in one line."""
    try:
        ctypes.CDLL(library)
    except OSError as error:
        return _first_line(str(error))
    return None


def _failure_of(backend: str, device_id: int) -> str | None:
    with tempfile.TemporaryFile() as said, _captured(said):
        try:
            failure = _wrong_with(_decoded(backend, device_id))
        except Exception as error:
            failure = _first_line(str(error)) or type(error).__name__
        said.seek(0)
        # The library prints the cause and raises no more than a number.
        causes = re.findall(r"\[(?:ERROR|WARNING)\]\s*(?:\[\w+\]\s*)?(.+)", _plain(said.read()))
    return f"{failure} ({_first_line(causes[0]).partition('. ')[0]})" if failure and causes else failure


def _decoded(backend: str, device_id: int) -> Any:
    """The small JPEG as this backend decodes it, (H, W, 3); None where it cannot."""
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


def _wrong_with(pixels: Any) -> str | None:
    if pixels is None:
        return "it does not decode JPEGs here"
    if pixels.shape != (48, 64, 3) or abs(pixels.reshape(-1, 3).mean(0) - _COLOR).max() > _TOLERANCE:
        return "it decodes to other pixels"
    return None


@contextlib.contextmanager
def _captured(file: IO[bytes]) -> Iterator[None]:
    """Send what C libraries print to a file."""
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
    """The first line, without the place in a source file."""
    line = next(iter(text.strip().splitlines()), "")
    return re.sub(r" at /\S+:\d+|^Internal error - ", "", line)[:_LONGEST].rstrip()
