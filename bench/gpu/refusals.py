"""Runs that cannot have all they need: little memory, hardly any, a GPU that another rank has."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vitscore.bench.gpu.day import NO_GPU, Day, has_gpu
from vitscore.bench.gpu.prepare import corpus

LITTLE, HARDLY_ANY = 5 << 30, 1 << 30
"""Bytes of the GPU that a neighbour leaves free: for a smaller batch; for no run at all."""


@contextmanager
def neighbour(leaves: int) -> Iterator[None]:
    """Hold all of the GPU's memory but this; nothing without a GPU."""
    if not has_gpu():
        yield
        return
    import torch

    free, _ = torch.cuda.mem_get_info()
    held = torch.empty(max(1, free - leaves), dtype=torch.uint8, device="cuda")
    try:
        yield
    finally:
        del held
        torch.cuda.empty_cache()


def start(command: list[str], *, limit_s: float) -> subprocess.CompletedProcess[str]:
    """Run a command; what it says is in the log too."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=limit_s)
    sys.stdout.write(f"{' '.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-8000:]}\nexit {done.returncode}\n")
    sys.stdout.flush()
    return done


def command_of(shards: Path, model: Path | str, output: Path) -> list[str]:
    return ["-m", "vitscore", "run", str(shards), "-m", str(model), "-o", str(output), "--overwrite", "--no-compile"]


def little_memory(day: Day) -> None:
    """A run beside a neighbour that leaves little memory, then beside one that leaves hardly any."""
    out = day.work / "run"
    with corpus(day, 1) as shards:
        words = [sys.executable, *command_of(shards, day.checkpoint("B/16"), out)]
        with neighbour(LITTLE):
            done = start(words, limit_s=60)
        record = json.loads((out / "run.json").read_bytes()) if done.returncode == 0 else {}
        size = record.get("choices", {}).get("batch_size", {})
        note = f"exit {done.returncode}, {size.get('value', '?')}: {size.get('reason', last_line(done.stderr))}"
        if not has_gpu():
            day.could_not("little memory", f"{NO_GPU}: memory was not limited; {note}")
            day.could_not("almost no memory", NO_GPU)
            return
        is_smaller = done.returncode == 0 and size["value"] < day.sizes.batch_size
        day.figure("little memory", "a smaller batch" if is_smaller else "not so", note=note, left_bytes=LITTLE)
        with neighbour(HARDLY_ANY):
            done = start(words, limit_s=60)
        day.figure("almost no memory", refused(done), note=f"exit {done.returncode}: {last_line(done.stderr)}")


def refused(done: subprocess.CompletedProcess[str]) -> str:
    """Whether a command ended with 4 and one line."""
    is_one_line = "Traceback" not in done.stderr and len(done.stderr.strip().splitlines()) == 1
    return "refused" if done.returncode == 4 and is_one_line else "not in words"


def two_processes(day: Day) -> None:
    """Two ranks on a machine whose GPU is one: one line, and the ranks end with 4."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    words = [*torchrun, *command_of(Path("demo"), "demo-vit", day.work / "run"), "--device", "cuda"]
    done = start(words, limit_s=60)
    ours = own_lines(done.stderr)
    is_refused = len(ours) == 1 and "exitcode  : 4 " in done.stderr and done.stderr.count("Traceback") <= 1
    note = "; ".join(ours)[:300] + ("" if has_gpu() else f" ({NO_GPU}: refused for that alone)")
    day.figure("two processes", "refused" if is_refused else "not in words", note=note, exit_code=done.returncode)


LAUNCHER = re.compile(
    r"\s*$|[WEI]\d{4} |[ \[*=-]|Setting OMP_NUM_THREADS|Traceback|torch\.distributed|Failures:|Root Cause|.* FAILED$"
)
"""Lines of torchrun on standard error: its log, its own traceback, its report of the ranks that failed."""


def own_lines(text: str) -> list[str]:
    """The lines of standard error that are not torchrun's."""
    return [line for line in text.splitlines() if not LAUNCHER.match(line)]


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["nothing was said"])[-1]
