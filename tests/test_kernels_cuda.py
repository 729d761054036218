"""The CUDA kernels: under numba's simulator on every machine, and on a GPU if there is one."""

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


def test_the_twins_compile_with_a_numpy_that_has_no_row_stack() -> None:
    """NumPy 2.5, for which numba-cuda 0.30 registers a function that is not there."""
    pytest.importorskip("cuda.bindings")
    code = (
        "import runpy, sys, numpy as np\n"
        "if hasattr(np, 'row_stack'):\n    del np.row_stack\n    np.__all__.remove('row_stack')\n"
        "runpy.run_path(sys.argv[1])['check_compiled']()\n"
        "assert not hasattr(np, 'row_stack')"
    )
    done = subprocess.run([sys.executable, "-c", code, str(TWINS)], capture_output=True, text=True, check=False)
    if "libnvrtc.so" in done.stderr or "libnvvm.so" in done.stderr:
        pytest.skip("CUDA's compiler libraries are not installed")
    assert done.returncode == 0, done.stderr


def test_the_twins_agree_under_the_simulator() -> None:
    pytest.importorskip("numba.cuda")
    run(NUMBA_ENABLE_CUDASIM="1")


def test_counts_keep_their_order_over_streams_that_are_late() -> None:
    pytest.importorskip("numba.cuda")
    run("streams", NUMBA_ENABLE_CUDASIM="1")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_the_twins_agree_on_the_device() -> None:
    run("thorough")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_torch_tensors_are_counted_on_their_own_streams() -> None:
    """Only `compute` waits; every stream is busy for a tenth of a second before it counts."""
    from vitscore.kernels import DeviceConfusionCounts

    counts, expected = DeviceConfusionCounts(10), torch.zeros((10, 10), dtype=torch.int64)
    made = []
    for stream in (torch.cuda.Stream(), torch.cuda.Stream(), torch.cuda.default_stream()):
        with torch.cuda.stream(stream):
            torch.cuda._sleep(200_000_000)
            labels = torch.randint(0, 10, (100_000,), device="cuda")
            preds = torch.randint(0, 10, (100_000,), device="cuda", dtype=torch.int32)
            counts.update(preds, labels, stream=stream.cuda_stream)
            made.append((labels, preds))
    confusion = torch.as_tensor(counts.compute())
    for labels, preds in made:
        expected += torch.bincount(labels.cpu() * 10 + preds.cpu(), minlength=100).reshape(10, 10)
    assert (confusion == expected).all()
