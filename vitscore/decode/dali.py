"""Decoding with DALI: one pipeline for CPU and GPU, fed with the bytes of samples.

For each image the header is read on the host; it tells whether DALI decodes the image, or Pillow (`decode_torchvision`,
on a few threads meanwhile, patched into its row). `depth` batches are under way at a time. On a GPU the resizes are
part of the pipeline (`dali_graph`). On a CPU the pipeline ends with the decoded images, and torchvision resizes them: a
fifth of the time that DALI's CPU resize takes, and the very bits of transformers' processors.

One undecodable image fails all that goes through DALI with it. That is decoded once more, in parts (`decode_again`);
what fails by itself is left to Pillow. On a CPU the batches that follow go through DALI in pieces, of which a bad image
fails only its own. Where no image by itself is at fault, the pipeline is: it is replaced.

What DALI decodes is scored. Damage that both its decoder and a look from outside let pass (a few flipped bits in a
JPEG's coded pixels, which libjpeg reports as a warning or not at all) is an image, though a damaged one; whatever shows
its end missing, by either decoder, is not.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch

from vitscore.decode.again import Found, Halves, SecondTry, Singles
from vitscore.decode.counts import DecodedAgain
from vitscore.decode.dali_pipeline import DaliPipeline, Misplaced
from vitscore.decode.failures import DecoderBroken, Failed, complaint_in, decoder_failed, end_of_run, out_of_memory
from vitscore.decode.image_header import ImageHeader, read_header
from vitscore.decode.native_stderr import NativeStderr
from vitscore.decode.pixels import (
    HW_DECODER_LOAD,
    MAX_PIXELS,
    AnyGeometry,
    BadImage,
    Decoded,
    EncodedImage,
    too_large,
)
from vitscore.decode.resize import resize_all
from vitscore.decode.routing import Routing
from vitscore.decode.threads import Threads
from vitscore.decode.torchvision import blank_pixels

# After a failure on a CPU the next batches go through DALI in pieces, since bad images seldom come alone: a piece is
# closed once it holds this many images, and this many pixels (16 photographs; small images cost less than the calls).
# Batches of 128 photographs, 1 in 100 bad, take 1.2 times the CPU time of clean ones, whole batches twice. A batch in
# pieces takes 4% more than a whole one: 20 clean ones lose what pieces save on a bad one.
_PIECE_IMAGES = 16
_PIECE_PIXELS = 1 << 21
_WARY_BATCHES = 20
_MOST_REBUILDS = 3
"""In a row, with no batch decoded between them: then the run ends."""
_BROKEN: list[object] = []
"""Pipelines on a GPU that has failed."""


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
    has_failed: bool = False
    """Whether a piece of it was decoded again."""

    def images_of(self, piece: _Piece) -> list[EncodedImage]:
        return [self.images[self.rows[position]] for position in piece.positions]

    def sizes_of(self, piece: _Piece) -> list[tuple[int, int]]:
        return [self.sizes[position] for position in piece.positions]


@dataclass(eq=False)
class _Part:
    """The pixels of some rows, a tensor for each geometry that DALI serves."""

    rows: list[int]
    pixels: list[torch.Tensor]


class _Pieces:
    """Cuts batches into pieces: one each, or after a failure several.

    Args:
        batch_size: the most images of a batch.
        smallest: the fewest images of a piece.
    """

    def __init__(self, batch_size: int, *, smallest: int) -> None:
        self._batch_size = batch_size
        self._smallest = smallest
        self._num_made = 0
        self._num_wary = 0
        """How many more batches are cut into several."""

    @property
    def most(self) -> int:
        """Pieces that a batch may have."""
        return -(-self._batch_size // self._smallest)

    def be_wary(self) -> None:
        self._num_wary = _WARY_BATCHES

    def of(self, sizes: Sequence[tuple[int, int]]) -> Iterator[_Piece]:
        """The pieces of a batch whose images have these sizes."""
        smallest = self._smallest if self._num_wary else self._batch_size
        self._num_wary = max(self._num_wary - 1, 0)
        start = num_pixels = 0
        for stop, (height, width) in enumerate(sizes, 1):
            num_pixels += height * width
            is_full = stop - start >= smallest and num_pixels >= _PIECE_PIXELS
            if is_full or stop == len(sizes):
                self._num_made += 1
                yield _Piece(self._num_made, range(start, stop))
                start, num_pixels = stop, 0


class DaliDecoder:
    """A `Decoder` on a DALI pipeline.

    Args:
        resize_in_dali: whether the pipeline resizes too; by default on a GPU only.
        halves: whether a failed batch is halved instead of decoded image by image; by default on a GPU only.
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
        halves: bool | None = None,
    ) -> None:
        is_gpu = device_id is not None
        resizes = is_gpu if resize_in_dali is None else resize_in_dali
        smallest = batch_size if resizes else min(batch_size, max(_PIECE_IMAGES, 4 * num_threads))
        self._batch_size = batch_size
        self._device = None if device_id is None else torch.device("cuda", device_id)
        self._routing = Routing(tuple(geometries), max_pixels, is_gpu=is_gpu, resizes=resizes)
        self._pieces = _Pieces(batch_size, smallest=smallest)
        self._options: dict[str, Any] = {
            "geometries": self._routing.in_graph,
            "batch_size": batch_size,
            "num_threads": num_threads,
            "device_id": device_id,
            "depth": self.depth * self._pieces.most,
            "hw_decoder_load": hw_decoder_load,
        }
        self._batches: deque[_Batch] = deque()
        self.again = DecodedAgain()
        self._rebuilds_in_a_row = 0
        self._threads = Threads(num_threads)
        self._stderr = NativeStderr()
        try:
            self._pipeline = DaliPipeline(**self._options)
            halved = is_gpu if halves is None else halves
            self._second_try: SecondTry = Halves(self._options) if halved else Singles(self._options, self._threads)
        except BaseException:
            self.close()
            raise
        self._stderr.complaints(is_settled=True)  # of what the machine lacks; the decoder was made without it

    def submit(self, images: Sequence[EncodedImage]) -> None:
        if not 0 < len(images) <= self._batch_size:
            raise ValueError(f"a batch of {len(images)} images, but the decoder was made for 1 to {self._batch_size}")
        if len(self._batches) == self.depth:
            raise ValueError(f"{self.depth} batches are under way; collect one first")
        batch = _Batch(images)
        for row, image in enumerate(images):
            self._route(batch, row, read_header(image))
        batch.pieces.extend(self._pieces.of(batch.sizes))
        with self._kept_if_broken():
            self._feed(batch)
        self._batches.append(batch)

    def collect(self) -> Decoded:
        batch = self._batches[0]
        with self._kept_if_broken():
            parts = self._parts_of(batch) if batch.rows else []
            self._last_complaint(batch)
        self._batches.popleft()
        self.again.batches += batch.has_failed
        return self._assemble(batch, parts)

    def close(self) -> None:
        self._batches.clear()
        self._threads.close()
        # DALI's threads end with a pipeline's last reference.
        self.__dict__.pop("_second_try", None)
        self.__dict__.pop("_pipeline", None)
        self._stderr.close()

    def _route(self, batch: _Batch, row: int, header: ImageHeader) -> None:
        """Choose who decodes a row, and for which geometries."""
        max_pixels = self._routing.max_pixels
        if header.width * header.height > max_pixels:
            batch.faults[row] = str(too_large(header.width, header.height, max_pixels=max_pixels))
            return
        left = self._routing.left_to_pillow(header)
        if len(left) < len(self._routing.geometries):
            batch.rows.append(row)
            batch.sizes.append(header.upright_size)
        if left:
            self._patch(batch, row, left)

    def _patch(self, batch: _Batch, row: int, wanted: Sequence[int]) -> None:
        batch.patches[row] = (wanted, self._threads.submit(self._routing.render, batch.images[row], wanted))

    def _feed(self, batch: _Batch) -> None:
        for piece in batch.pieces:
            self._pipeline.feed(batch.images_of(piece), batch.sizes_of(piece), serial=piece.serial)

    def _parts_of(self, batch: _Batch) -> list[_Part]:
        """The pixels of DALI's rows; in several parts where the graph resizes and an image failed the batch."""
        found: list[Found] = []
        while batch.pieces:
            found += self._found_in(batch)
        if not self._routing.resizes:
            found = [_joined(found)]  # so that the threads resize all of it at once
        return [self._part_of(batch, each) for each in found if each.positions]

    def _found_in(self, batch: _Batch) -> list[Found]:
        """What DALI makes of the batch's next piece; what it makes of parts of it where an image fails it."""
        failure = Failed("DALI answered with another batch")
        for _ in range(2):
            piece = batch.pieces[0]
            try:
                outputs = self._pipeline.outputs(piece.serial)
            except Failed as failed:
                failure = failed
                break
            except Misplaced:
                # An error must not make a later piece answer for an earlier one. DALI 2.4 keeps its place after an
                # error; should a version not do so, everything under way is decoded anew.
                self._rebuild()
            else:
                self._rebuilds_in_a_row = 0
                batch.pieces.popleft()
                return [Found(piece.positions, *outputs)]
        return self._found_again(batch, batch.pieces.popleft(), failure)

    def _found_again(self, batch: _Batch, piece: _Piece, failure: Failed) -> list[Found]:
        """What DALI makes of parts of a failed piece; images that fail by themselves are left to Pillow."""
        self._pieces.be_wary()
        batch.has_failed = True
        self._last_complaint(batch, is_settled=True)
        found = [
            Found([piece.positions[at] for at in each.positions], each.sizes, each.tensors)
            for each in self._second_try.decode(batch.images_of(piece), batch.sizes_of(piece))
        ]
        left = set(piece.positions).difference(*(each.positions for each in found))
        broken = self._second_try.failure_with_good_image() if left else None
        said = self._last_complaint(batch, is_settled=True)
        if broken is not None:
            raise end_of_run(Failed(said or str(broken)), batch_size=len(piece.positions), device=self._device)
        self.again.images += len(piece.positions)
        self.again.undecodable += len(left)
        for position in sorted(left):
            self._patch(batch, batch.rows[position], range(len(self._routing.geometries)))
        if not left:
            # No image is at fault. What fails once may fail again with every batch, and each would be decoded twice.
            if failure.cause == "memory":
                raise out_of_memory(str(failure), batch_size=len(piece.positions), device=self._device)
            self._rebuild()
        return found

    def _rebuild(self) -> None:
        """Replace the pipeline, and give the new one all that the old one has not answered."""
        if self._rebuilds_in_a_row == _MOST_REBUILDS:
            text = f"{_MOST_REBUILDS} pipelines in a row failed, each with a batch whose images can be decoded"
            raise decoder_failed(text, device=self._device)
        self._rebuilds_in_a_row += 1
        self.again.rebuilds += 1
        del self._pipeline  # so that its memory is free for the new one
        try:
            self._pipeline = DaliPipeline(**self._options)
        except RuntimeError as error:
            raise end_of_run(error, batch_size=self._batch_size, device=self._device) from error
        for waiting in self._batches:
            self._feed(waiting)

    def _last_complaint(self, batch: _Batch, *, is_settled: bool = False) -> str:
        """The last line that nvImageCodec has printed of the device since the last call.

        Raises:
            SetupError: it printed that there was no memory; DALI then decodes on the CPU, or fails without saying why.
        """
        said = ""
        for line in self._stderr.complaints(is_settled=is_settled):
            if complaint_in(line) == "memory":
                raise out_of_memory(line, batch_size=len(batch.images), device=self._device)
            said = line
        return said

    @contextlib.contextmanager
    def _kept_if_broken(self) -> Iterator[None]:
        """Keep the pipelines for good where their GPU fails: DALI's destructors would end the process at once."""
        try:
            yield
        except DecoderBroken:
            if self._device is not None:
                _BROKEN.append((self.__dict__.get("_pipeline"), self._second_try))
            raise

    def _part_of(self, batch: _Batch, found: Found) -> _Part:
        for position, size in zip(found.positions, found.sizes, strict=True):
            if size != batch.sizes[position]:
                # The header and DALI read the image differently; its crop was computed for another image.
                self._patch(batch, batch.rows[position], range(len(self._routing.geometries)))
        routing, tensors = self._routing, found.tensors
        pixels = tensors if routing.resizes else resize_all(tensors, routing.geometries, self._threads)
        return _Part([batch.rows[position] for position in found.positions], pixels)

    def _assemble(self, batch: _Batch, parts: list[_Part]) -> Decoded:
        num_rows, geometries = len(batch.images), self._routing.geometries
        served = self._routing.served
        made_from = () if self._device is None else (batch.images, *(part.pixels for part in parts))
        is_clean = len(parts) == 1 and len(parts[0].rows) == num_rows and not batch.patches
        if is_clean and len(served) == len(geometries):
            return Decoded(tuple(parts[0].pixels), batch.faults, made_from)
        pixels = [blank_pixels(geometry, num_rows, device=self._device) for geometry in geometries]
        for part in parts:
            index = self._sent(torch.tensor(part.rows))
            for geometry, rendered in zip(served, part.pixels, strict=True):
                pixels[geometry][index] = rendered
        for row, (wanted, future) in batch.patches.items():
            try:
                for geometry, one in zip(wanted, future.result(), strict=True):
                    pixels[geometry][row] = self._sent(one)
            except BadImage as bad:
                batch.faults[row] = str(bad)
                for whole in pixels:
                    whole[row] = 0
        return Decoded(tuple(pixels), batch.faults, made_from)

    def _sent(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor where the pixels are; nobody waits for the copy, whose source torch keeps until it is done."""
        if self._device is None:
            return tensor
        return tensor.contiguous().pin_memory().to(self._device, non_blocking=True)


def _joined(found: Sequence[Found]) -> Found:
    """Images of several pieces as if of one."""
    return Found(
        [position for each in found for position in each.positions],
        [size for each in found for size in each.sizes],
        [image_HWC for each in found for image_HWC in each.tensors],
    )
