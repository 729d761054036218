"""Ways to turn shards of JPEGs into batches of 224 x 224 bytes: ours, and what people use instead.

Each is an endless stream of batches, so that a rate can be taken when all queues are full. What they decode with is
theirs; size and filter are those of a ViT's processor (bilinear, antialiased, without regard to the aspect), and pixels
leave all of them as bytes.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import webdataset as wds
from PIL import Image

from vitscore.decode.make import make_decoder
from vitscore.decode.pixels import DecoderKind, EncodedImage
from vitscore.preprocess import Geometry
from vitscore.shards.labels import LabelRule
from vitscore.shards.samples import OpenShard
from vitscore.shards.shard import Shard
from vitscore.shards.tar.index import index_tar

EDGE = 224
GEOMETRY = Geometry("exact", (EDGE, EDGE), "bilinear")

Stream = Iterator[torch.Tensor]
"""uint8 (B, H, W, 3), on the device that decoded."""
Way = Callable[..., Stream]
"""Called with paths, batch_size and num_threads."""


def read_images(paths: Sequence[Path]) -> Iterator[list[EncodedImage]]:
    """The encoded images of the shards, a block of rows at a time."""
    rule = LabelRule(None)
    for ordinal, path in enumerate(paths):
        with OpenShard(Shard(ordinal, path.name, str(path), None), labels=rule) as shard:
            for start in range(0, shard.num_samples, 64):
                yield [image for image in shard.read(start, start + 64).images if image is not None]


def endless_images(paths: Sequence[Path]) -> Iterator[EncodedImage]:
    while True:
        yield from itertools.chain.from_iterable(read_images(paths))


def decode_ours(kind: DecoderKind) -> Way:
    """Our reader and decoder, as a run drives them."""

    def stream(paths: Sequence[Path], *, batch_size: int, num_threads: int) -> Stream:
        return submit_and_collect(endless_images(paths), kind, batch_size=batch_size, num_threads=num_threads)

    return stream


def submit_and_collect(
    images: Iterator[EncodedImage], kind: DecoderKind, *, batch_size: int, num_threads: int, **options: Any
) -> Stream:
    """Keep a decoder as far ahead as it allows; `options` are `make_decoder`'s."""
    decoder = make_decoder(kind, [GEOMETRY], batch_size=batch_size, num_threads=num_threads, **options)
    try:
        for _ in range(decoder.depth - 1):
            decoder.submit(list(itertools.islice(images, batch_size)))
        while True:
            decoder.submit(list(itertools.islice(images, batch_size)))
            yield decoder.collect().pixels[0]
    finally:
        decoder.close()


def decode_by_loader(paths: Sequence[Path], *, batch_size: int, num_threads: int) -> Stream:
    """webdataset, Pillow and torchvision's transforms in a DataLoader with a worker a thread."""
    from torch.utils.data import DataLoader
    from torchvision.transforms import v2

    transform = v2.Compose([v2.Resize((EDGE, EDGE)), v2.PILToTensor()])

    def decode(sample: dict[str, Any]) -> Any:
        return transform(Image.open(io.BytesIO(sample["jpg"])).convert("RGB"))

    urls = [str(path) for path in paths]
    images = wds.WebDataset(urls, shardshuffle=False, workersplitter=wds.split_by_worker).map(decode).repeat()
    for pixels_BCHW in DataLoader(images, batch_size=batch_size, num_workers=num_threads):
        yield pixels_BCHW.permute(0, 2, 3, 1)


def decode_by_dali(paths: Sequence[Path], *, batch_size: int, num_threads: int, device_id: int | None = None) -> Stream:
    """DALI alone: its own reader of webdataset's shards, its decoder, its resize."""
    import nvidia.dali.fn as fn
    import nvidia.dali.types as types
    from nvidia.dali import pipeline_def
    from torch.utils.dlpack import from_dlpack

    indexes = [str(write_dali_index(path)) for path in paths]

    @pipeline_def(batch_size=batch_size, num_threads=num_threads, device_id=device_id, exec_dynamic=True)  # type: ignore[untyped-decorator]
    def graph() -> Any:
        encoded = fn.readers.webdataset(paths=[str(path) for path in paths], index_paths=indexes, ext=["jpg"])
        decoded = fn.decoders.image(encoded, device="cpu" if device_id is None else "mixed", output_type=types.RGB)
        return fn.resize(decoded, size=(EDGE, EDGE), interp_type=types.INTERP_LINEAR, antialias=True)

    pipe = graph()
    pipe.build()
    while True:
        yield from_dlpack(pipe.run()[0].as_tensor())


def write_dali_index(path: Path) -> Path:
    """The index that DALI's reader takes, beside its shard; without one it reads every tar once more, and says so."""
    with path.open("rb") as file:
        members = index_tar(file.fileno()).members
    samples = itertools.groupby(members, lambda member: member.name.partition(".")[0])
    lines = [
        " ".join(f"{member.name.partition('.')[2]} {member.offset} {member.size} {member.name}" for member in group)
        for _, group in samples
    ]
    index = path.with_suffix(".idx")
    index.write_text("".join(f"{line}\n" for line in [f"v1.2 {len(lines)}", *lines]))
    return index


WAYS: dict[str, Way] = {
    "vitscore": decode_ours("dali"),
    "vitscore, torchvision": decode_ours("torchvision"),
    "webdataset, Pillow, DataLoader": decode_by_loader,
    "DALI alone": decode_by_dali,
}
