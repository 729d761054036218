"""Sample the GPU while something else runs: load of its cores and of its JPEG decoder, clock, power."""

from __future__ import annotations

import contextlib
import importlib
import statistics
import threading
from collections.abc import Callable, Iterator
from typing import Any

INTERVAL_S = 0.1


class Watch:
    """Samples by name."""

    def __init__(self) -> None:
        self.samples: dict[str, list[float]] = {}

    def add(self, name: str, read: Callable[[], float]) -> None:
        """Take a sample; what this GPU or driver does not tell is left out."""
        with contextlib.suppress(Exception):
            self.samples.setdefault(name, []).append(float(read()))

    @property
    def highest(self) -> dict[str, float]:
        """By name: the highest tenth's lower end, since a step's beginning and end are idle."""
        return {name: nearly_highest(values) for name, values in self.samples.items() if values}


def nearly_highest(values: list[float]) -> float:
    return statistics.quantiles(values, n=10)[-1] if len(values) > 1 else values[0]


@contextlib.contextmanager
def watching() -> Iterator[Watch]:
    """Watch the first GPU; nothing is sampled where there is none, or no nvidia-ml-py."""
    watch, stop = Watch(), threading.Event()
    thread = threading.Thread(target=_sample, args=(watch, stop), daemon=True)
    thread.start()
    try:
        yield watch
    finally:
        stop.set()
        thread.join(timeout=5)


def _sample(watch: Watch, stop: threading.Event) -> None:
    try:
        nvml: Any = importlib.import_module("pynvml")
        nvml.nvmlInit()
        gpu = nvml.nvmlDeviceGetHandleByIndex(0)
    except Exception:
        return
    while not stop.wait(INTERVAL_S):
        watch.add("GPU %", lambda: nvml.nvmlDeviceGetUtilizationRates(gpu).gpu)
        watch.add("JPEG decoder %", lambda: nvml.nvmlDeviceGetJpgUtilization(gpu)[0])
        watch.add("SM MHz", lambda: nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_SM))
        watch.add("W", lambda: nvml.nvmlDeviceGetPowerUsage(gpu) / 1e3)
