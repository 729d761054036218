"""The torchvision decoder: Pillow decodes, torchvision resizes; for machines without DALI, and for images DALI leaves.

Pillow reads the first frame of an image, turns it upright and converts it to RGB, as transformers' `load_image` does.
torchvision resizes and crops it with the calls that transformers' processors make. This is transformers' own path,
image by image, on a pool of threads. `dali` sends images here that DALI cannot decode or renders differently.
"""

from __future__ import annotations

import math
import re
import warnings
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tvF

from vitscore.decode.counts import DecodedAgain
from vitscore.decode.image_header import ImageHeader, read_header
from vitscore.decode.native_stderr import NativeStderr
from vitscore.decode.pixels import MAX_PIXELS, AnyGeometry, BadImage, Decoded, EncodedImage, too_large
from vitscore.preprocess import Geometry, Interpolation, run_processor
from vitscore.shards.reasons import EMPTY_IMAGE, IMAGE_TOO_LARGE, TRUNCATED_IMAGE, UNDECODABLE_IMAGE

_MODES = {
    "nearest": InterpolationMode.NEAREST_EXACT,
    "bilinear": InterpolationMode.BILINEAR,
    "bicubic": InterpolationMode.BICUBIC,
    "lanczos": InterpolationMode.LANCZOS,
}
_PILLOW_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
# If a resized image would have more pixels, only the part that the crop shows is computed (a 10 x 40,000 image would
# otherwise take 600 MB on its way to 224 x 224).
_MAX_RESIZED_PIXELS = 1 << 24


# Pillow warns of images over half its own limit, and of transparency in palettes. The size is checked here, and
# transformers drops transparency as well. The filter is permanent because `catch_warnings` is not thread-safe.
warnings.filterwarnings("ignore", module=r"PIL\.")


@dataclass(frozen=True, eq=False)
class Opened:
    """A decoded image, uint8 (H, W, 3): as stored, and with its transparent colour, if it declares one, made white."""

    rgb_HWC: torch.Tensor
    whitened_HWC: torch.Tensor

    def render(self, geometry: AnyGeometry) -> torch.Tensor:
        return render(self.whitened_HWC if geometry.whitens else self.rgb_HWC, geometry)


def open_image(image: EncodedImage, *, max_pixels: int = MAX_PIXELS) -> Opened:
    """Decode the first frame of an image with Pillow, upright and in RGB.

    Raises:
        BadImage: the bytes are not an image, are damaged or cut, or declare more than `max_pixels`.
    """
    if not len(image):
        raise BadImage(EMPTY_IMAGE)
    header = read_header(image)
    if header.width * header.height > max_pixels:
        raise too_large(header.width, header.height, max_pixels=max_pixels)
    if header.format == "png" and header.is_cut:
        raise BadImage(f"{TRUNCATED_IMAGE}: png")  # Pillow accepts a PNG that lacks only its last chunk
    try:
        with Image.open(BytesIO(image.data)) as opened:
            if opened.width * opened.height > max_pixels:
                raise too_large(opened.width, opened.height, max_pixels=max_pixels)
            return _opened(_upright_rgb(opened))
    except BadImage:
        raise
    except Exception as failure:  # decoders raise errors of any type on damaged bytes
        raise BadImage(_reason(failure, header=header)) from None


def render(rgb_HWC: torch.Tensor, geometry: AnyGeometry) -> torch.Tensor:
    """Resize and crop as transformers' processors do; return uint8 (H, W, 3), or a processor's float32 (3, H, W).

    torchvision gets the image as a channels-last view, for which torch has a dedicated kernel. It gives the same bits
    as for the planes that the processors use, in a fifth of the time (400 x 500 to 224 x 280, bicubic: 0.47 ms against
    2.3 ms; DALI: 2.5 ms).
    """
    if not isinstance(geometry, Geometry):
        pixel_values: torch.Tensor = run_processor(geometry.processor, Image.fromarray(rgb_HWC.numpy()))
        return pixel_values
    height, width = geometry.resized_size(rgb_HWC.shape[0], rgb_HWC.shape[1])
    if height * width > _MAX_RESIZED_PIXELS and geometry.crop is not None:
        return _render_crop(Image.fromarray(rgb_HWC.numpy()), geometry, height, width)
    return _resize_and_crop(rgb_HWC, geometry)


