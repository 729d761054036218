"""Preprocessing of a checkpoint's images: its processor, converted to a small spec.

Between checkpoints and decoding: a `Spec` holds the geometry (resize, crop), which the decoders apply to bytes, and the
arithmetic (scale, mean, std), which is the model's first step on the device. Models with the same geometry share their
pixels. Sizes and offsets match transformers' processors to the pixel: the long side and the offset of the crop are
truncated, not rounded. If releases of transformers differ (transparency, lanczos), the processor is run on a trial
image.

For a processor that no spec can express, `spec_from_processor` raises `Inexpressible`, and `processor_geometry` wraps
the processor to be run as it is. This module neither decodes nor resizes images.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

Resize = Literal["none", "exact", "shortest_edge"]
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]

# Pillow's numbers for its filters, as the processors' configurations use them; DALI has neither box nor hamming.
_FILTERS: dict[int, Interpolation] = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}

# The methods of a processor that must be transformers' own for a spec to describe it.
_STEPS = (
    "preprocess",
    "_preprocess_image_like_inputs",
    "_prepare_image_like_inputs",
    "process_image",
    "convert_to_rgb",
    "_preprocess",
    "resize",
    "center_crop",
    "rescale",
    "normalize",
    "rescale_and_normalize",
    "_fuse_mean_std_and_rescale_factor",
)
# Processors of transformers that replace some of those methods and can still be described: the first two only add
# segmentation maps, and the other two have a different rule for the size of the resize (`_resize_of`).
_SAME_FOR_IMAGES = ("BeitImageProcessor", "MobileNetV2ImageProcessor")
_OWN_SIZE = ("ConvNextImageProcessor", "LevitImageProcessor")

_TRIAL_COLOUR = (90, 120, 150)


class Inexpressible(Exception):
    """A `Spec` cannot express the processor; the message names the obstacle."""


@dataclass(frozen=True)
class Geometry:
    """The resize and crop that turn a decoded RGB image into (height, width) pixels.

    Args:
        resize: "none", "exact" (to `size`, ignoring the aspect ratio) or "shortest_edge" (to `size[0]`, keeping it).
        size: (height, width) of the resize; (edge, edge) for "shortest_edge"; (0, 0) for "none".
        interpolation: the filter of the resize, antialiased.
        crop: (height, width) of the central crop, padded with zeros if it exceeds the image; None for no crop.
        whitens: whether an image's transparent colour (GIF, PNG with a colour key) becomes white, as in some processors
            that convert to RGB, or keeps its colour, as in the others.
    """

    resize: Resize
    size: tuple[int, int]
    interpolation: Interpolation
    crop: tuple[int, int] | None = None
    whitens: bool = False

    @property
    def height(self) -> int:
        return (self.crop or self.size)[0]

    @property
    def width(self) -> int:
        return (self.crop or self.size)[1]

    @property
    def can_pad(self) -> bool:
        """Whether an image can be smaller than the crop after the resize."""
        return self.crop is not None and (
            self.resize == "none" or self.crop[0] > self.size[0] or self.crop[1] > self.size[1]
        )

    def resized_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the (height, width) of an image after the resize."""
        if self.resize == "none":
            return height, width
        if self.resize == "exact":
            return self.size
        edge = self.size[0]
        if width <= height:
            return int(edge * height / width), edge
        return edge, int(edge * width / height)

    def crop_offset(self, height: int, width: int) -> tuple[int, int]:
        """Return the (top, left) corner of the crop in a resized image; negative if the crop begins with padding."""
        if self.crop is None:
            return 0, 0
        return _offset(height, self.crop[0]), _offset(width, self.crop[1])


