"""Made-up runs for the report: real parts and shards of small pictures, with generated predictions."""

import io
import json
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

from vitscore.bench.harness.madeup import MadeShard, columns_of, from_logits, write_part

IDENTITY = "ab" * 32
KINDS = "finch owl terrier beetle moth shark trout fern maple orchid kettle lamp chair boat bridge".split()
LOOKS = "red blue spotted striped great little common golden northern marsh".split()
PLACES = "field forest river island house desert mountain".split()


def class_names(number: int) -> list[str]:
    names = [f"{look} {place} {kind}" for kind in KINDS for place in PLACES for look in LOOKS]
    return names[:number]


def jpeg(label: int, seed: int) -> bytes:
    """Return a picture whose background colour depends on the class."""
    rng = np.random.default_rng(seed)
    ground = tuple(int(value) for value in np.random.default_rng(label).integers(40, 220, 3))
    image = Image.new("RGB", (120, 90), ground)
    drawing = ImageDraw.Draw(image)
    for _ in range(4):
        x, y, size = rng.integers(0, 100), rng.integers(0, 70), rng.integers(10, 40)
        shade = tuple(int(value) for value in rng.integers(0, 255, 3))
        drawing.ellipse((int(x), int(y), int(x + size), int(y + size)), fill=shade)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return buffer.getvalue()


def write_shard(path: Path, samples: Sequence[tuple[str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, content in samples:
            info = tarfile.TarInfo(f"{key}.jpg")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


@dataclass
class MadeRun:
    """A run's folder with a record and parts of chosen labels and predictions, and its shards beside it."""

    folder: Path
    classes: Sequence[str]
    models: Sequence[str] = ("vit", "clip")
    key: Callable[[int], str] = "img-{:06d}".format
    has_labels: bool = True
    bad_share: float = 0.0
    skill: float = 3.0
    is_never_right: bool = False
    has_shards: bool = True
    labels: list[int] = field(default_factory=list)
    preds: dict[str, list[int]] = field(default_factory=dict)

    def write(self, sizes: Sequence[int]) -> "MadeRun":
        shards = self.folder.parent / f"{self.folder.name}-shards"
        names = [str(shards / f"s-{number}.tar") for number in range(len(sizes))]
        (self.folder / "parts").mkdir(parents=True)
        table = {"ordinal": pa.array(range(len(sizes)), pa.int32()), "name": names}
        pq.write_table(pa.table({**table, "bytes": pa.nulls(len(sizes), pa.int64())}), self.folder / "shards.parquet")
        (self.folder / "run.json").write_text(json.dumps(self.record(str(shards), len(sizes))))
        for ordinal, size in enumerate(sizes):
            self.write_part(ordinal, names[ordinal], size)
        return self

    def record(self, shards: str, num_shards: int) -> dict[str, Any]:
        return {
            "schema": 1,
            "identity": {},
            "identity_hash": IDENTITY,
            "classes": list(self.classes),
            "classes_source": "classes.txt",
            "templates": ["a photo of a {c}."],
            "options": {
                "shards": [shards],
                "split": "test",
                "image_key": None,
                "max_pixels": 10**8,
                "on_bad_sample": "skip",
                "precision": "auto",
            },
            "choices": {"precision": {"value": "bf16", "reason": "this CPU has bf16 instructions"}},
            "models": {
                name: {
                    "checkpoint": f"models/{name}",
                    "kind": "classifier",
                    "parameters": 86_567_656,
                    "matching": f"by position, {len(self.classes)} of {len(self.classes)}",
                    "fingerprint": "c0ffee" * 10,
                }
                for name in self.models
            },
            "corpus": {"shards": num_shards, "bytes": 10**9, "limit": None},
            "versions": {"python": "3.11.7", "vitscore": "0.1.0"},
            "hardware": {"cpu": "a CPU", "cpus": 2, "memory_bytes": 2**34, "gpus": []},
            "sessions": [
                {
                    "id": "1",
                    "started": "2026-01-02T03:04:05Z",
                    "ended": "2026-01-02T04:04:05Z",
                    "launcher": "none",
                    "ranks": 1,
                    "images": 1,
                    "images_per_s": 151.25,
                }
            ],
        }

    def write_part(self, ordinal: int, shard: str, size: int) -> None:
        rng, num_classes = np.random.default_rng(ordinal), len(self.classes)
        truth = rng.integers(0, num_classes, size)
        labels = (truth if self.has_labels else np.full(size, -1)).astype(np.int32)
        is_bad = rng.random(size) < self.bad_share
        keys = [self.key(ordinal * 1_000_000 + row) for row in range(size)]
        if self.has_shards:
            pictures = [jpeg(int(label) % 50, seed) for label, seed in zip(truth[:200], range(200), strict=False)]
            write_shard(Path(shard), [(key, pictures[row % len(pictures)]) for row, key in enumerate(keys)])
        kinds = ["undecodable image: not an image", "no image: got txt"]
        bad = {int(row): kinds[row % 2] for row in np.flatnonzero(is_bad)}
        predictions = {
            name: from_logits(self.logits(truth, ordinal, place), labels) for place, name in enumerate(self.models)
        }
        for name, made in predictions.items():
            self.preds.setdefault(name, []).extend(np.where(is_bad, -1, made.pred).tolist())
        self.labels.extend(np.where(is_bad, -1, labels).tolist())
        columns = [columns_of(name, made) for name, made in predictions.items()]
        rows = MadeShard(shard, keys, labels, predictions, bad)
        write_part(self.folder / "parts", rows, columns, ordinal=ordinal, identity=IDENTITY)

    def logits(self, truth: np.ndarray, ordinal: int, place: int) -> np.ndarray:
        """Return logits that confuse neighbouring classes, share errors among models, and contradict a few labels."""
        size, num_classes = len(truth), len(self.classes)
        rng, shared = np.random.default_rng([ordinal, place]), np.random.default_rng([ordinal, 99])
        logits = rng.normal(size=(size, num_classes)).astype(np.float32)
        rows = np.arange(size)
        if self.is_never_right:
            logits[rows, truth] = -100
            return logits
        near = (truth + shared.integers(1, 12, size)) % num_classes
        logits[rows, near] += self.skill + 2.5 * rng.random(size) - place * 0.2
        logits[rows, truth] += self.skill + 4 + 2 * rng.normal(size=size)
        doubted = shared.random(size) < 0.01
        other = shared.integers(0, num_classes, size)
        logits[rows[doubted], other[doubted]] += 16
        return logits
