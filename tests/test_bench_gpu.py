"""`make gpu`: its steps go on after a failure, within their time; without a GPU it says so."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vitscore.bench.gpu import TOTAL_S, Step, gpu_tests, run_steps, steps, summary
from vitscore.bench.harness.catalogue import time_limit_s

Call = Callable[..., Any]
ROOT = Path(__file__).parent.parent


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


def test_a_step_that_fails_or_takes_too_long_does_not_stop_the_next(tmp_path: Path) -> None:
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(30)'])"
    done = run_steps(
        [
            Step("fails", python("raise SystemExit(3)"), 60),
            Step("hangs", python(child), 1),
            Step("works", python("open('made', 'w').close()"), 60),
        ],
        cwd=tmp_path,
    )
    assert [step.said for step in done] == ["exit 3", "over its time", "ok"]
    assert (tmp_path / "made").exists() and done[1].seconds < 20
    assert [line.split()[0] for line in summary(done, tmp_path)[2:5]] == ["fails", "hangs", "works"]


def test_a_step_is_told_how_long_it_may_take(tmp_path: Path) -> None:
    code = "from vitscore.bench.harness.catalogue import time_limit_s; open('told', 'w').write(str(time_limit_s()))"
    run_steps([Step("one", python(code), 60)], cwd=tmp_path, total_s=30)
    assert float((tmp_path / "told").read_text()) == pytest.approx(30, abs=1)
    assert time_limit_s() is None


def test_no_step_begins_when_the_time_is_up(tmp_path: Path) -> None:
    done = run_steps([Step("late", python("open('made', 'w').close()"), 60)], cwd=tmp_path, total_s=0)
    assert done[0].said == "no time left" and not (tmp_path / "made").exists()


def test_all_steps_fit_into_eight_minutes(tmp_path: Path) -> None:
    wanted = steps(tmp_path)
    assert [step.name for step in wanted] == ["tests", "whole", "decoding", "forward", "picture"]
    assert TOTAL_S < 480 and sum(step.limit_s for step in wanted[:-2]) < TOTAL_S


def test_only_files_with_gpu_tests_are_collected() -> None:
    found = {path.name for path in gpu_tests(ROOT / "tests")}
    assert {"test_decode.py", "test_kernels_cuda.py", "test_run.py"} <= found
    assert "test_metrics.py" not in found


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_without_a_gpu_it_says_so_and_exits_4(tmp_path: Path) -> None:
    """As `make gpu` starts it: a tree of links on the path, nothing installed."""
    (tmp_path / "vitscore").mkdir()
    for path in (*(ROOT / "vitscore").iterdir(), *(ROOT / name for name in ("kernels", "shards", "bench"))):
        (tmp_path / "vitscore" / path.name).symlink_to(path)
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONSAFEPATH": "1", "OUT": str(tmp_path / "out")}
    done = subprocess.run(
        [sys.executable, "-m", "vitscore.bench.gpu"], env=env, capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 4
    assert done.stderr.count("\n") == 1 and "no CUDA device" in done.stderr
    assert not (tmp_path / "out").exists()


def test_the_makefile_takes_an_interpreter_that_is_there() -> None:
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(r"^gpu: \$\(if \$\(GPU_PYTHON\),,\$\(READY\)\) links", makefile, re.M)
    done = subprocess.run(
        ["make", "--dry-run", "gpu", "GPU_PYTHON=/opt/python3"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert "/opt/python3 -m vitscore.bench.gpu" in done.stdout and "pip install" not in done.stdout