def _offset(side: int, crop: int) -> int:
    return -((crop - side) // 2) if crop > side else (side - crop) // 2


@dataclass(frozen=True)
class Spec:
    """The preprocessing of a model: its geometry, then `(bytes * scale - mean) / std`."""

    geometry: Geometry
    scale: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


@dataclass(frozen=True, eq=False)
class ProcessorGeometry:
    """A processor that is run as it is; its float32 `pixel_values` (3, height, width) are the model's input."""

    processor: Any
    height: int
    width: int
    whitens: bool
    """As in `Geometry`."""


def spec_from_processor(processor: Any) -> Spec:
    """Convert a checkpoint's processor to a spec.

    Args:
        processor: the result of `AutoImageProcessor` or `AutoProcessor`.

    Raises:
        Inexpressible: the processor has other steps than resize, crop, rescale and normalise.
    """
    processor = getattr(processor, "image_processor", processor)
    backend = _backend_of(processor)
    if getattr(processor, "do_pad", None):
        raise Inexpressible("it pads its images")
    geometry = _geometry_of(processor)
    if geometry.can_pad and backend == "PilBackend":
        raise Inexpressible("its crop is larger than its image, which Pillow-backed processors centre differently")
    scale = float(processor.rescale_factor) if processor.do_rescale else 1.0
    mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else (0.0, 1.0)
    channels = _per_channel(mean), _per_channel(std)
    return Spec(_as_carried_out(processor, geometry), scale, *channels)


def processor_geometry(processor: Any) -> ProcessorGeometry:
    """Wrap a processor that no spec can express; its output size and `whitens` are measured on trial images.

    Raises:
        Inexpressible: the sizes differ from image to image, so the images cannot be batched.
    """
    processor = getattr(processor, "image_processor", processor)
    sizes = {tuple(run_processor(processor, _trial_image(*size)).shape) for size in ((96, 64), (40, 120))}
    shape = sizes.pop()
    if sizes or len(shape) != 3 or shape[0] != 3:
        raise Inexpressible("its images differ in size or do not have three channels, so they cannot be batched")
    return ProcessorGeometry(processor=processor, height=shape[1], width=shape[2], whitens=_whitens(processor))


def interpolation_of(processor: Any) -> Interpolation:
    """Return the filter that a processor's configuration names.

    Raises:
        Inexpressible: the decoders do not have this filter.
    """
    processor = getattr(processor, "image_processor", processor)
    resample = processor.resample if processor.resample is not None else 2
    if not isinstance(resample, int):  # one of torchvision's names
        resample = {"nearest-exact": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}.get(
            getattr(resample, "value", ""), -1
        )
    if int(resample) not in _FILTERS:
        raise Inexpressible("its resampling filter is neither nearest, bilinear, bicubic nor lanczos")
    return _FILTERS[int(resample)]


def run_processor(processor: Any, image: Any, **options: Any) -> Any:
    """Run a processor on one RGB Pillow image and return its pixel values, float32 (3, H, W)."""
    pixel_values = processor(images=image, return_tensors="pt", **options)["pixel_values"]
    return pixel_values[0].float()


def _trial_image(width: int, height: int) -> Any:
    from PIL import Image

    return Image.new("RGB", (width, height), _TRIAL_COLOUR)


def _as_carried_out(processor: Any, geometry: Geometry) -> Geometry:
    """Complete a geometry with what depends on the release of transformers: transparency, and lanczos.

    torchvision resizes tensors with lanczos since 0.27; before that, processors that resize tensors replace it by
    bicubic.
    """
    if geometry.interpolation == "lanczos" and geometry.resize != "none" and not _has_lanczos(processor, geometry):
        geometry = replace(geometry, interpolation="bicubic")
    return replace(geometry, whitens=_whitens(processor))


def _whitens(processor: Any) -> bool:
    """Return whether a processor makes a transparent colour white.

    The processors of transformers 5.23 do so if they convert to RGB; those of 5.17 do not.
    """
    plain, keyed = _trial_image(96, 64), _trial_image(96, 64)
    keyed.info["transparency"] = _TRIAL_COLOUR
    return not run_processor(processor, plain).equal(run_processor(processor, keyed))


def _has_lanczos(processor: Any, geometry: Geometry) -> bool:
    """Return whether a processor's lanczos differs from its bicubic."""
    height, width = geometry.size
    image = _trial_image(2 * width, 2 * height)
    image.paste((190, 60, 120), (width, 0, 2 * width, 2 * height))
    by_lanczos, by_bicubic = (run_processor(processor, image, resample=resample) for resample in (1, 3))
    return not by_lanczos.equal(by_bicubic)


def _backend_of(processor: Any) -> str:
    from transformers import image_processing_backends as backends

    for name in ("TorchvisionBackend", "PilBackend"):
        backend = getattr(backends, name, None)
        if backend is None or not isinstance(processor, backend):
            continue
        kind = type(processor)
        is_known = kind.__module__.startswith("transformers.") and kind.__name__ in (*_SAME_FOR_IMAGES, *_OWN_SIZE)
        changed = [step for step in _STEPS if getattr(kind, step, None) is not getattr(backend, step, None)]
        if changed and not is_known:
            raise Inexpressible(f"{kind.__name__} has its own {changed[0].strip('_')} step")
        return name
    raise Inexpressible(f"{type(processor).__name__} is not built on transformers' image processor backends")


def _geometry_of(processor: Any) -> Geometry:
    resize, size, crop = _resize_of(processor)
    if processor.do_center_crop:
        if not (processor.crop_size and processor.crop_size.height and processor.crop_size.width):
            raise Inexpressible("its crop has no height and width")
        if crop is not None:
            raise Inexpressible("it crops twice")
        crop = (int(processor.crop_size.height), int(processor.crop_size.width))
    if crop is None and resize != "exact":
        raise Inexpressible("its images keep different sizes, so they cannot be batched")
    return Geometry(resize=resize, size=size, interpolation=interpolation_of(processor), crop=crop)


def _resize_of(processor: Any) -> tuple[Resize, tuple[int, int], tuple[int, int] | None]:
    """Return the kind and the size of the resize, and the crop that belongs to it (ConvNeXt only)."""
    if not processor.do_resize:
        return "none", (0, 0), None
    size, kind = processor.size, type(processor).__name__
    if size.shortest_edge and not (size.longest_edge or size.height):
        edge = int(size.shortest_edge)
        if kind == "LevitImageProcessor":
            edge = int((256 / 224) * edge)
        elif kind == "ConvNextImageProcessor":
            if edge >= 384:
                return "exact", (edge, edge), None
            larger = int(edge / processor.crop_pct)
            return "shortest_edge", (larger, larger), (edge, edge)
        return "shortest_edge", (edge, edge), None
    if size.height and size.width and kind != "ConvNextImageProcessor":
        return "exact", (int(size.height), int(size.width)), None
    raise Inexpressible("its size is neither height and width nor a shortest edge")


def _per_channel(values: Any) -> tuple[float, float, float]:
    listed = [float(values)] * 3 if isinstance(values, (int, float)) else [float(value) for value in values]
    if len(listed) == 1:
        listed *= 3
    if len(listed) != 3:
        raise Inexpressible(f"it normalises {len(listed)} channels")
    return listed[0], listed[1], listed[2]
