"""`vitscore doctor`: what this machine can do, what is missing, and the command that installs it.

Each check is a finding: `ok`, `optional` (not here, and a run goes without it) or `problem` (a run would fail, or would
leave a GPU idle that is there). Looks and reports, decides nothing and changes nothing; settings.py makes the choices
of a run. The checks get the facts as arguments, so that a test can tell them of another machine.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

from vitscore.decode.backends import CPU, HARDWARE, NVCUVID, NVJPEG, failure_to_load, jpeg_backends
from vitscore.decode.pixels import is_dali_available
from vitscore.plan.choices import has_bf16_instructions
from vitscore.system.machine import cpu_name, driver_cuda_version, driver_version, has_nvidia_hardware, num_usable_cpus

OK, OPTIONAL, PROBLEM = "ok", "optional", "problem"
INSTALL_DRIVER = "sudo apt install nvidia-driver (Debian), sudo ubuntu-drivers install (Ubuntu), then restart"
INSTALL_COMPILER = "sudo apt install g++"
# What a run imports; DALI has its own check. Each is imported, since an install may be there and broken.
PACKAGES = {
    "torch": "torch",
    "torchvision": "torchvision",
    "transformers": "transformers",
    "accelerate": "accelerate",
    "webdataset": "webdataset",
    "numba": "numba",
    "numpy": "numpy",
    "pyarrow": "pyarrow",
    "pillow": "PIL",
    "fsspec": "fsspec",
    "aiohttp": "aiohttp",
}


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    name: str
    state: str
    found: str
    fix: str = ""
    """The command that helps, where something is missing."""


def examine() -> list[Finding]:
    """Everything, on this machine."""
    findings = [check_python(), *check_packages()]
    usable = {finding.name for finding in findings if finding.state == OK}
    gpus = find_gpus() if "torch" in usable else []
    findings.append(check_cpu(has_bf16=has_bf16_instructions()))
    findings.append(
        check_gpu(
            gpus,
            has_hardware=has_nvidia_hardware(),
            driver=driver_version(),
            driver_cuda=driver_cuda_version(),
            torch_cuda=torch_cuda_version() if "torch" in usable else None,
        )
    )
    findings.append(check_dali(is_there=is_dali_available(), load=lambda: importlib.import_module("nvidia.dali")))
    findings.append(check_jpeg(jpeg_backends(), has_gpu=bool(gpus)))
    findings.append(check_nvcuvid(has_gpu=bool(gpus), failure=failure_to_load(NVCUVID)))
    findings.append(check_numba_cuda(has_gpu=bool(gpus), is_there=version_of("numba-cuda") is not None))
    findings.append(
        check_compile(compiler=find_compiler(), has_gpu=bool(gpus), has_triton=version_of("triton") is not None)
    )
    findings.append(check_precisions(gpus, has_bf16_cpu=has_bf16_instructions()))
    findings.append(check_store("s3", is_there=version_of("s3fs") is not None))
    findings.append(check_store("gs", is_there=version_of("gcsfs") is not None))
    return findings


def document_of(findings: Iterable[Finding]) -> dict[str, Any]:
    """The report as JSON."""
    findings = list(findings)
    return {"schema": 1, "ready": not problems(findings), "findings": [asdict(finding) for finding in findings]}


def lines_of(findings: Iterable[Finding]) -> list[str]:
    """The report in words, one line a finding and one for what helps."""
    marks = {OK: "ok", OPTIONAL: "-", PROBLEM: "!!"}
    lines = []
    for finding in findings:
        lines.append(f"{marks[finding.state]:<3}{finding.name:<14}{finding.found}")
        if finding.fix:
            lines.append(f"{'':<17}{finding.fix}")
    return lines


def problems(findings: Iterable[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.state == PROBLEM]


def check_python() -> Finding:
    return Finding("python", OK, f"{platform.python_version()} at {sys.executable}")


def check_packages(
    version: Callable[[str], str | None] | None = None, load: Callable[[str], Any] = importlib.import_module
) -> list[Finding]:
    """The packages that every run needs: there, new enough, and importable."""
    version = version or version_of
    lowest = lowest_versions()
    findings = []
    for name, module in PACKAGES.items():
        found, wanted = version(name), lowest.get(name, "0")
        install = f'{sys.executable} -m pip install "{name}>={wanted}"'
        if found is None:
            findings.append(Finding(name, PROBLEM, "not installed", install))
        elif numbers(found) < numbers(wanted):
            findings.append(Finding(name, PROBLEM, f"{found}, older than {wanted}", install))
        else:
            findings.append(_importable(name, module, found, load, fix=f"{install} --force-reinstall"))
    return findings


def _importable(name: str, module: str, version: str, load: Callable[[str], Any], *, fix: str) -> Finding:
    try:
        load(module)
    except Exception as error:
        return Finding(name, PROBLEM, f"{version}, but it cannot be imported: {first_line(error)}", fix)
    return Finding(name, OK, version)


def first_line(error: Exception) -> str:
    """The first line of an error's text, or its kind where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def check_cpu(*, has_bf16: bool) -> Finding:
    precision = "bf16 in hardware" if has_bf16 else "no bf16 instructions, so fp32"
    return Finding("cpu", OK, f"{num_usable_cpus()} usable of {os.cpu_count()}, {cpu_name()}; {precision}")


