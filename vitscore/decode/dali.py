"""Decoding with DALI: one pipeline for CPU and GPU, fed with the bytes of samples.

For each image the header is read on the host; it tells whether DALI decodes the image, or Pillow (`decode_torchvision`,
on a few threads meanwhile, patched into its row). `depth` batches are under way at a time. On a GPU the resizes are
part of the pipeline (`dali_graph`). On a CPU the pipeline ends with the decoded images, and torchvision resizes them: a
fifth of the time that DALI's CPU resize takes, and the very bits of transformers' processors.

One undecodable image fails all that goes through DALI with it. That is decoded once more, every image alone, through
pipelines of the same definition; the others' pixels are the same bits as in any other batch. On a CPU those pipelines
take one image at a time and run side by side, one a thread: each image is decoded once more and never twice (64 photos:
33 ms against the batch's 25; 64 small digits: 6 ms against 1), and the batches that follow go through DALI in pieces,
of which a bad image fails only its own. On a GPU a batch of one costs nearly as much as a batch of many, so a failed
batch is halved there until the bad image stands alone. What fails alone is left to Pillow.

What DALI decodes is scored. Damage that both its decoder and a look from outside let pass (a few flipped bits in a
JPEG's coded pixels, which libjpeg reports as a warning or not at all) is an image, though a damaged one; whatever shows
its end missing, by either decoder, is not.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch

from vitscore.decode.dali_pipeline import DaliPipeline, Failed, Misplaced, Sizes, is_beyond_dali
from vitscore.decode.image_header import ImageHeader, read_header
from vitscore.decode.make import (
    HW_DECODER_LOAD,
    MAX_PIXELS,
    AnyGeometry,
    BadImage,
    Decoded,
    EncodedImage,
    too_large,
)
from vitscore.decode.native_stderr import NativeStderr
from vitscore.decode.torchvision import blank_pixels, open_image, render_alike
from vitscore.preprocess import Geometry

_TOGETHER_PIXELS = 64 * 64 * 64
"""So many are resized in one call: 64 images of 64 x 64; larger ones gain nothing."""

_HERE_BYTES = 1 << 20
"""A batch of less, decoded and resized, is resized at once: 0.3 ms, where two threads that compete with the forward for
the cores and for the interpreter are waited for longer (16,500 images/s instead of 15,700, demo-vit, 8 x 8)."""

# After a failure on a CPU the next batches go through DALI in pieces, since bad images seldom come alone: a piece is
# closed once it holds this many images, and this many pixels (16 photographs; small images cost less than the calls).
# Batches of 128 photographs, 1 in 100 bad, take 1.2 times the CPU time of clean ones, whole batches twice. A batch in
# pieces takes 4% more than a whole one: 20 clean ones lose what pieces save on a bad one.
_PIECE_IMAGES = 16
_PIECE_PIXELS = 1 << 21
_WARY_BATCHES = 20


@dataclass(frozen=True)
class _Piece:
    """What goes through DALI at once: some of a batch's rows, by their positions in `_Batch.rows`."""

    serial: int
    positions: range


@dataclass(eq=False)
class _Batch:
    """One submitted batch: what DALI decodes of it, and what the threads do."""

    images: Sequence[EncodedImage]
    pieces: deque[_Piece] = field(default_factory=deque)
    """What of it DALI has not answered yet."""
    rows: list[int] = field(default_factory=list)
    """The rows that DALI decodes."""
    sizes: list[tuple[int, int]] = field(default_factory=list)
    """For each of those, the upright (height, width) that its header declares."""
    faults: dict[int, str] = field(default_factory=dict)
    patches: dict[int, tuple[Sequence[int], Future[list[torch.Tensor]]]] = field(default_factory=dict)
    """Row to the geometries that are rendered outside DALI, and their pixels to come."""


@dataclass(frozen=True, eq=False)
class _Found:
    """What DALI made of some positions: upright sizes; a tensor for each geometry, or without any for each image."""

    positions: Sequence[int]
    sizes: Sizes
    tensors: list[torch.Tensor]


@dataclass(eq=False)
class _Part:
    """The pixels of some rows, a tensor for each geometry that DALI serves."""

    rows: list[int]
    pixels: list[torch.Tensor]


