"""The DALI pipeline: encoded bytes in, upright RGB images or resized pixels out, with several batches under way.

`dali` decides which images come in and what is done with the pixels. This module has the only definition of the graph,
for CPU and GPU. If the graph resizes, the host computes the region that each image's crop shows and feeds it with the
bytes, so that only this region is resized. A resize takes two steps, first along the rows, then along the columns, each
rounded to bytes, as in Pillow and torchvision. They clip overshoot between the steps; DALI's single resize does not,
and differs from them on images with hard edges (1.5 of 255 levels on black-and-white pictures, bicubic, against 0.06).
"""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Sequence
from io import BytesIO
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.dlpack import from_dlpack

# OpenCV, DALI's fallback for unusual images, reads this when it is loaded.
os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")

import nvidia.dali.fn as fn
import nvidia.dali.types as types
from nvidia.dali import pipeline_def
from nvidia.dali.tensors import TensorCPU

from vitscore.decode.failures import end_of_run, failure_of
from vitscore.decode.pixels import EncodedImage
from vitscore.preprocess import Geometry

Sizes = Sequence[tuple[int, int]]

_FILTERS = {
    "nearest": types.INTERP_NN,
    "bilinear": types.INTERP_LINEAR,
    "bicubic": types.INTERP_CUBIC,
    "lanczos": types.INTERP_LANCZOS3,
}
# Radius of each filter, in pixels of the larger side's grid.
_REACH = {"nearest": 1, "bilinear": 1, "bicubic": 2, "lanczos": 3}
# Beyond an image's edge DALI repeats the last pixel, while Pillow and torchvision renormalise the filter's weights. On
# a few pixels per side this matters (bicubic on 3 x 2: 0.7 to 1.0 of 255 levels), so DALI does not resize those.
_MIN_SIDE = {"nearest": 1, "bilinear": 1, "bicubic": 16, "lanczos": 32}


GOOD_SIZE = (16, 16)


def _good_image() -> EncodedImage:
    file = BytesIO()
    Image.new("RGB", GOOD_SIZE, (120, 130, 140)).save(file, "JPEG")
    return np.frombuffer(file.getvalue(), np.uint8)


GOOD_IMAGE = _good_image()
"""A small JPEG that every decoder can decode."""


class Misplaced(Exception):
    """DALI returned another batch than the one that was due."""


class DaliPipeline:
    """A DALI pipeline with up to `depth` batches under way.

    Args:
        geometries: the resizes that the graph does; without any, it returns the decoded images.
        (the others: see `make_decoder`)
    """

    def __init__(
        self,
        geometries: Sequence[Geometry],
        *,
        batch_size: int,
        num_threads: int,
        device_id: int | None,
        depth: int,
        hw_decoder_load: float,
    ) -> None:
        self._geometries = geometries
        self._device = None if device_id is None else torch.device("cuda", device_id)
        self._fed: deque[Sequence[EncodedImage]] = deque()
        """The bytes that DALI reads in place, kept until their batch is returned or has failed."""
        graph = pipeline_def(
            _graph,
            batch_size=batch_size,
            num_threads=num_threads,
            device_id=device_id,
            prefetch_queue_depth=depth,
            # The dynamic executor gives up its outputs: they stay valid as long as torch holds them.
            exec_dynamic=True,
        )
        self._pipe = graph(geometries, is_gpu=device_id is not None, hw_decoder_load=hw_decoder_load)
        self._pipe.build()
        # The first `schedule_run` starts `depth` batches at once and fails if they were not fed; later calls start one.
        # It is spent on small images, which also makes DALI create its decoders before the first real batch.
        for _ in range(depth):
            self._feed_inputs([GOOD_IMAGE], [GOOD_SIZE], serial=0)
        self._pipe.schedule_run()
        for _ in range(depth):
            self.outputs(0)

    def feed(self, images: Sequence[EncodedImage], sizes: Sizes, *, serial: int) -> None:
        """Start a batch of images with these upright sizes; their bytes must not change until its outputs are returned.

        Raises:
            SetupError: there is not enough memory, or the device does not work.
        """
        try:
            self._feed_inputs(images, sizes, serial=serial)
            self._pipe.schedule_run()
        except (RuntimeError, MemoryError) as error:
            raise end_of_run(error, batch_size=len(images), device=self._device) from error

    def outputs(self, serial: int) -> tuple[Sizes, list[torch.Tensor]]:
        """Wait for the oldest batch and return its images' upright sizes and tensors.

        There is one tensor per geometry, or one per image if the pipeline has no geometries.

        Raises:
            Failed: an image of the batch cannot be decoded, or there is not enough memory for it.
            Misplaced: it is not the batch with this serial.
            SetupError: the device does not work.
        """
        # On a GPU the outputs are bound to torch's stream: the stream waits for DALI's remaining work, the host does
        # not (`share_outputs(cuda_stream)`, default executor). `from_dlpack` passes torch's current stream to DALI's
        # `__dlpack__` again, which records an event on it if one is needed. From then on torch owns the memory: with
        # this executor `release_outputs` takes nothing back, and a buffer returns to DALI when its last tensor is gone.
        # DALI 2.4 then queues it for deletion and does not document what the queue waits for. So the code that starts
        # device work on these tensors must hold them until that work is done (see `Decoded.held`).
        stream = None if self._device is None else torch.cuda.current_stream(self._device)
        try:
            serials, sizes, *lists = self._pipe.share_outputs(stream)
        except Exception as error:
            raise failure_of(error, device=self._device) from error
        finally:
            self._fed.popleft()
        returned = int(serials.at(0))
        shapes = [(height, width) for height, width, _ in np.asarray(sizes.as_tensor()).tolist()]
        if self._geometries:
            tensors = [from_dlpack(batch.as_tensor()) for batch in lists]
        else:
            tensors = self._images_of(lists[0])
        self._pipe.release_outputs()
        if returned != serial:
            raise Misplaced
        return shapes, tensors

    def _images_of(self, decoded: Any) -> list[torch.Tensor]:
        """Return a tensor for each decoded image."""
        if self._device is not None:
            return [from_dlpack(image) for image in decoded]
        if decoded.is_dense_tensor():
            with contextlib.suppress(RuntimeError):  # of one size, but not contiguous in memory
                return list(from_dlpack(decoded.as_tensor()).unbind())
        # Torch takes a capsule as it is; it asks an object for its device and stream, which takes five times as long.
        return [from_dlpack(image.__dlpack__()) for image in decoded]

    def _feed_inputs(self, images: Sequence[EncodedImage], sizes: Sizes, *, serial: int) -> None:
        self._fed.append(images)
        # DALI takes its own tensors as they are; it inspects arrays one by one, which takes twice as long.
        self._pipe.feed_input("encoded", [TensorCPU(image) for image in images])
        self._pipe.feed_input("serial", np.full(len(images), serial, np.int64))
        for index, geometry in enumerate(self._geometries):
            for name, values in _windows(geometry, sizes).items():
                self._pipe.feed_input(f"{name}{index}", values)


