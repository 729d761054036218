"""Choose the decoder of an image: DALI if it renders the image as Pillow does, else Pillow."""

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
    """The choice of a decoder for each image, by its header."""

    geometries: tuple[AnyGeometry, ...]
    max_pixels: int
    is_gpu: bool
    resizes: bool
    """Whether the graph resizes; a `ProcessorGeometry` then runs on Pillow's pixels."""

    @property
    def served(self) -> list[int]:
        """The geometries that are rendered from DALI's images, by index."""
        geometries = enumerate(self.geometries)
        return [index for index, geometry in geometries if isinstance(geometry, Geometry) or not self.resizes]

    @property
    def in_graph(self) -> tuple[Geometry, ...]:
        """The geometries that the graph resizes for."""
        if not self.resizes:
            return ()
        return tuple(geometry for geometry in self.geometries if isinstance(geometry, Geometry))

    def left_to_pillow(self, header: ImageHeader) -> list[int]:
        """Return the geometries that Pillow renders, by index; if these are all, DALI does not get the image."""
        everything = list(range(len(self.geometries)))
        if not self._is_for_dali(header):
            return everything
        return [index for index in everything if not self._is_served(index, header)]

    def render(self, image: EncodedImage, wanted: Sequence[int]) -> list[torch.Tensor]:
        """Decode an image with Pillow and render it for some of the geometries."""
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
        """Return whether DALI decodes this image, and to the same pixels as Pillow."""
        if not (header.is_plain and header.is_whole and header.width and header.height):
            return False
        if header.format == "jpeg":
            return not (self.is_gpu and header.channels == 4)  # nvJPEG is not known to undo Adobe's inverted CMYK
        # Few decoders apply an orientation in other formats.
        return header.orientation == 1
