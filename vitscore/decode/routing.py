"""Which of two decoders takes an image: DALI what it renders as Pillow does, Pillow the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vitscore.decode.dali_pipeline import is_beyond_dali
from vitscore.decode.image_header import ImageHeader
from vitscore.decode.pixels import AnyGeometry, EncodedImage
from vitscore.decode.torchvision import open_image
from vitscore.preprocess import Geometry


@dataclass(frozen=True)
class Routing:
    """The choice for each image, by its header."""

    geometries: tuple[AnyGeometry, ...]
    max_pixels: int
    is_gpu: bool
    resizes: bool
    """Whether the graph resizes; then a geometry that is a processor of its own is run on Pillow's pixels instead."""

    @property
    def served(self) -> list[int]:
        """The geometries that DALI's rows get."""
        return [i for i, each in enumerate(self.geometries) if isinstance(each, Geometry) or not self.resizes]

    @property
    def in_graph(self) -> tuple[Geometry, ...]:
        return tuple(each for each in self.geometries if isinstance(each, Geometry)) if self.resizes else ()

    def left_to_pillow(self, header: ImageHeader) -> list[int]:
        """The geometries that Pillow renders; where these are all of them, DALI does not get the image."""
        everything = list(range(len(self.geometries)))
        if not self._is_for_dali(header):
            return everything
        return [index for index in everything if not self._is_served(index, header)]

    def render(self, image: EncodedImage, wanted: Sequence[int]) -> list[torch.Tensor]:
        """An image by Pillow, for some of the geometries."""
        opened = open_image(image, max_pixels=self.max_pixels)
        return [opened.render(self.geometries[index]) for index in wanted]

    def _is_served(self, index: int, header: ImageHeader) -> bool:
        geometry = self.geometries[index]
        if header.has_key and geometry.whitens:
            return False  # DALI drops the key
        if not self.resizes:
            return True
        return isinstance(geometry, Geometry) and not is_beyond_dali(geometry, header.upright_size)

    def _is_for_dali(self, header: ImageHeader) -> bool:
        """Whether DALI decodes this image, and to what Pillow makes of it."""
        if not (header.is_plain and header.is_whole and header.width and header.height):
            return False
        if header.format == "jpeg":
            return not (self.is_gpu and header.channels == 4)  # nvJPEG is not known to undo Adobe's inverted CMYK
        # In other formats few decoders look for an orientation.
        return header.orientation == 1
