"""Describe this machine: cores, memory, GPUs, package versions, peak memory of the process.

The run record and the automatic choices use these facts. Only `hardware` imports torch, to name the GPUs.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import re
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from vitscore.system.durable import start_time

VERSION = "0.1.0"
"""Version of this package."""
NVIDIA = "0x10de"
"""The vendor's number on the PCI bus."""
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
    """Return the versions of Python and of the packages that can change a result."""
    by_name: dict[str, str | None] = {"python": platform.python_version()}
    for name in (*VERSIONED, "nvidia-dali-cuda130"):
        try:
            by_name[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            by_name[name] = None
    return by_name


def hardware() -> dict[str, Any]:
    """Return the hardware that explains a rate: CPU, usable cores, memory, GPUs."""
    facts: dict[str, Any] = {"cpu": cpu_name(), "cpus": num_usable_cpus(), "system": platform.system()}
    with contextlib.suppress(ValueError, OSError, AttributeError):
        facts["memory_bytes"] = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(ImportError):
        import torch

        facts["gpus"] = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return facts


def cpu_name() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def cpu_flags() -> frozenset[str]:
    """Return the CPU's features as Linux names them (`avx512_bf16`, `amx_bf16`); empty if unknown."""
    return frozenset(_cpuinfo("flags", "Features").split())


def _cpuinfo(*fields: str) -> str:
    """Return the first CPU's value of one of these fields of /proc/cpuinfo; empty if there is none."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith(fields):
                return line.partition(":")[2].strip()
    return ""


def num_usable_cpus() -> int:
    """Return the number of CPUs that this process may use, by its affinity and its container's quota."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        with open("/sys/fs/cgroup/cpu.max", encoding="ascii") as file:
            quota, period = file.read().split()
        if quota != "max":
            return max(1, min(affinity, round(int(quota) / int(period))))
    return affinity


def peak_rss_bytes() -> int:
    """Return the peak resident memory of this process."""
    # The peak that getrusage reports includes the memory of the process that started this one.
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024
    import resource  # only Unix has it

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def process_age_s() -> float | None:
    """Return the seconds since this process started, imports included; None if the system does not provide them."""
    ticks = start_time(os.getpid())
    if ticks is None:
        return None
    return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))


def has_nvidia_hardware(devices: Path = Path("/sys/bus/pci/devices")) -> bool:
    """Whether a display or compute device of NVIDIA is on the PCI bus, or a device file of its driver exists."""
    if Path("/dev/nvidiactl").exists():
        return True
    for vendor in devices.glob("*/vendor"):
        try:
            kind = (vendor.parent / "class").read_text(encoding="ascii")
            if vendor.read_text(encoding="ascii").strip() == NVIDIA and kind.startswith("0x03"):
                return True
        except OSError:
            continue
    return False


def driver_version(source: Path = Path("/proc/driver/nvidia/version")) -> str | None:
    """The loaded driver's version, from the kernel module's own words."""
    try:
        match = re.search(r"\b(\d{3}\.\d+(\.\d+)?)\b", source.read_text(encoding="ascii", errors="replace"))
    except OSError:
        return None
    return match[1] if match else "of unknown version"


def driver_cuda_version() -> tuple[int, int] | None:
    """The newest CUDA that the driver's library speaks."""
    try:
        version = ctypes.c_int()
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version)) != 0:
            return None
    except (OSError, AttributeError):
        return None
    return version.value // 1000, version.value % 1000 // 10