def render_alike(images_HWC: Sequence[torch.Tensor], geometry: AnyGeometry) -> NDArray[Any]:
    """Render images of one size together, with the bits of `render`: (B, H, W, 3), or a processor's (B, 3, H, W).

    A call to torchvision takes longer than the work on a small image: 8 x 8 to 32 x 32 takes 24 us by itself, and 2 us
    as one of 64.
    """
    height, width = images_HWC[0].shape[:2]
    if not isinstance(geometry, Geometry) or math.prod(geometry.resized_size(height, width)) > _MAX_RESIZED_PIXELS:
        return np.stack([render(image, geometry).numpy() for image in images_HWC])
    if len(images_HWC) == 1:
        return _resize_and_crop(images_HWC[0], geometry).numpy()[None]
    return _resize_and_crop(torch.from_numpy(np.stack([image.numpy() for image in images_HWC])), geometry).numpy()


def _resize_and_crop(rgb: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    """Resize and crop one image (H, W, 3), or several (B, H, W, 3)."""
    height, width = geometry.resized_size(rgb.shape[-3], rgb.shape[-2])
    if geometry.resize != "none":
        resize = _resized if _resizes_tensors(geometry.interpolation) else _resized_by_pillow
        rgb = resize(rgb, height, width, geometry.interpolation)
    pixels = rgb.movedim(-1, -3)
    if geometry.crop is not None:
        top, left = geometry.crop_offset(height, width)
        pixels = tvF.crop(pixels, top, left, geometry.height, geometry.width)
    return pixels.movedim(-3, -1)


def _resized(rgb: torch.Tensor, height: int, width: int, interpolation: Interpolation) -> torch.Tensor:
    pixels = rgb.movedim(-1, -3)
    resized: torch.Tensor = tvF.resize(pixels, [height, width], interpolation=_MODES[interpolation], antialias=True)
    return resized.movedim(-3, -1)


def _resized_by_pillow(rgb: torch.Tensor, height: int, width: int, interpolation: Interpolation) -> torch.Tensor:
    images = rgb.reshape(-1, *rgb.shape[-3:]).numpy()
    kind = _PILLOW_FILTERS[interpolation]
    resized = np.stack([np.asarray(Image.fromarray(image).resize((width, height), kind)) for image in images])
    return torch.from_numpy(resized).reshape(*rgb.shape[:-3], height, width, 3)


@cache
def _resizes_tensors(interpolation: Interpolation) -> bool:
    """Return whether torchvision resizes tensors with this filter: lanczos requires 0.27."""
    try:
        _resized(torch.zeros((8, 8, 3), dtype=torch.uint8), 4, 4, interpolation)
    except NotImplementedError:
        return False
    return True


def blank_pixels(geometry: AnyGeometry, num_rows: int, *, device: torch.device | None = None) -> torch.Tensor:
    """Return zeros in the shape of a batch of this geometry."""
    if isinstance(geometry, Geometry):
        return torch.zeros((num_rows, geometry.height, geometry.width, 3), dtype=torch.uint8, device=device)
    return torch.zeros((num_rows, 3, geometry.height, geometry.width), dtype=torch.float32, device=device)


class TorchvisionDecoder:
    """A `Decoder` on a pool of threads, each decoding one image at a time."""

    depth = 2

    def __init__(
        self,
        geometries: Sequence[AnyGeometry],
        *,
        batch_size: int,
        num_threads: int,
        device_id: int | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self._geometries = tuple(geometries)
        self._batch_size = batch_size
        self._max_pixels = max_pixels
        self._device = None if device_id is None else torch.device("cuda", device_id)
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="decode")
        self._stderr = NativeStderr()  # for the messages of Pillow's libtiff
        self._batches: deque[list[Future[list[torch.Tensor]]]] = deque()
        self.again = DecodedAgain()

    def submit(self, images: Sequence[EncodedImage]) -> None:
        if not 0 < len(images) <= self._batch_size:
            raise ValueError(f"a batch of {len(images)} images, but the decoder was made for 1 to {self._batch_size}")
        self._batches.append([self._pool.submit(self._decode, image) for image in images])

    def collect(self) -> Decoded:
        rows = self._batches.popleft()
        pixels = [blank_pixels(geometry, len(rows)) for geometry in self._geometries]
        faults: dict[int, str] = {}
        for row, future in enumerate(rows):
            try:
                for batch, one in zip(pixels, future.result(), strict=True):
                    batch[row] = one
            except BadImage as bad:
                faults[row] = str(bad)
        if self._device is not None:
            # Pinned memory may be released here: torch's allocator records an event per copy, and reuses the memory
            # only when the copies are done.
            pixels = [batch.pin_memory().to(self._device, non_blocking=True) for batch in pixels]
        return Decoded(tuple(pixels), faults)

    def close(self) -> None:
        self._batches.clear()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._stderr.close()

    def _decode(self, image: EncodedImage) -> list[torch.Tensor]:
        opened = open_image(image, max_pixels=self._max_pixels)
        return [opened.render(geometry) for geometry in self._geometries]


def _upright_rgb(opened: Image.Image) -> Image.Image:
    opened.load()
    if opened.mode.startswith("I;16"):
        # Pillow's conversion clips 16-bit values at 255; exact scaling maps 65,535 to 255.
        opened = _with_exif_of(opened, Image.fromarray(np.rint(np.asarray(opened) / 257.0).astype(np.uint8)))
    return ImageOps.exif_transpose(opened).convert("RGB")


def _opened(rgb: Image.Image) -> Opened:
    pixels = np.array(rgb)
    key = rgb.info.get("transparency")
    whitened = pixels
    if isinstance(key, tuple) and len(key) == 3:
        whitened = np.where((pixels == np.array(key)).all(axis=2, keepdims=True), np.uint8(255), pixels)
    return Opened(torch.from_numpy(pixels), torch.from_numpy(whitened))


def _with_exif_of(opened: Image.Image, scaled: Image.Image) -> Image.Image:
    scaled.info.update(opened.info)
    scaled.getexif()[0x0112] = opened.getexif().get(0x0112, 1)
    return scaled


def _render_crop(rgb: Image.Image, geometry: Geometry, height: int, width: int) -> torch.Tensor:
    """Resize and crop in one step, computing only the pixels of the crop (within one level of torchvision's)."""
    top, left = geometry.crop_offset(height, width)
    shown = min(geometry.height, height), min(geometry.width, width)
    start = max(top, 0), max(left, 0)
    rows, columns = rgb.height / height, rgb.width / width
    box = (start[1] * columns, start[0] * rows, (start[1] + shown[1]) * columns, (start[0] + shown[0]) * rows)
    box = (box[0], box[1], min(box[2], rgb.width), min(box[3], rgb.height))
    part = rgb.resize((shown[1], shown[0]), _PILLOW_FILTERS[geometry.interpolation], box=box)
    pixels = torch.zeros((geometry.height, geometry.width, 3), dtype=torch.uint8)
    pixels[max(-top, 0) :, max(-left, 0) :][: shown[0], : shown[1]] = torch.from_numpy(np.array(part))
    return pixels


def _reason(failure: Exception, *, header: ImageHeader) -> str:
    if isinstance(failure, Image.DecompressionBombError):
        return f"{IMAGE_TOO_LARGE}: more than Pillow's own limit of {2 * (Image.MAX_IMAGE_PIXELS or 0)} pixels"
    text = str(failure) or type(failure).__name__
    if header.is_cut or "truncated" in text:
        return TRUNCATED_IMAGE if header.format == "other" else f"{TRUNCATED_IMAGE}: {header.format}"
    if isinstance(failure, UnidentifiedImageError):
        what = "no known image format" if header.format == "other" else f"damaged {header.format}"
        return f"{UNDECODABLE_IMAGE}: {what}"
    # The reason must be one line and the same on every run, so addresses and paths are removed.
    text = re.sub(r"<[^>]*>|0x[0-9a-fA-F]+|\S*/\S+", "", text)
    return f"{UNDECODABLE_IMAGE}: {' '.join(text.split())[:80]}"
