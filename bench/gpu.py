"""What is to be known of a machine with an NVIDIA GPU, in one command under eight minutes, without a network.

Question: do the tests marked `gpu` pass there (mixed decoding against the CPU's, the CUDA twins, whole runs), and how
          fast are decoding (its sweep of loads and batch sizes included), the forward and a whole run?
Command:  make gpu, or with an interpreter that has the packages already: make gpu GPU_PYTHON=python3
Method:   each step is a process of its own with a time limit; one that fails or takes too long does not stop the next.
          JSON and the picture go to $OUT, else build/gpu. Exit 0 where all went well, 1 where not, 4 without a GPU.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vitscore.bench.harness.catalogue import LIMIT_VARIABLE

TOTAL_S = 460.0
"""For all steps together: what starts and ends around them fits into eight minutes."""
GRACE_S = 5.0
"""From Ctrl-C to the end of a step that took too long."""
TOOLKIT = Path("/usr/local/cuda")
TESTS = Path(__file__).resolve().parent.parent / "tests"


@dataclass(frozen=True)
class Step:
    """One process and how long it may take."""

    name: str
    command: tuple[str, ...]
    limit_s: float
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Done:
    """How a step ended."""

    name: str
    seconds: float
    said: str
    """`ok`, `exit N`, `over its time`, `no time left`."""


def main() -> int:
    """Run every step, tell how each ended; returns the exit code."""
    if (why := no_gpu()) is not None:
        sys.stderr.write(f"no GPU to measure: {why}. Run it on a machine with an NVIDIA GPU and its driver.\n")
        return 4
    out = Path(os.environ.get("OUT") or "build/gpu").absolute()
    out.mkdir(parents=True, exist_ok=True)
    done = run_steps(steps(out), cwd=out)
    sys.stdout.write("".join(f"{line}\n" for line in summary(done, out)))
    return 0 if all(step.said == "ok" for step in done) else 1


def no_gpu() -> str | None:
    """Why there is no GPU to measure; None where there is one."""
    try:
        import torch
    except ModuleNotFoundError:
        return f"{sys.executable} has no torch"
    return None if torch.cuda.is_available() else "torch finds no CUDA device"


def steps(out: Path) -> list[Step]:
    """The tests, then the benches in the order in which they are missed most, then the picture."""
    bench = (sys.executable, "-m", "vitscore", "bench")
    found = gpu_tests(TESTS)
    pytest = (sys.executable, "-m", "pytest", "-c", str(TESTS.parent / "pyproject.toml"), "-p", "no:cacheprovider")
    how = ("-m", "gpu", "-rsfE", "--tb=short")
    tests = [Step("tests", (*pytest, *how, *map(str, found)), 150, QUICK_TUNING)] if found else []
    return [
        *tests,
        *(Step(name, (*bench, name, "-o", str(out)), limit_s) for name, limit_s in BENCHES.items()),
        Step("picture", (*bench, "picture", str(out)), 20),
    ]


QUICK_TUNING = {"TORCHINDUCTOR_MAX_AUTOTUNE_GEMM_BACKENDS": "ATEN"}
"""For tests, whose models are tiny: torch.compile tries no Triton kernels for products, a minute a model."""
BENCHES = {"whole": 100.0, "decoding": 110.0, "forward": 130.0}
"""Their time limits."""


def gpu_tests(folder: Path) -> list[Path]:
    """The files that hold tests marked `gpu`; others may need packages that such a machine lacks."""
    return [path for path in sorted(folder.glob("test_*.py")) if "mark.gpu" in path.read_text(encoding="utf-8")]


def run_steps(wanted: Sequence[Step], *, cwd: Path, total_s: float = TOTAL_S) -> list[Done]:
    """Run steps one after the other, each within its own limit and all within `total_s`."""
    deadline = time.monotonic() + total_s
    done: list[Done] = []
    for step in wanted:
        sys.stdout.write(f"== {step.name}\n")
        sys.stdout.flush()
        done.append(run_step(step, cwd=cwd, limit_s=min(step.limit_s, deadline - time.monotonic())))
    return done


def run_step(step: Step, *, cwd: Path, limit_s: float) -> Done:
    """Run one step; over its limit it is ended with all that it started, first as by Ctrl-C: pytest then tells."""
    if limit_s <= 0:
        return Done(step.name, 0.0, "no time left")
    started = time.monotonic()
    env = {**os.environ, LIMIT_VARIABLE: f"{limit_s:.0f}", **step.env}
    if TOOLKIT.is_dir():
        env.setdefault("CUDA_HOME", str(TOOLKIT))  # numba looks for NVVM there, where no package brings it
    process = subprocess.Popen(step.command, cwd=cwd, env=env, start_new_session=True)
    try:
        code = process.wait(timeout=limit_s)
        said = "ok" if code == 0 else f"exit {code}"
    except subprocess.TimeoutExpired:
        said = "over its time"
        os.killpg(process.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=GRACE_S)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return Done(step.name, time.monotonic() - started, said)


def summary(done: Sequence[Done], out: Path) -> list[str]:
    lines = ["", f"{'step':<12}{'seconds':>9}  ended"]
    lines += [f"{step.name:<12}{step.seconds:>9.1f}  {step.said}" for step in done]
    return [*lines, f"JSON in {out}"]


if __name__ == "__main__":
    sys.exit(main())