class DaliDecoder:
    """A `Decoder` on a DALI pipeline.

    Args:
        resize_in_dali: whether the pipeline resizes too; by default on a GPU only.
        (the others: see `make_decoder`)
    """

    depth = 3

    def __init__(
        self,
        geometries: Sequence[AnyGeometry],
        *,
        batch_size: int,
        num_threads: int,
        device_id: int | None = None,
        max_pixels: int = MAX_PIXELS,
        hw_decoder_load: float = HW_DECODER_LOAD,
        resize_in_dali: bool | None = None,
    ) -> None:
        self._geometries = tuple(geometries)
        self._batch_size = batch_size
        self._max_pixels = max_pixels
        self._device = None if device_id is None else torch.device("cuda", device_id)
        self._resizes = device_id is not None if resize_in_dali is None else resize_in_dali
        # The geometries that DALI's rows get; on a GPU a processor of its own is run on Pillow's pixels instead.
        self._served = [i for i, each in enumerate(geometries) if isinstance(each, Geometry) or not self._resizes]
        in_graph = tuple(each for each in geometries if isinstance(each, Geometry)) if self._resizes else ()
        self._smallest_piece = batch_size if self._resizes else min(batch_size, max(_PIECE_IMAGES, 4 * num_threads))
        self._options: dict[str, Any] = {
            "geometries": in_graph,
            "batch_size": batch_size,
            "num_threads": num_threads,
            "device_id": device_id,
            "depth": self.depth * -(-batch_size // self._smallest_piece),
            "hw_decoder_load": hw_decoder_load,
        }
        self._batches: deque[_Batch] = deque()
        self._num_pieces = 0
        self._num_wary = 0
        """How many more batches are cut into pieces."""
        self._spare: DaliPipeline | None = None
        self._singles: list[DaliPipeline | None] = [None] * num_threads
        self.num_decoded_again = 0
        """Images given to DALI once more, because another image or they themselves had failed their batch."""
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="decode")
        self._num_threads = num_threads
        self._stderr = NativeStderr()
        try:
            self._pipeline = DaliPipeline(**self._options)
        except BaseException:
            self._stderr.close()
            raise

    def submit(self, images: Sequence[EncodedImage]) -> None:
        if not 0 < len(images) <= self._batch_size:
            raise ValueError(f"a batch of {len(images)} images, but the decoder was made for 1 to {self._batch_size}")
        if len(self._batches) == self.depth:
            raise ValueError(f"{self.depth} batches are under way; collect one first")
        batch = _Batch(images)
        for row, image in enumerate(images):
            self._route(batch, row, read_header(image))
        self._cut(batch)
        self._feed(batch)
        self._batches.append(batch)

    def collect(self) -> Decoded:
        batch = self._batches[0]
        parts = self._parts_of(batch) if batch.rows else []
        self._batches.popleft()
        return self._assemble(batch, parts)

    def close(self) -> None:
        self._batches.clear()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._spare = None
        self._singles.clear()
        self.__dict__.pop("_pipeline", None)  # DALI's threads end with its last reference
        self._stderr.close()

    def _route(self, batch: _Batch, row: int, header: ImageHeader) -> None:
        """Choose who decodes a row, and for which geometries."""
        if header.width * header.height > self._max_pixels:
            batch.faults[row] = str(too_large(header.width, header.height, max_pixels=self._max_pixels))
            return
        left = list(range(len(self._geometries)))
        if _is_for_dali(header, is_gpu=self._device is not None):
            left = [index for index in left if not self._is_served(index, header)]
            if len(left) < len(self._geometries):
                batch.rows.append(row)
                batch.sizes.append(header.upright_size)
        if left:
            self._patch(batch, row, left)

    def _is_served(self, index: int, header: ImageHeader) -> bool:
        geometry = self._geometries[index]
        if header.has_key and geometry.whitens:
            return False  # DALI drops the key
        if not self._resizes:
            return True
        return isinstance(geometry, Geometry) and not is_beyond_dali(geometry, header.upright_size)

    def _patch(self, batch: _Batch, row: int, wanted: Sequence[int]) -> None:
        batch.patches[row] = (wanted, self._pool.submit(self._render_by_pillow, batch.images[row], wanted))

    def _render_by_pillow(self, image: EncodedImage, wanted: Sequence[int]) -> list[torch.Tensor]:
        opened = open_image(image, max_pixels=self._max_pixels)
        return [opened.render(self._geometries[index]) for index in wanted]

    def _cut(self, batch: _Batch) -> None:
        """Cut DALI's rows into pieces: one, or after a failure several."""
        smallest = self._smallest_piece if self._num_wary else self._batch_size
        self._num_wary = max(self._num_wary - 1, 0)
        start = num_pixels = 0
        for stop, (height, width) in enumerate(batch.sizes, 1):
            num_pixels += height * width
            is_full = stop - start >= smallest and num_pixels >= _PIECE_PIXELS
            if is_full or stop == len(batch.sizes):
                self._num_pieces += 1
                batch.pieces.append(_Piece(self._num_pieces, range(start, stop)))
                start, num_pixels = stop, 0

    def _feed(self, batch: _Batch) -> None:
        for piece in batch.pieces:
            images = [batch.images[batch.rows[position]] for position in piece.positions]
            sizes = [batch.sizes[position] for position in piece.positions]
            self._pipeline.feed(images, sizes, serial=piece.serial)

    def _parts_of(self, batch: _Batch) -> list[_Part]:
        """The pixels of DALI's rows; in several parts where the graph resizes and an image failed the batch."""
        found: list[_Found] = []
        while batch.pieces:
            found += self._found_in(batch, batch.pieces[0])
            batch.pieces.popleft()
        if not self._resizes:
            found = [_joined(found)]  # so that the threads resize all of it at once
        return [self._part_of(batch, each) for each in found if each.positions]

    def _found_in(self, batch: _Batch, piece: _Piece) -> list[_Found]:
        """What DALI makes of a piece; what it makes of its images by themselves where one of them fails it."""
        for _ in range(2):
            try:
                return [_Found(piece.positions, *self._pipeline.outputs(piece.serial))]
            except Failed:
                break
            except Misplaced:
                # An error must not make a later piece answer for an earlier one. DALI 2.4 keeps its place after an
                # error; should a version not do so, everything under way is decoded anew.
                self._pipeline = DaliPipeline(**self._options)
                for waiting in self._batches:
                    self._feed(waiting)
        self._num_wary = _WARY_BATCHES
        if self._device is None:
            return self._decode_alone(batch, piece)
        return self._decode_halves(batch, piece.positions)

    def _decode_alone(self, batch: _Batch, piece: _Piece) -> list[_Found]:
        """Decode every image of a failed piece once more, by itself; leave those that fail to Pillow."""
        positions = piece.positions
        outputs: dict[int, tuple[Sizes, list[torch.Tensor]]] = {}

        def work(worker: int) -> None:
            for position in positions[worker :: self._num_threads]:
                serial = piece.serial * self._batch_size + position
                if (single := self._decode_single(batch, position, serial=serial, worker=worker)) is not None:
                    outputs[position] = single

        for done in [self._pool.submit(work, worker) for worker in range(self._num_threads)]:
            done.result()
        self.num_decoded_again += len(positions)
        for position in positions:
            if position not in outputs:
                self._patch(batch, batch.rows[position], range(len(self._geometries)))
        good = [position for position in positions if position in outputs]
        if not good:
            return []
        sizes = [size for position in good for size in outputs[position][0]]
        tensors = [outputs[position][1] for position in good]
        if self._resizes:
            return [_Found(good, sizes, [torch.cat(images_1HWC) for images_1HWC in zip(*tensors, strict=True)])]
        return [_Found(good, sizes, [image_HWC for images_HWC in tensors for image_HWC in images_HWC])]

    def _decode_single(
        self, batch: _Batch, position: int, *, serial: int, worker: int
    ) -> tuple[Sizes, list[torch.Tensor]] | None:
        """One image through this worker's own pipeline; None where it fails."""
        for _ in range(2):
            pipeline = self._singles[worker]
            if pipeline is None:
                pipeline = DaliPipeline(**{**self._options, "batch_size": 1, "num_threads": 1, "depth": 1})
                self._singles[worker] = pipeline
            pipeline.feed([batch.images[batch.rows[position]]], [batch.sizes[position]], serial=serial)
            try:
                return pipeline.outputs(serial)
            except Failed:
                return None
            except Misplaced:
                self._singles[worker] = None
        return None

    def _decode_halves(self, batch: _Batch, positions: Sequence[int]) -> list[_Found]:
        """Halve a failing group until what fails stands alone, and leave that to Pillow."""
        if len(positions) == 1:
            self._patch(batch, batch.rows[positions[0]], range(len(self._geometries)))
            return []
        middle = len(positions) // 2
        found: list[_Found] = []
        for half in (positions[:middle], positions[middle:]):
            outputs = self._decode_again(batch, half)
            found += self._decode_halves(batch, half) if outputs is None else [_Found(half, *outputs)]
        return found

    def _decode_again(self, batch: _Batch, positions: Sequence[int]) -> tuple[Sizes, list[torch.Tensor]] | None:
        for _ in range(2):
            self._spare = self._spare or DaliPipeline(**self._options)
            images = [batch.images[batch.rows[position]] for position in positions]
            self.num_decoded_again += len(images)
            self._spare.feed(images, [batch.sizes[position] for position in positions], serial=positions[0])
            try:
                return self._spare.outputs(positions[0])
            except Failed:
                return None
            except Misplaced:
                self._spare = None
        return None

    def _part_of(self, batch: _Batch, found: _Found) -> _Part:
        for position, size in zip(found.positions, found.sizes, strict=True):
            if size != batch.sizes[position]:
                # The header and DALI read the image differently; its crop was computed for another image.
                self._patch(batch, batch.rows[position], range(len(self._geometries)))
        pixels = found.tensors if self._resizes else self._resized(found.tensors)
        return _Part([batch.rows[position] for position in found.positions], pixels)

    def _resized(self, images_HWC: list[torch.Tensor]) -> list[torch.Tensor]:
        """Resize decoded images, on the threads where that pays, which torch's kernels leave free to run side by side.

        Small images of one size go together; a row's pixels are the same bits whichever rows it goes with.
        """
        pixels = [blank_pixels(geometry, len(images_HWC)) for geometry in self._geometries]
        # Rows are copied by numpy: torch would start a team of threads in each of ours for a copy of 150 KB.
        arrays = [batch.numpy() for batch in pixels]
        groups = list(alike(images_HWC, at_least=self._num_threads))

        def work(first: int) -> None:
            for rows in groups[first :: self._num_threads]:
                images = [images_HWC[row] for row in rows]
                for array, geometry in zip(arrays, self._geometries, strict=True):
                    array[rows] = render_alike(images, geometry)

        workers = range(self._num_threads)
        if sum(each.size for each in arrays) + sum(each.numel() for each in images_HWC) < _HERE_BYTES:
            for first in workers:
                work(first)
        else:
            for done in [self._pool.submit(work, first) for first in workers]:
                done.result()
        return pixels

    def _assemble(self, batch: _Batch, parts: list[_Part]) -> Decoded:
        num_rows = len(batch.images)
        is_clean = len(parts) == 1 and len(parts[0].rows) == num_rows and not batch.patches
        if is_clean and len(self._served) == len(self._geometries):
            return Decoded(tuple(parts[0].pixels), batch.faults)
        pixels = [blank_pixels(geometry, num_rows, device=self._device) for geometry in self._geometries]
        for part in parts:
            index = self._sent(torch.tensor(part.rows))
            for geometry, rendered in zip(self._served, part.pixels, strict=True):
                pixels[geometry][index] = rendered
        for row, (wanted, future) in batch.patches.items():
            try:
                for geometry, one in zip(wanted, future.result(), strict=True):
                    pixels[geometry][row] = self._sent(one)
            except BadImage as bad:
                batch.faults[row] = str(bad)
                for whole in pixels:
                    whole[row] = 0
        held = () if self._device is None else tuple(rendered for part in parts for rendered in part.pixels)
        return Decoded(tuple(pixels), batch.faults, held)

    def _sent(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor where the pixels are; nobody waits for the copy, whose source torch keeps until it is done."""
        if self._device is None:
            return tensor
        return tensor.contiguous().pin_memory().to(self._device, non_blocking=True)


def alike(images_HWC: Sequence[torch.Tensor], *, at_least: int) -> Iterator[list[int]]:
    """Rows of equal size in groups of few pixels, where there are enough of a size in at least so many groups."""
    by_size: dict[torch.Size, list[int]] = {}
    for row, image_HWC in enumerate(images_HWC):
        by_size.setdefault(image_HWC.shape, []).append(row)
    for (height, width, _), rows in by_size.items():
        most = min(_TOGETHER_PIXELS // (height * width), -(-len(rows) // at_least))
        for start in range(0, len(rows), max(1, most)):
            yield rows[start : start + max(1, most)]


def _joined(found: Sequence[_Found]) -> _Found:
    """Images of several pieces as if of one."""
    return _Found(
        [position for each in found for position in each.positions],
        [size for each in found for size in each.sizes],
        [image_HWC for each in found for image_HWC in each.tensors],
    )


def _is_for_dali(header: ImageHeader, *, is_gpu: bool) -> bool:
    """Whether DALI decodes this image, and to what Pillow makes of it."""
    if not (header.is_plain and header.is_whole and header.width and header.height):
        return False
    if header.format == "jpeg":
        return not (is_gpu and header.channels == 4)  # nvJPEG is not known to undo Adobe's inverted CMYK
    # In other formats few decoders look for an orientation.
    return header.orientation == 1