def check_gpu(
    gpus: list[str],
    *,
    has_hardware: bool,
    driver: str | None,
    driver_cuda: tuple[int, int] | None,
    torch_cuda: tuple[int, int] | None,
) -> Finding:
    """The GPU and its driver; a GPU that is there and cannot be used is a problem.

    Args:
        gpus: names of those that torch can use.
        has_hardware: whether the machine has an NVIDIA device at all.
        driver: the driver's version, None where none is loaded.
        driver_cuda: the newest CUDA that the driver speaks.
        torch_cuda: the CUDA that torch was built for, None for a CPU build.
    """
    if gpus:
        counted = f"{len(gpus)} x {gpus[0]}" if len(set(gpus)) == 1 else ", ".join(gpus)
        return Finding("gpu", OK, f"{counted}, driver {driver or 'of unknown version'}")
    if not has_hardware:
        return Finding("gpu", OPTIONAL, "no NVIDIA GPU in this machine: runs use the CPU")
    if driver is None:
        return Finding("gpu", PROBLEM, "an NVIDIA GPU is there, its driver is not loaded", INSTALL_DRIVER)
    if torch_cuda is None:
        fix = f"{sys.executable} -m pip install --force-reinstall torch torchvision"
        return Finding("gpu", PROBLEM, f"driver {driver} is there, torch is a build for CPUs", fix)
    if driver_cuda is not None and driver_cuda[0] < torch_cuda[0]:
        found = f"driver {driver} speaks CUDA {_dotted(driver_cuda)}, torch was built for {_dotted(torch_cuda)}"
        return Finding("gpu", PROBLEM, found, INSTALL_DRIVER)
    hint = "nvidia-smi (and CUDA_VISIBLE_DEVICES, or the container's --gpus all)"
    return Finding("gpu", PROBLEM, f"driver {driver} is loaded, torch finds no device", hint)


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


def check_dali(*, is_there: bool, load: Callable[[], Any]) -> Finding:
    """DALI decodes; without it torchvision does, on the CPU and slower."""
    install = f"{sys.executable} -m pip install nvidia-dali-cuda130"
    if not is_there:
        return Finding("dali", OPTIONAL, "not installed: images are decoded by torchvision, slower", install)
    try:
        load()
    except Exception as error:
        return Finding("dali", PROBLEM, f"it cannot be imported: {first_line(error)}", f"{install} --force-reinstall")
    return Finding("dali", OK, version_of("nvidia-dali-cuda130") or "there")


def check_jpeg(backends: Mapping[str, str | None], *, has_gpu: bool) -> Finding:
    """Which of nvImageCodec's backends decode a JPEG; on a GPU the hardware and nvJPEG should.

    Args:
        backends: by backend None, or why it does not.
        has_gpu: whether torch can use one.
    """
    name = "jpeg decoders"
    works = [backend for backend, failure in backends.items() if failure is None]
    reasons: dict[str, list[str]] = {}
    for backend, failure in backends.items():
        if failure is not None:
            reasons.setdefault(failure, []).append(backend)
    found = "; ".join(
        [f"{', '.join(works) or 'none'} decode{'s' * (len(works) == 1)} a JPEG"]
        + [f"not {', '.join(failing)}: {reason}" for reason, failing in reasons.items()]
    )
    if CPU not in works:
        fix = f"{sys.executable} -m pip install --force-reinstall nvidia-nvimgcodec-cu13"
        return Finding(name, OPTIONAL, found, fix)
    if not has_gpu or HARDWARE in works:
        return Finding(name, OK if has_gpu else OPTIONAL, found)
    if NVJPEG in works:
        return Finding(name, OPTIONAL, found, f"a GPU with a JPEG decoder (A100, H100 and later) needs {NVCUVID}")
    return Finding(name, OPTIONAL, found, f"{sys.executable} -m pip install nvidia-nvjpeg")


