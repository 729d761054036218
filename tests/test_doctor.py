"""`vitscore doctor`: this machine is examined for real; other machines are told to the checks."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vitscore.cli import doctor

Call = Callable[..., Any]
GPU = {"has_hardware": True, "driver": "580.65.06", "driver_cuda": (13, 0), "torch_cuda": (13, 0)}


def test_this_machine_is_ready_and_the_report_says_so(vitscore: Call) -> None:
    done = vitscore("doctor")
    assert done.code == 0, done.err
    names = [line[3:].split()[0] for line in done.out.splitlines() if line[:3].strip()]
    for name in ("python", "torch", "cpu", "gpu", "dali", "nvjpeg", "numba-cuda", "compile", "precisions"):
        assert name in names
    document = json.loads(vitscore("doctor", "--json").out)
    assert document["ready"] and [finding["name"] for finding in document["findings"]] == names


def test_what_doctor_says_of_the_gpu_is_what_torch_sees() -> None:
    import torch

    (found,) = [finding for finding in doctor.examine() if finding.name == "gpu"]
    assert (found.state == doctor.OK) == torch.cuda.is_available()


@pytest.mark.parametrize(
    "gpus, changed, state, said, fix",
    [
        (["H100"], {}, "ok", "1 x H100, driver 580.65.06", ""),
        (["H100", "H100"], {}, "ok", "2 x H100", ""),
        ([], {"has_hardware": False, "driver": None}, "optional", "no NVIDIA GPU", ""),
        ([], {"driver": None}, "problem", "its driver is not loaded", "nvidia-driver"),
        ([], {"torch_cuda": None}, "problem", "torch is a build for CPUs", "pip install --force-reinstall torch"),
        ([], {"driver_cuda": (12, 4)}, "problem", "speaks CUDA 12.4, torch was built for 13.0", "nvidia-driver"),
        ([], {}, "problem", "torch finds no device", "nvidia-smi"),
    ],
)
def test_a_gpu_that_is_there_must_be_usable(gpus: list[str], changed: dict, state: str, said: str, fix: str) -> None:
    found = doctor.check_gpu(gpus, **{**GPU, **changed})
    assert found.state == state and said in found.found and fix in found.fix
    assert bool(found.fix) == (state == "problem")


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
    "found, state, said",
    [
        (doctor.check_dali(is_there=False, load=lambda: None), "optional", "pip install nvidia-dali-cuda130"),
        (doctor.check_dali(is_there=True, load=lambda: 1 / 0), "problem", "--force-reinstall"),
        (doctor.check_nvjpeg(has_gpu=True, is_there=False), "optional", "pip install nvidia-nvjpeg"),
        (doctor.check_nvjpeg(has_gpu=True, is_there=True), "ok", ""),
        (doctor.check_numba_cuda(has_gpu=True, is_there=False), "problem", "numba-cuda[cu13]"),
        (doctor.check_compile(compiler=None, has_gpu=False, has_triton=False), "optional", "apt install g++"),
        (doctor.check_compile(compiler="g++", has_gpu=True, has_triton=False), "optional", "pip install triton"),
        (doctor.check_store("s3", is_there=False), "optional", 'pip install "vitscore[s3]"'),
    ],
)
def test_what_is_missing_comes_with_the_command_that_installs_it(found: doctor.Finding, state: str, said: str) -> None:
    assert found.state == state and said in found.fix


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
