"""A step's surroundings: where it writes, the photographs and checkpoints made for it, the sizes it measures."""

from __future__ import annotations

import ctypes
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from vitscore.bench.gpu import figures

VARIABLE = "VITSCORE_GPU_DAY"
"""A step's Day, as JSON."""
NO_GPU = "no CUDA device"
ROOT = Path(__file__).resolve().parent.parent.parent
"""The checkout."""


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    models: Mapping[str, str]
    """By the name in the tables: a kind of `checkpoints`."""
    precision: str
    batch_size: int
    at_least_s: float
    """That a rate is measured."""
    photos: int
    """Different photographs."""
    times: int
    """How often a photograph is in the shards of a whole run."""
    compared: int
    """Photographs that are scored on the CPU too."""
    by_loop: int
    """How often a photograph is given to the hand-written loop."""
    decoded: int
    """Images that a decoding rate is measured on."""
    profiled: int
    """Batches in the trace."""


REAL = Sizes(
    models={"B/16": "vit-base", "L/14": "clip-large-14", "B/32": "clip-base-32"},
    precision="fp16",
    batch_size=256,
    at_least_s=1.5,
    photos=1024,
    times=40,
    compared=256,
    by_loop=12,
    decoded=8192,
    profiled=24,
)
TINY = Sizes(
    models={"B/16": "vit-tiny", "L/14": "clip-tiny", "B/32": "clip-tiny"},
    precision="fp32",
    batch_size=8,
    at_least_s=0.2,
    photos=48,
    times=2,
    compared=16,
    by_loop=1,
    decoded=96,
    profiled=4,
)
"""Of a rehearsal."""


@dataclass(frozen=True)
class Day:
    """One step's surroundings."""

    part: int
    step: str
    out: Path
    """Where the few files go that are kept."""
    work: Path
    """Where everything else goes; a later part finds what an earlier one made."""
    is_rehearsal: bool
    """Whether everything is measured at tiny sizes, without a GPU where there is none."""
    ends: float
    """When the step will be ended, in seconds since the epoch."""

    @property
    def left_s(self) -> float:
        return self.ends - time.time()

    @classmethod
    def from_environment(cls) -> Day:
        given = json.loads(os.environ[VARIABLE])
        return cls(**{**given, "out": Path(given["out"]), "work": Path(given["work"])})

    def to_environment(self) -> dict[str, str]:
        fields = {**vars(self), "out": str(self.out), "work": str(self.work)}
        return {VARIABLE: json.dumps(fields)}

    @property
    def sizes(self) -> Sizes:
        return TINY if self.is_rehearsal else REAL

    @property
    def photos(self) -> Path:
        """Shards of different photographs."""
        return self.work / "photos"

    def checkpoint(self, model: str) -> Path:
        """The checkpoint of a model by its name in the tables."""
        return self.work / "checkpoints" / self.sizes.models[model]

    def figure(self, name: str, value: figures.Value, unit: str = "", *, note: str = "", **settings: Any) -> None:
        """Append a figure to figures.jsonl, at once."""
        figures.append(
            self.out,
            part=self.part,
            step=self.step,
            name=name,
            value=value,
            unit=unit,
            note=note,
            settings=settings,
            gpu=gpu_name(),
        )

    def could_not(self, name: str, why: str) -> None:
        """Say that a figure was not measured, and why."""
        self.figure(name, None, note=f"not measured: {why}")


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


@cache
def gpu_name() -> str:
    """The first GPU's name; empty where the driver finds none. Asked without torch, whose import takes seconds."""
    name, device = ctypes.create_string_buffer(100), ctypes.c_int()
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        failed = driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), 0)
        failed = failed or driver.cuDeviceGetName(name, len(name), device)
    except (OSError, AttributeError):
        return ""
    return "" if failed else name.value.decode(errors="replace")


def device_id() -> int | None:
    return 0 if has_gpu() else None