def check_nvcuvid(*, has_gpu: bool, failure: str | None) -> Finding:
    """The driver's library without which the hardware JPEG decoder is not used, and nothing says so."""
    if not has_gpu:
        return Finding("libnvcuvid", OPTIONAL, "needs a GPU: the hardware JPEG decoder's library")
    if failure is None:
        return Finding("libnvcuvid", OK, f"{NVCUVID} can be loaded: the hardware JPEG decoder has its library")
    fix = "in a container NVIDIA_DRIVER_CAPABILITIES must include video; else sudo apt install libnvcuvid1 (Debian)"
    return Finding("libnvcuvid", OPTIONAL, f"no hardware JPEG decoder without it: {failure}", fix)


def check_numba_cuda(*, has_gpu: bool, is_there: bool) -> Finding:
    if is_there:
        return Finding("numba-cuda", OK if has_gpu else OPTIONAL, "installed" + ("" if has_gpu else "; needs a GPU"))
    if not has_gpu:
        return Finding("numba-cuda", OPTIONAL, "not installed; needs a GPU")
    fix = f'{sys.executable} -m pip install "numba-cuda[cu13]"'
    return Finding("numba-cuda", PROBLEM, "not installed: runs on the GPU rank with it", fix)


def check_compile(*, compiler: str | None, has_gpu: bool, has_triton: bool) -> Finding:
    """torch.compile needs a C++ compiler on a CPU, and Triton besides on a GPU."""
    if compiler is None:
        return Finding("compile", OPTIONAL, "no C++ compiler: --no-compile only", INSTALL_COMPILER)
    if has_gpu and not has_triton:
        return Finding("compile", OPTIONAL, "no Triton: --no-compile only", f"{sys.executable} -m pip install triton")
    return Finding("compile", OK, f"torch.compile through {compiler}" + (" and Triton" if has_gpu else ""))


def check_precisions(gpus: list[str], *, has_bf16_cpu: bool) -> Finding:
    if gpus:
        return Finding("precisions", OK, "fp16, bf16, fp32 on the GPU")
    slow = "" if has_bf16_cpu else " (slowly)"
    return Finding("precisions", OK, f"fp32, bf16{slow} on the CPU; fp16 needs a GPU")


def check_store(store: str, *, is_there: bool) -> Finding:
    """Shards in object stores; the scheme's package is an extra."""
    if is_there:
        return Finding(f"{store}://", OK, "shards can be read from there")
    fix = f'{sys.executable} -m pip install "vitscore[{store}]"'
    return Finding(f"{store}://", OPTIONAL, "its package is not installed", fix)


# The facts of this machine


def version_of(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def lowest_versions() -> Mapping[str, str]:
    """The lower bound of each dependency, as this package declares them."""
    try:
        declared = metadata.requires("vitscore") or []
    except metadata.PackageNotFoundError:
        return {}
    found = (re.match(r"([A-Za-z0-9_.-]+)[^;>]*>=([0-9.]+)", line) for line in declared)
    bounds: dict[str, str] = {}
    for match in found:
        if match:
            bounds.setdefault(match[1].lower(), match[2])
    return bounds


def numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: enough to compare it with a bound."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in match[0].split(".")) if match else ()


def torch_cuda_version() -> tuple[int, int] | None:
    import torch

    built_for = torch.version.cuda
    return (numbers(built_for)[0], numbers(built_for)[1]) if built_for else None


def find_gpus() -> list[str]:
    import torch

    if not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def find_compiler() -> str | None:
    wanted = os.environ.get("CXX", "")
    return next((name for name in (wanted, "g++", "clang++", "c++") if name and shutil.which(name)), None)
