"""What this machine is: cores, memory, GPUs, versions of the packages that matter; for the record, and for the choices.

Reads, decides nothing. torch is asked only where it is loaded or a GPU has to be named.
"""

from __future__ import annotations

import contextlib
import os
import platform
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from vitscore.system.durable import start_time

VERSION = "0.1.0"
"""Of this package."""
VERSIONED = (
    "vitscore",
    "torch",
    "torchvision",
    "transformers",
    "accelerate",
    "webdataset",
    "numba",
    "numpy",
    "pyarrow",
)


def versions() -> dict[str, str | None]:
    """Versions of the packages that can change a result, and of Python."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in (*VERSIONED, "nvidia-dali-cuda130"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def hardware() -> dict[str, Any]:
    """The machine, as far as it explains a rate: CPU, usable cores, memory, GPUs."""
    found: dict[str, Any] = {"cpu": cpu_name(), "cpus": num_usable_cpus(), "system": platform.system()}
    with contextlib.suppress(ValueError, OSError, AttributeError):
        found["memory_bytes"] = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(ImportError):
        import torch

        found["gpus"] = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return found


def cpu_name() -> str:
    return _cpu_says("model name") or platform.processor() or platform.machine()


def cpu_flags() -> frozenset[str]:
    """What the CPU says that it can do, in Linux' words (`avx512_bf16`, `amx_bf16`); empty where it does not say."""
    return frozenset(_cpu_says("flags", "Features").split())


def _cpu_says(*fields: str) -> str:
    """The first CPU's value of one of these fields in Linux' own list; empty where there is none."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith(fields):
                return line.partition(":")[2].strip()
    return ""


def num_usable_cpus() -> int:
    """CPUs that this process may use: its affinity, and its container's quota."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        with open("/sys/fs/cgroup/cpu.max", encoding="ascii") as file:
            quota, period = file.read().split()
        if quota != "max":
            return max(1, min(affinity, round(int(quota) / int(period))))
    return affinity


def peak_rss_bytes() -> int:
    """This process' peak resident memory."""
    # What getrusage says of the peak begins with the memory of the process that started this one.
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024
    import resource  # only Unix has it

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def process_age_s() -> float | None:
    """Seconds since this process was started, its imports included; None where the system does not tell."""
    ticks = start_time(os.getpid())
    if ticks is None:
        return None
    return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))
