"""The CUDA twins of the kernels: under numba's simulator everywhere, and on a GPU if there is one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TWINS = Path(__file__).parent / "support" / "cudatwins.py"


def start(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(TWINS), *arguments],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def run(*arguments: str, **variables: str) -> None:
    done = start(*arguments, **variables)
    assert done.returncode == 0, done.stderr


def test_the_twins_compile_without_a_gpu() -> None:
    pytest.importorskip("cuda.bindings")
    done = start("compiled")
    if "libnvrtc.so" in done.stderr or "libnvvm.so" in done.stderr:
        pytest.skip("CUDA's compiler libraries are not installed")
    assert done.returncode == 0, done.stderr


def test_the_twins_agree_under_the_simulator() -> None:
    pytest.importorskip("numba.cuda")
    run(NUMBA_ENABLE_CUDASIM="1")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_the_twins_agree_on_the_device() -> None:
    run("thorough")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_torch_tensors_are_counted_on_their_own_stream() -> None:
    from vitscore.kernels.cuda import DeviceConfusionCounts

    counts, stream = DeviceConfusionCounts(10), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        labels = torch.randint(0, 10, (100_000,), device="cuda")
        preds = torch.randint(0, 10, (100_000,), device="cuda", dtype=torch.int32)
        counts.update(preds, labels, stream=stream.cuda_stream)
    stream.synchronize()
    expected = torch.bincount(labels * 10 + preds, minlength=100).reshape(10, 10)
    assert (torch.as_tensor(counts.compute()) == expected.cpu()).all()
