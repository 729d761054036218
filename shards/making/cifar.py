"""Read CIFAR-10 and CIFAR-100 in their official formats as samples to write.

A source of the shard maker, like image folders and CSV files. The binary batches are read directly: records of one
label byte (two for CIFAR-100: coarse, fine) and 3,072 bytes of red, green and blue planes. The python batches are
pickles, which can execute any code when loaded; they are read only through torchvision, which verifies their checksums
first.

Both formats give the same keys, pixels and labels. Images are written as PNG.
"""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vitscore.errors import DataError, SetupError, UsageError
from vitscore.shards.making.sources import Sample, Source
from vitscore.shards.sidefiles import read_classes

SIDE = 32
PIXEL_BYTES = 3 * SIDE * SIDE
PNG_BYTES = PIXEL_BYTES + 200
"""Upper bound of an encoded image, for planning shard sizes: a PNG of noise is slightly larger than its pixels."""
BATCH_IMAGES = 10_000


@dataclass(frozen=True)
class Form:
    """One official format: its folder, the batches of each split, and the file of class names."""

    name: str
    folder: str
    batches: dict[str, tuple[str, ...]]
    names_file: str
    label_bytes: int = 1


TRAIN_10 = tuple(f"data_batch_{number}" for number in range(1, 6))
BINARY_FORMS = (
    Form(
        "CIFAR-10",
        "cifar-10-batches-bin",
        {"train": tuple(f"{name}.bin" for name in TRAIN_10), "test": ("test_batch.bin",)},
        "batches.meta.txt",
    ),
    Form("CIFAR-100", "cifar-100-binary", {"train": ("train.bin",), "test": ("test.bin",)}, "fine_label_names.txt", 2),
)
PYTHON_FORMS = (
    Form("CIFAR-10", "cifar-10-batches-py", {"train": TRAIN_10, "test": ("test_batch",)}, "batches.meta"),
    Form("CIFAR-100", "cifar-100-python", {"train": ("train",), "test": ("test",)}, "meta"),
)


@dataclass(frozen=True, slots=True)
class CifarImage:
    """One record of a binary batch, encoded as PNG when it is written."""

    path: str
    offset: int

    @property
    def num_bytes(self) -> int:
        return PNG_BYTES

    @property
    def fingerprint(self) -> str:
        return str(self.offset)

    def read(self) -> bytes:
        with open(self.path, "rb") as stream:
            stream.seek(self.offset)
            planes = stream.read(PIXEL_BYTES)
        return encode_png(np.frombuffer(planes, np.uint8).reshape(3, SIDE, SIDE).transpose(1, 2, 0))


@dataclass(frozen=True, slots=True)
class PixelImage:
    """An image in memory: 32 x 32 x 3 bytes, encoded as PNG when it is written."""

    pixels: bytes

    @property
    def num_bytes(self) -> int:
        return PNG_BYTES

    @property
    def fingerprint(self) -> str:
        return ""

    def read(self) -> bytes:
        return encode_png(np.frombuffer(self.pixels, np.uint8).reshape(SIDE, SIDE, 3))


def encode_png(image_HWC: NDArray[np.uint8]) -> bytes:
    """Encode an image as PNG; equal pixels give equal bytes."""
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image_HWC)).save(stream, format="PNG")
    return stream.getvalue()


def find_cifar(folder: str) -> tuple[Form, Path, bool] | None:
    """Return the format in a folder, the folder of its batches, and whether the batches are binary; None if none.

    Accepts the folder of the batches, under any name, or its parent.
    """
    for forms, is_binary in ((BINARY_FORMS, True), (PYTHON_FORMS, False)):
        for form in forms:
            for candidate in (Path(folder), Path(folder) / form.folder):
                has_batch = any((candidate / name).is_file() for names in form.batches.values() for name in names)
                if has_batch and (candidate / form.names_file).is_file():
                    return form, candidate, is_binary
    return None


