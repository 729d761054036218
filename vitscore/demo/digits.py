"""The demo's data: scikit-learn's handwritten digits, split once, and the held-out part as WebDataset shards.

First step of `vitscore.demo.make`. Of 1,797 real scans (8x8 pixels, 17 grey levels), 500 scans, 50 per class, become
four shards with `classes.txt` and `templates.txt` beside them; the demo's models are trained on the other 1,297. This
module needs no model and no torch.

Images are stored at 32x32, enlarged with Pillow's bicubic filter, as lossless grey PNG. A thumbnail of 8x8 in a report
is unreadable; at 32x32 a digit is recognisable, and a tar member still takes only one or two blocks of 512 bytes.
Both models take images of 32x32, so runs of the demo with different decoders differ only by arithmetic.

A key holds the scan's index in `load_digits()`, so any row of a run can be traced to its source.

Axes: B images, H and W pixels, N a scan's 64 levels in a row.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from sklearn.datasets import load_digits
from webdataset import TarWriter

SEED = 0
SIZE = 32
NUM_HELD_OUT_PER_CLASS = 50
NUM_SHARDS = 4
CLASSES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATES = (
    "a photo of the handwritten digit {c}.",
    "a scan of the digit {c}.",
    "the number {c}, written by hand.",
    "a low resolution picture of the number {c}.",
    "a handwritten {c}.",
)
MAX_LEVEL = 16


@dataclass(frozen=True)
class Digits:
    """Scans with their labels; `indices` are their indices in `load_digits()`, in ascending order."""

    images_BHW: npt.NDArray[np.uint8]
    labels_B: npt.NDArray[np.int64]
    indices: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.indices)

    def take(self, rows: npt.NDArray[np.int64]) -> Digits:
        return Digits(self.images_BHW[rows], self.labels_B[rows], self.indices[rows])

    def pictures(self) -> list[Image.Image]:
        return [Image.fromarray(image_HW) for image_HW in self.images_BHW]


def load_split(seed: int = SEED) -> tuple[Digits, Digits]:
    """Return all scans, enlarged, as (training, held out); the held-out part has the same number of each class.

    The split uses NumPy's legacy generator, whose stream is frozen: every NumPy gives the same split.
    """
    levels_BN, labels_B = load_digits(return_X_y=True)
    everything = Digits(
        images_BHW=np.stack([enlarge(levels_N.reshape(8, 8)) for levels_N in levels_BN]),
        labels_B=labels_B.astype(np.int64),
        indices=np.arange(len(labels_B)),
    )
    random = np.random.RandomState(seed)
    draws = [random.permutation(np.flatnonzero(labels_B == label)) for label in range(len(CLASSES))]
    held_out = np.sort(np.concatenate([draw[:NUM_HELD_OUT_PER_CLASS] for draw in draws]))
    return everything.take(np.setdiff1d(everything.indices, held_out)), everything.take(held_out)


def enlarge(levels_HW: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """Return a scan of levels 0..16 as an 8-bit image of the stored size."""
    grey_HW = np.rint(levels_HW * (255 / MAX_LEVEL)).astype(np.uint8)
    return np.asarray(Image.fromarray(grey_HW).resize((SIZE, SIZE), Image.Resampling.BICUBIC))


def write_shards(digits: Digits, folder: Path) -> list[Path]:
    """Write `demo-000.tar` and so on, and the side files; the same digits always give the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"demo-{number:03d}.tar" for number in range(NUM_SHARDS)]
    for path, rows in zip(paths, np.array_split(np.arange(len(digits)), NUM_SHARDS), strict=True):
        write_shard(digits.take(rows), path)
    for name, lines in (("classes.txt", CLASSES), ("templates.txt", TEMPLATES)):
        (folder / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="\n")
    return paths


def write_shard(digits: Digits, path: Path) -> None:
    with path.open("wb") as file, TarWriter(file, encoder=False, user="", group="", mtime=0, mode=0o644) as tar:
        for image_HW, label, index in zip(digits.images_BHW, digits.labels_B, digits.indices, strict=True):
            tar.write({"__key__": f"digit-{index:04d}", "png": encode_png(image_HW), "cls": str(label).encode()})


def encode_png(image_HW: npt.NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image_HW).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
