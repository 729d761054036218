"""`vitscore doctor` on this machine, and its checks with the facts of other machines."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vitscore.cli import doctor
from vitscore.decode.backends import BACKENDS, NVCUVID, failure_to_load, jpeg_backends

Call = Callable[..., Any]
GPU = {"has_hardware": True, "driver": "580.65.06", "driver_cuda": (13, 0), "torch_cuda": (13, 0)}


def test_this_machine_is_ready_and_the_report_says_so(vitscore: Call) -> None:
    done = vitscore("doctor")
    assert done.code == 0, done.err
    names = [line[3:].split()[0] for line in done.out.splitlines() if line[:3].strip()]
    for name in ("python", "torch", "cpu", "gpu", "dali", "jpeg", "libnvcuvid", "numba-cuda", "compile", "precisions"):
        assert name in names
    document = json.loads(vitscore("doctor", "--json").out)
    assert document["ready"] and [finding["name"].split()[0] for finding in document["findings"]] == names


def test_what_doctor_says_of_the_gpu_is_what_torch_sees() -> None:
    import torch

    (gpu,) = [finding for finding in doctor.examine() if finding.name == "gpu"]
    assert (gpu.state == doctor.OK) == torch.cuda.is_available()


@pytest.mark.parametrize(
    "gpus, changed, state, said, fix",
    [
        (["H100"], {}, "ok", "1 x H100, driver 580.65.06", ""),
        (["H100", "H100"], {}, "ok", "2 x H100", ""),
        ([], {"has_hardware": False, "driver": None}, "optional", "no NVIDIA GPU", ""),
        ([], {"driver": None}, "problem", "its driver is not loaded", "nvidia-driver"),
        ([], {"torch_cuda": None}, "problem", "torch is a build for CPUs", "pip install --force-reinstall torch"),
        ([], {"driver_cuda": (12, 4)}, "problem", "supports CUDA 12.4, but torch was built for 13.0", "nvidia-driver"),
        ([], {}, "problem", "torch finds no device", "nvidia-smi"),
    ],
)
def test_a_gpu_that_is_there_must_be_usable(gpus: list[str], changed: dict, state: str, said: str, fix: str) -> None:
    finding = doctor.check_gpu(gpus, **{**GPU, **changed})
    assert finding.state == state and said in finding.found and fix in finding.fix
    assert bool(finding.fix) == (state == "problem")


@pytest.mark.parametrize(
    "versions, broken, said, fix",
    [
        ({"torchvision": None}, "", "not installed", 'pip install "torchvision>=0.26"'),
        ({"torch": "2.9.1"}, "", "2.9.1, older than 2.11", 'pip install "torch>=2.11"'),
        ({}, "torchvision", "it cannot be imported: operator torchvision::nms does not exist", "--force-reinstall"),
    ],
)
def test_a_package_that_is_missing_old_or_broken_is_a_problem(versions: dict, broken: str, said: str, fix: str) -> None:
    def load(module: str) -> None:
        if module == broken:
            raise RuntimeError("operator torchvision::nms does not exist\nmore")

    findings = doctor.check_packages(lambda name: versions.get(name, "9999"), load)
    (wrong,) = doctor.problems(findings)
    assert said in wrong.found and fix in wrong.fix


def test_what_is_missing_is_exit_4_and_the_report_is_still_there(
    vitscore: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = doctor.version_of
    monkeypatch.setattr(doctor, "version_of", lambda name: None if name == "webdataset" else real(name))
    done = vitscore("doctor")
    assert done.code == 4 and done.err.count("\n") == 1
    assert f'webdataset - got not installed. {sys.executable} -m pip install "webdataset>=' in done.err
    assert "!! webdataset" in done.out
    assert not json.loads(vitscore("doctor", "--json").out)["ready"]


@pytest.mark.parametrize(
    "finding, state, said",
    [
        (doctor.check_dali(is_there=False, load=lambda: None), "optional", "pip install nvidia-dali-cuda130"),
        (doctor.check_dali(is_there=True, load=lambda: 1 / 0), "problem", "--force-reinstall"),
        (doctor.check_numba_cuda(has_gpu=True, is_there=False), "problem", "numba-cuda[cu13]"),
        (doctor.check_compile(compiler=None, has_gpu=False, has_triton=False), "optional", "apt install g++"),
        (doctor.check_compile(compiler="g++", has_gpu=True, has_triton=False), "optional", "pip install triton"),
        (doctor.check_store("s3", is_there=False), "optional", 'pip install "vitscore[s3]"'),
    ],
)
def test_what_is_missing_comes_with_the_command_that_installs_it(
    finding: doctor.Finding, state: str, said: str
) -> None:
    assert finding.state == state and said in finding.fix


ALL: dict[str, str | None] = dict.fromkeys(BACKENDS)
NO_HARDWARE = {**ALL, "HW_GPU_ONLY": "Could not create decoder. Code: 7"}
ON_THE_CPU = {**NO_HARDWARE, "HYBRID_CPU_GPU": "it does not decode JPEGs here"}


@pytest.mark.parametrize(
    "backends, has_gpu, state, said, fix",
    [
        (ALL, True, "ok", "HW_GPU_ONLY, HYBRID_CPU_GPU, GPU_ONLY, CPU_ONLY decode a JPEG", ""),
        (NO_HARDWARE, True, "optional", "not HW_GPU_ONLY: Could not create decoder. Code: 7", NVCUVID),
        (ON_THE_CPU, True, "optional", "not HYBRID_CPU_GPU: it does not decode", "pip install nvidia-nvjpeg"),
        ({**ALL, "CPU_ONLY": "No module"}, True, "optional", "not CPU_ONLY: No module", "nvidia-nvimgcodec"),
        (
            {name: None if name == "CPU_ONLY" else "Failed to load libcuda.so" for name in BACKENDS},
            False,
            "optional",
            "CPU_ONLY decodes a JPEG; not HW_GPU_ONLY, HYBRID_CPU_GPU, GPU_ONLY: Failed to load libcuda.so",
            "",
        ),
    ],
)
def test_which_backends_decode_a_jpeg_is_said(
    backends: dict[str, str | None], has_gpu: bool, state: str, said: str, fix: str
) -> None:
    finding = doctor.check_jpeg(backends, has_gpu=has_gpu)
    assert finding.state == state and said in finding.found and fix in finding.fix and bool(finding.fix) == bool(fix)


@pytest.mark.parametrize(
    "has_gpu, failure, state, said, fix",
    [
        (True, None, "ok", "can be loaded", ""),
        (True, "libnvcuvid.so.1: cannot open", "optional", "cannot open", "NVIDIA_DRIVER_CAPABILITIES must includ"),
        (False, "libnvcuvid.so.1: cannot open", "optional", "needs a GPU", ""),
    ],
)
def test_the_hardware_decoders_library_is_looked_for(
    has_gpu: bool, failure: str | None, state: str, said: str, fix: str
) -> None:
    finding = doctor.check_nvcuvid(has_gpu=has_gpu, failure=failure)
    assert finding.state == state and said in finding.found and fix in finding.fix and bool(finding.fix) == bool(fix)


def test_every_backend_is_given_a_jpeg_on_this_machine(capfd: pytest.CaptureFixture[str]) -> None:
    import torch

    failures = jpeg_backends()
    assert tuple(failures) == BACKENDS and failures["CPU_ONLY"] is None
    for failure in filter(None, failures.values()):
        assert "\n" not in failure and "\x1b" not in failure and len(failure) < 400
    if not torch.cuda.is_available():
        assert all(failures[name] and "libcuda" in failures[name] for name in BACKENDS if name != "CPU_ONLY")
        assert failure_to_load(NVCUVID)
    assert failure_to_load("libc.so.6") is None
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""  # messages of the libraries do not reach the terminal


def test_without_nvimagecodec_every_backend_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.nvimgcodec", None)
    assert all("nvimgcodec" in (failure or "") for failure in jpeg_backends().values())


def test_the_probe_needs_no_torch() -> None:
    code = "import sys, vitscore.decode.backends as d; d.jpeg_backends(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n" and done.stderr == ""


def test_the_bus_is_asked_for_nvidias_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, vendor, kind in (("a", "0x8086", "0x030000"), ("b", "0x10de", "0x0c0330")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "vendor").write_text(f"{vendor}\n")
        (tmp_path / name / "class").write_text(f"{kind}\n")
    is_driver_there = Path("/dev/nvidiactl").exists()
    assert doctor.has_nvidia_hardware(tmp_path) == is_driver_there
    (tmp_path / "b" / "class").write_text("0x030200\n")
    assert doctor.has_nvidia_hardware(tmp_path)


def test_the_drivers_version_is_read_from_its_own_words(tmp_path: Path) -> None:
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release\n")
    assert doctor.driver_version(tmp_path / "version") == "580.65.06"
    assert doctor.driver_version(tmp_path / "none") is None