def is_beyond_dali(geometry: Geometry, size: tuple[int, int]) -> bool:
    """Return whether DALI's resize of an image of this size differs visibly from torchvision's."""
    resized = geometry.resized_size(*size)
    sides = [min(side, new) for side, new in zip(size, resized, strict=True) if side != new]
    return bool(sides) and min(sides) < _MIN_SIDE[geometry.interpolation]


def _graph(geometries: Sequence[Geometry], *, is_gpu: bool, hw_decoder_load: float) -> tuple[Any, ...]:
    # Without a copy: for 256 JPEGs of 110 KB the copy took two thirds of the feeding time.
    encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1, no_copy=True)
    serial = fn.external_source(name="serial", dtype=types.INT64, ndim=0)
    images = fn.decoders.image(
        encoded,
        device="mixed" if is_gpu else "cpu",
        output_type=types.RGB,
        # As libjpeg does, and so Pillow; nvJPEG's default is plain upsampling.
        jpeg_fancy_upsampling=True,
        hw_decoder_load=hw_decoder_load,
        # By default DALI pins each of the decoder's threads to a core, and uses the same cores in every rank of a node.
        affine=False,
        # Preallocation (`preallocate_width_hint`, `device_memory_padding`) is left to DALI: buffers only grow, so only
        # the first batches of a run stall for them, and every thread would pay for a hint that is too large.
    )
    pixels = [_resized(images, geometry, index) for index, geometry in enumerate(geometries)]
    return serial, images.shape(device="cpu"), *(pixels or [images])


def _resized(images: Any, geometry: Geometry, index: int) -> Any:
    """Add the resize and crop of one geometry, by the windows that `_windows` computes."""

    def window(name: str, dtype: Any = types.FLOAT) -> Any:
        return fn.external_source(name=f"{name}{index}", dtype=dtype, ndim=1)

    if geometry.resize != "none":
        for step in ("row", "column"):
            images = fn.resize(
                images,
                size=window(f"{step}_size"),
                roi_start=window(f"{step}_begin"),
                roi_end=window(f"{step}_end"),
                interp_type=_FILTERS[geometry.interpolation],
                antialias=True,
            )
    if geometry.can_pad or geometry.resize == "none":
        start = window("start", types.INT32)
        images = fn.slice(
            images, start=start, shape=geometry.crop, axes=[0, 1], out_of_bounds_policy="pad", fill_values=0
        )
    return images


def _windows(geometry: Geometry, sizes: Sizes) -> dict[str, NDArray[Any]]:
    """Compute for each image the region to resize, its new size, and the crop's offset.

    The values are arrays with a row of (height, width) per image, named after the inputs of `_resized`.
    """
    stored = np.array(sizes, np.float64)
    resized = np.array([geometry.resized_size(*size) for size in sizes])
    offset = np.array([geometry.crop_offset(*size) for size in resized.tolist()])
    if geometry.resize == "none":
        return {"start": offset.astype(np.int32)}
    shown = np.minimum(resized, (geometry.height, geometry.width))
    ratio = stored / resized
    begin = np.maximum(offset, 0) * ratio
    end = (np.maximum(offset, 0) + shown) * ratio
    # The first step keeps all rows that the second step's filter needs.
    reach = np.ceil(_REACH[geometry.interpolation] * np.maximum(ratio[:, 0], 1)) + 1
    top = np.maximum(np.floor(begin[:, 0]) - reach, 0)
    low = np.minimum(np.ceil(end[:, 0]) + reach, stored[:, 0])
    windows = {
        "row_size": np.stack([low - top, shown[:, 1]], 1),
        "row_begin": np.stack([top, begin[:, 1]], 1),
        "row_end": np.stack([low, end[:, 1]], 1),
        "column_size": shown,
        "column_begin": np.stack([begin[:, 0] - top, np.zeros_like(top)], 1),
        "column_end": np.stack([end[:, 0] - top, shown[:, 1]], 1),
    }
    result: dict[str, NDArray[Any]] = {name: values.astype(np.float32) for name, values in windows.items()}
    if geometry.can_pad:
        result["start"] = np.minimum(offset, 0).astype(np.int32)
    return result