def read_cifar(form: Form, folder: Path, *, is_binary: bool, split: str, coarse: bool = False) -> Source:
    """Read the samples of one split of CIFAR, or of all splits.

    Args:
        form: the official format.
        folder: the folder of the batches.
        is_binary: whether the batches are binary rather than pickles.
        split: train, test or all.
        coarse: whether to use CIFAR-100's 20 superclasses instead of its 100 classes.

    Raises:
        UsageError: the split does not exist, or coarse labels were requested without CIFAR-100's binary batches.
        DataError: a batch is missing or damaged, or a pickle differs from the published file.
        SetupError: torchvision, which the python batches need, is missing.
    """
    if split not in ("train", "test", "all"):
        raise UsageError("no such split", where=form.name, expected="train, test or all", got=split)
    if coarse and form.name != "CIFAR-100":
        raise UsageError("no coarse labels", where=form.name, expected="CIFAR-100")
    splits = ("train", "test") if split == "all" else (split,)
    if not is_binary:
        return _read_pickles(form, folder, splits, coarse=coarse)
    names_file = folder / ("coarse_label_names.txt" if coarse else form.names_file)
    classes = read_classes(names_file)
    samples = []
    for name in (name for part in splits for name in form.batches[part]):
        samples += _read_batch(form, folder / name, num_classes=len(classes), coarse=coarse)
    return Source(form.name, samples, classes)


def _read_batch(form: Form, file: Path, *, num_classes: int, coarse: bool) -> list[Sample]:
    record_bytes = form.label_bytes + PIXEL_BYTES
    try:
        data = np.memmap(file, dtype=np.uint8, mode="r") if os.path.getsize(file) else np.empty(0, np.uint8)
    except OSError as error:
        raise DataError("cannot read the batch", where=str(file), got=error.strerror or str(error)) from error
    if len(data) == 0 or len(data) % record_bytes:
        raise DataError(
            "batch is truncated", where=str(file), expected=f"records of {record_bytes} bytes", got=f"{len(data)} bytes"
        )
    # A record of CIFAR-100 starts with the coarse label, followed by the fine one.
    column = 0 if coarse else form.label_bytes - 1
    labels = data.reshape(-1, record_bytes)[:, column].tolist()
    wrong = next((index for index, label in enumerate(labels) if label >= num_classes), None)
    if wrong is not None:
        raise DataError(
            "label out of range", where=f"{file}, record {wrong}", expected=f"0..{num_classes - 1}", got=labels[wrong]
        )
    path = str(file)
    return [
        Sample(f"{file.stem}/{index:05d}", "png", CifarImage(path, index * record_bytes + form.label_bytes), label)
        for index, label in enumerate(labels)
    ]


def _read_pickles(form: Form, folder: Path, splits: tuple[str, ...], *, coarse: bool) -> Source:
    """Read the python batches through torchvision, which loads them only if their checksums match."""
    if coarse:
        next_step = "Use the binary version."
        raise UsageError("python batches have no coarse labels here", where=str(folder), next_step=next_step)
    if folder.name != form.folder:
        raise UsageError(
            "python batches in a renamed folder",
            where=str(folder),
            expected=form.folder,
            got=folder.name,
            next_step="Rename the folder: torchvision, which verifies the batches, accepts only the original name.",
        )
    try:
        from torchvision import datasets
    except ImportError as error:
        raise SetupError("torchvision is missing", next_step="Install it, or use the binary version.") from error
    reader = datasets.CIFAR10 if form.name == "CIFAR-10" else datasets.CIFAR100
    samples: list[Sample] = []
    classes: tuple[str, ...] = ()
    for split in splits:
        try:
            data = reader(str(folder.parent), train=split == "train", download=False)
        except RuntimeError as error:
            raise DataError(
                "python batches refused",
                where=str(folder),
                expected="the published checksums",
                got="other or missing files",
                next_step="Unverified pickles can execute code: get the original files, or the binary version.",
            ) from error
        classes = tuple(data.classes)
        samples += _pickled_samples(form.batches[split], np.asarray(data.data), [int(label) for label in data.targets])
    return Source(form.name, samples, classes)


def _pickled_samples(batches: tuple[str, ...], images_NHWC: NDArray[np.uint8], labels: list[int]) -> list[Sample]:
    """Return the samples with the keys of the binary batches, which hold the same images in the same order."""
    samples = []
    for index, label in enumerate(labels):
        batch, position = divmod(index, BATCH_IMAGES) if len(batches) > 1 else (0, index)
        image = PixelImage(images_NHWC[index].tobytes())
        samples.append(Sample(f"{batches[batch]}/{position:05d}", "png", image, label))
    return samples
