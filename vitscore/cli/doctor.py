"""`vitscore doctor`: report what this machine can do, what is missing, and the command that installs it.

Each check returns a finding: `ok`, `optional` (missing, but runs work without it) or `problem` (a run would fail, or
would not use a GPU of this machine). The checks only report; `plan/choices.py` makes the choices of a run. They take
the facts as arguments, so that tests can describe other machines.
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
# The packages that a run imports, except for DALI, which has its own check. All are imported, to find broken installs.
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
    """A line of the report."""

    name: str
    state: str
    found: str
    fix: str = ""
    """The command that installs or repairs it, if something is missing."""


def examine() -> list[Finding]:
    """Run all checks on this machine."""
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
    """Return the report as a JSON document."""
    findings = list(findings)
    return {"schema": 1, "ready": not problems(findings), "findings": [asdict(finding) for finding in findings]}


def lines_of(findings: Iterable[Finding]) -> list[str]:
    """Return the report as text: one line per finding, and one for its fix."""
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
    """Check that the packages of every run are installed, new enough, and importable."""
    version = version or version_of
    lowest = lowest_versions()
    findings = []
    for name, module in PACKAGES.items():
        installed, wanted = version(name), lowest.get(name, "0")
        install = f'{sys.executable} -m pip install "{name}>={wanted}"'
        if installed is None:
            findings.append(Finding(name, PROBLEM, "not installed", install))
        elif numbers(installed) < numbers(wanted):
            findings.append(Finding(name, PROBLEM, f"{installed}, older than {wanted}", install))
        else:
            findings.append(_importable(name, module, installed, load, fix=f"{install} --force-reinstall"))
    return findings


def _importable(name: str, module: str, version: str, load: Callable[[str], Any], *, fix: str) -> Finding:
    try:
        load(module)
    except Exception as error:
        return Finding(name, PROBLEM, f"{version}, but it cannot be imported: {first_line(error)}", fix)
    return Finding(name, OK, version)


def first_line(error: Exception) -> str:
    """Return the first line of an error's text, or its type if it has no text."""
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
    """Check the GPU and its driver; an NVIDIA GPU that cannot be used is a problem.

    Args:
        gpus: the names of the GPUs that torch can use.
        has_hardware: whether the machine has an NVIDIA device.
        driver: the version of the loaded driver, None if no driver is loaded.
        driver_cuda: the newest CUDA version that the driver supports.
        torch_cuda: the CUDA version that torch was built for, None for a CPU build.
    """
    if gpus:
        counted = f"{len(gpus)} x {gpus[0]}" if len(set(gpus)) == 1 else ", ".join(gpus)
        return Finding("gpu", OK, f"{counted}, driver {driver or 'of unknown version'}")
    if not has_hardware:
        return Finding("gpu", OPTIONAL, "no NVIDIA GPU in this machine: runs use the CPU")
    if driver is None:
        return Finding("gpu", PROBLEM, "this machine has an NVIDIA GPU, but its driver is not loaded", INSTALL_DRIVER)
    if torch_cuda is None:
        fix = f"{sys.executable} -m pip install --force-reinstall torch torchvision"
        return Finding("gpu", PROBLEM, f"driver {driver} is loaded, but torch is a build for CPUs", fix)
    if driver_cuda is not None and driver_cuda[0] < torch_cuda[0]:
        text = f"driver {driver} supports CUDA {_dotted(driver_cuda)}, but torch was built for {_dotted(torch_cuda)}"
        return Finding("gpu", PROBLEM, text, INSTALL_DRIVER)
    hint = "nvidia-smi (and CUDA_VISIBLE_DEVICES, or the container's --gpus all)"
    return Finding("gpu", PROBLEM, f"driver {driver} is loaded, but torch finds no device", hint)


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


def check_dali(*, is_there: bool, load: Callable[[], Any]) -> Finding:
    """Check DALI; without it torchvision decodes, on the CPU and slower."""
    install = f"{sys.executable} -m pip install nvidia-dali-cuda130"
    if not is_there:
        return Finding("dali", OPTIONAL, "not installed: torchvision decodes images, which is slower", install)
    try:
        load()
    except Exception as error:
        return Finding("dali", PROBLEM, f"it cannot be imported: {first_line(error)}", f"{install} --force-reinstall")
    return Finding("dali", OK, version_of("nvidia-dali-cuda130") or "installed")


def check_jpeg(backends: Mapping[str, str | None], *, has_gpu: bool) -> Finding:
    """Check which of nvImageCodec's backends decode a JPEG; on a GPU the hardware decoder and nvJPEG should.

    Args:
        backends: by backend the reason why it does not decode a JPEG, or None if it does.
        has_gpu: whether torch can use a GPU.
    """
    name = "jpeg decoders"
    works = [backend for backend, failure in backends.items() if failure is None]
    reasons: dict[str, list[str]] = {}
    for backend, failure in backends.items():
        if failure is not None:
            reasons.setdefault(failure, []).append(backend)
    text = "; ".join(
        [f"{', '.join(works) or 'none'} decode{'s' * (len(works) == 1)} a JPEG"]
        + [f"not {', '.join(failing)}: {reason}" for reason, failing in reasons.items()]
    )
    if CPU not in works:
        fix = f"{sys.executable} -m pip install --force-reinstall nvidia-nvimgcodec-cu13"
        return Finding(name, OPTIONAL, text, fix)
    if not has_gpu or HARDWARE in works:
        return Finding(name, OK if has_gpu else OPTIONAL, text)
    if NVJPEG in works:
        return Finding(name, OPTIONAL, text, f"a GPU with a JPEG decoder (A100, H100 and later) needs {NVCUVID}")
    return Finding(name, OPTIONAL, text, f"{sys.executable} -m pip install nvidia-nvjpeg")


def check_nvcuvid(*, has_gpu: bool, failure: str | None) -> Finding:
    """Check the driver's decoder library; without it the hardware JPEG decoder is silently not used."""
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
    return Finding("numba-cuda", PROBLEM, "not installed: runs on the GPU need it to rank the logits", fix)


def check_compile(*, compiler: str | None, has_gpu: bool, has_triton: bool) -> Finding:
    """Check torch.compile, which needs a C++ compiler, and Triton as well on a GPU."""
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
    """Check that shards can be read from an object store; the package for its scheme is an extra."""
    if is_there:
        return Finding(f"{store}://", OK, "shards can be read from this store")
    fix = f'{sys.executable} -m pip install "vitscore[{store}]"'
    return Finding(f"{store}://", OPTIONAL, "its package is not installed", fix)


# The facts of this machine


def version_of(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def lowest_versions() -> Mapping[str, str]:
    """Return the lower bound of each dependency, as this package declares them."""
    try:
        declared = metadata.requires("vitscore") or []
    except metadata.PackageNotFoundError:
        return {}
    bounds: dict[str, str] = {}
    for line in declared:
        if match := re.match(r"([A-Za-z0-9_.-]+)[^;>]*>=([0-9.]+)", line):
            bounds.setdefault(match[1].lower(), match[2])
    return bounds


def numbers(version: str) -> tuple[int, ...]:
    """Return the leading numbers of a version, for comparison with a bound."""
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
