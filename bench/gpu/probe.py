"""Describe this machine: GPU, driver, versions, NVVM, and which image decoders work."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import subprocess
import time
from typing import Any

from vitscore.bench.gpu import nvvm
from vitscore.bench.gpu.day import NO_GPU, Day, has_gpu
from vitscore.bench.harness.timing import clock

SMI = {
    "GPU memory": "memory.total",
    "SM clock": "clocks.sm",
    "largest SM clock": "clocks.max.sm",
    "memory clock": "clocks.mem",
    "power limit": "power.limit",
    "temperature": "temperature.gpu",
    "PCIe generation": "pcie.link.gen.max",
    "PCIe lanes": "pcie.link.width.max",
}
PACKAGES = (
    "torch",
    "torchvision",
    "transformers",
    "accelerate",
    "triton",
    "numba",
    "numba-cuda",
    "numpy",
    "pyarrow",
    "pillow",
    "webdataset",
    "cuda-bindings",
    "nvidia-ml-py",
    "nvidia-cudnn-cu13",
)


def probe(day: Day) -> None:
    """Everything, the decoders last: they are foreign code that may end the process."""
    machine(day)
    versions(day)
    compiler(day)
    gpu(day)
    decoders(day)


def machine(day: Day) -> None:
    from vitscore.system.machine import cpu_name, driver_cuda_version, driver_version, hardware, num_usable_cpus

    day.figure("CPU", cpu_name(), cores=num_usable_cpus(), memory_bytes=hardware().get("memory_bytes"))
    day.figure("driver", driver_version(), cuda=driver_cuda_version())
    if has_gpu():
        for name, value in smi().items():
            day.figure(name, value)
    else:
        day.could_not("GPU memory", NO_GPU)


def smi() -> dict[str, str]:
    """Ask nvidia-smi for memory, clocks, power and PCIe."""
    command = ["nvidia-smi", f"--query-gpu={','.join(SMI.values())}", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError) as error:
        return {"nvidia-smi": f"does not answer: {error}"}
    return dict(zip(SMI, done.stdout.strip().split(", "), strict=False))


def versions(day: Day) -> None:
    for name in PACKAGES:
        try:
            day.figure(f"version of {name}", importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            day.figure(f"version of {name}", None, note="not installed")


def compiler(day: Day) -> None:
    place = nvvm.find()
    if place is None:
        return day.figure("NVVM", "none", note="numba cannot compile kernels: looked in packages, CUDA_HOME, nvcc's")
    return day.figure("NVVM", "found", note=f"{place.source}: {place.root}")


def gpu(day: Day) -> None:
    """The GPU as torch sees it, what it can do at most, and how fast pixels get there."""
    import torch

    if not has_gpu():
        for name in ("GPU", "fp16 product", "copy to the GPU"):
            day.could_not(name, NO_GPU)
        return
    started = time.perf_counter()
    free, total = torch.cuda.mem_get_info()
    seconds = time.perf_counter() - started
    device = torch.cuda.get_device_properties(0)
    day.figure(
        "GPU",
        device.name,
        capability=f"{device.major}.{device.minor}",
        multiprocessors=device.multi_processor_count,
        free_bytes=free,
        total_bytes=total,
        cuda=torch.version.cuda,
        cudnn=torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        context_s=round(seconds, 2),
    )
    day.figure("fp16 product", product_tflop_per_s(), "TFLOP/s", size=8192)
    day.figure("copy to the GPU", copy_gb_per_s(), "GB/s", pinned=True)


def product_tflop_per_s(size: int = 8192, times: int = 10) -> float:
    """A matrix product in fp16 on random numbers: what the forwards can be measured against."""
    import torch

    a, b = (torch.randn(size, size, dtype=torch.float16, device="cuda") for _ in range(2))
    for _ in range(3):
        a @ b
    started = clock()
    for _ in range(times):
        a @ b
    return 2 * size**3 * times / (clock() - started) / 1e12


def copy_gb_per_s(num_bytes: int = 1 << 28, times: int = 8) -> float:
    import torch

    here = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
    there = here.to("cuda", non_blocking=True)
    started = clock()
    for _ in range(times):
        there.copy_(here, non_blocking=True)
    return num_bytes * times / (clock() - started) / 1e9


def decoders(day: Day) -> None:
    """Every decoder of nvImageCodec, and the library that the hardware's needs."""
    from vitscore.decode.backends import HARDWARE, NVCUVID, failure_to_load, jpeg_backends

    problem = failure_to_load(NVCUVID)
    day.figure(NVCUVID, "missing" if problem else "loads", note=problem or "")
    if importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.nvimgcodec") is None:
        for name in ("decoder backends", "hardware JPEG decoder"):
            day.could_not(name, "nvImageCodec is not installed")
        return
    failures = jpeg_backends()
    working = [name for name, failure in failures.items() if failure is None]
    for name, failure in failures.items():
        if failure is not None:
            day.figure(f"decoder {name}", None, note=failure)
    day.figure("decoder backends", f"{len(working)} of {len(failures)} work", note=", ".join(working))
    if not has_gpu():
        day.could_not("hardware JPEG decoder", NO_GPU)
    else:
        failure = failures[HARDWARE] or problem
        day.figure("hardware JPEG decoder", "no" if failure else "yes", note=failure or "")
    for name in working:
        day.figure(f"decoder {name}", decoding_rate(name, copies=8 if day.is_rehearsal else 512), "images/s")


def decoding_rate(backend: str, *, copies: int) -> float:
    """Images/s of one decoder given a photograph so many times at once; once before, unmeasured."""
    from vitscore.bench.harness.corpus import photos

    codec: Any = importlib.import_module("nvidia.nvimgcodec")
    ((jpeg, _, _),) = photos(1)
    device = codec.NVIMGCODEC_DEVICE_CPU_ONLY if backend == "CPU_ONLY" else 0
    decoder = codec.Decoder(device_id=device, backends=[codec.Backend(codec.BackendKind.__members__[backend])])
    for _ in range(2):
        started = clock()
        images = decoder.decode([codec.CodeStream(jpeg) for _ in range(copies)])
        seconds = clock() - started
    return sum(image is not None for image in images) / seconds
