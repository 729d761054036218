"""Resize decoded images to the models' sizes on the decoder's threads: the step after DALI on a CPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from vitscore.decode.pixels import AnyGeometry
from vitscore.decode.threads import Threads
from vitscore.decode.torchvision import blank_pixels, render_alike

_TOGETHER_PIXELS = 64 * 64 * 64
"""The largest number of pixels to resize in one call: 64 images of 64 x 64; larger images gain nothing."""

_HERE_BYTES = 1 << 20
"""Batches below this size, decoded plus resized, are resized on the calling thread. It takes 0.3 ms; waiting for two
threads that compete with the forward for cores and interpreter takes longer (demo-vit, 8 x 8: 16,500 images/s instead
of 15,700)."""


def resize_all(
    images_HWC: Sequence[torch.Tensor], geometries: Sequence[AnyGeometry], threads: Threads
) -> list[torch.Tensor]:
    """Resize images for each geometry, on the threads if the batch is large enough; torch's kernels run in parallel.

    Small images of one size are resized together; the grouping does not change a bit of any row's pixels.
    """
    pixels = [blank_pixels(geometry, len(images_HWC)) for geometry in geometries]
    # NumPy copies the rows: torch would start a team of threads in each of the decoder's threads to copy 150 KB.
    arrays = [batch.numpy() for batch in pixels]
    groups = list(groups_of_one_size(images_HWC, at_least=threads.count))

    def work(first: int) -> None:
        for rows in groups[first :: threads.count]:
            images = [images_HWC[row] for row in rows]
            for array, geometry in zip(arrays, geometries, strict=True):
                array[rows] = render_alike(images, geometry)

    if sum(array.size for array in arrays) + sum(image.numel() for image in images_HWC) < _HERE_BYTES:
        for first in range(threads.count):
            work(first)
    else:
        threads.share(work)
    return pixels


def groups_of_one_size(images_HWC: Sequence[torch.Tensor], *, at_least: int) -> Iterator[list[int]]:
    """Group rows whose images have the same size, with a limited number of pixels per group.

    Args:
        images_HWC: the images of the rows.
        at_least: the number of groups to make of the rows of one size, if there are enough of them.
    """
    by_size: dict[torch.Size, list[int]] = {}
    for row, image_HWC in enumerate(images_HWC):
        by_size.setdefault(image_HWC.shape, []).append(row)
    for (height, width, _), rows in by_size.items():
        most = min(_TOGETHER_PIXELS // (height * width), -(-len(rows) // at_least))
        for start in range(0, len(rows), max(1, most)):
            yield rows[start : start + max(1, most)]
