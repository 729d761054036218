"""Decoded images of any size to pixels of the models' sizes, on the decoder's threads: what follows DALI on a CPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from vitscore.decode.pixels import AnyGeometry
from vitscore.decode.threads import Threads
from vitscore.decode.torchvision import blank_pixels, render_alike

_TOGETHER_PIXELS = 64 * 64 * 64
"""So many are resized in one call: 64 images of 64 x 64; larger ones gain nothing."""

_HERE_BYTES = 1 << 20
"""A batch of less, decoded and resized, is resized at once: 0.3 ms, where two threads that compete with the forward for
the cores and for the interpreter are waited for longer (16,500 images/s instead of 15,700, demo-vit, 8 x 8)."""


def resize_all(
    images_HWC: Sequence[torch.Tensor], geometries: Sequence[AnyGeometry], threads: Threads
) -> list[torch.Tensor]:
    """Resize images for each geometry, on the threads where that pays; torch's kernels run side by side there.

    Small images of one size go together; a row's pixels are the same bits whichever rows it goes with.
    """
    pixels = [blank_pixels(geometry, len(images_HWC)) for geometry in geometries]
    # Rows are copied by numpy: torch would start a team of threads in each of ours for a copy of 150 KB.
    arrays = [batch.numpy() for batch in pixels]
    groups = list(alike(images_HWC, at_least=threads.count))

    def work(first: int) -> None:
        for rows in groups[first :: threads.count]:
            images = [images_HWC[row] for row in rows]
            for array, geometry in zip(arrays, geometries, strict=True):
                array[rows] = render_alike(images, geometry)

    if sum(each.size for each in arrays) + sum(each.numel() for each in images_HWC) < _HERE_BYTES:
        for first in range(threads.count):
            work(first)
    else:
        threads.share(work)
    return pixels


def alike(images_HWC: Sequence[torch.Tensor], *, at_least: int) -> Iterator[list[int]]:
    """Rows of equal size in groups of few pixels, where there are enough of a size in at least so many groups."""
    by_size: dict[torch.Size, list[int]] = {}
    for row, image_HWC in enumerate(images_HWC):
        by_size.setdefault(image_HWC.shape, []).append(row)
    for (height, width, _), rows in by_size.items():
        most = min(_TOGETHER_PIXELS // (height * width), -(-len(rows) // at_least))
        for start in range(0, len(rows), max(1, most)):
            yield rows[start : start + max(1, most)]
