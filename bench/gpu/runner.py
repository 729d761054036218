"""Run a part's steps one after the other, as processes with limits, within the limit of the part.

A step's output goes to log.txt; one line a step is printed, and the end of the log of one that failed. A step may
take twice its limit from time that earlier steps did not need; over that it gets Ctrl-C, then is killed with all that
it started. Afterwards the folder holds what may stay in it and nothing else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vitscore.bench.gpu import figures, nvvm
from vitscore.bench.gpu.day import Day

LOG, TABLE, TRACE = "log.txt", "table.txt", "trace.json.gz"
KEPT = (figures.FILE, LOG, TABLE, TRACE, "forward.json", "whole.json", "decoding.json")
"""All that a folder of results may hold: fewer than eight files, none in a subfolder."""
MOST_BYTES = 15 << 20
"""Of a file that may stay."""
LOG_BYTES = 1 << 20
"""Of one step in the log: its beginning and its end."""
HEAD = "===== part "
"""Of a step in the log."""
GRACE_S = 3.0
"""Within its limit: from Ctrl-C to the end of a step that took too long."""
TOLD_LINES, TOLD_WIDTH = 15, 160
"""Of the log, printed where a step failed."""
Say = Callable[[str], None]


@dataclass(frozen=True)
class Step:
    """One process and how long it may take."""

    name: str
    limit_s: float
    needs: tuple[str, ...] = ()
    """Steps of the part without whose success this one would say nothing."""
    env: Mapping[str, str] = field(default_factory=dict)
    command: tuple[str, ...] = ()
    """By default this package, asked for the step."""


@dataclass(frozen=True)
class Part:
    """Steps, the most wanted first."""

    limit_s: float
    steps: tuple[Step, ...]

    def scaled(self, factor: float) -> Part:
        """The part with limits so many times as long."""
        steps = tuple(dataclasses.replace(step, limit_s=factor * step.limit_s) for step in self.steps)
        return Part(factor * self.limit_s, steps)


@dataclass(frozen=True)
class Ended:
    """How a step ended."""

    name: str
    seconds: float
    said: str
    """`ok`, `exit N`, `over its time`, `no time left`, `not run: ...`, `interrupted`."""


def run_part(
    part: Part, number: int, *, out: Path, work: Path, is_rehearsal: bool, total_s: float | None = None, say: Say
) -> list[Ended]:
    """Run a part's steps, print its table, and write it to table.txt.

    Args:
        part: the steps.
        number: which part of the day it is.
        out: the folder of results.
        work: the folder of everything else.
        is_rehearsal: whether sizes are tiny, and a GPU is not needed.
        total_s: for the whole part, if that is less than its own limit.
        say: prints a line.
    """
    deadline = time.monotonic() + min(total_s or part.limit_s, part.limit_s)
    figures.forget(out, number)
    env = environment(work)
    ended: list[Ended] = []
    spare_s = 0.0
    with interruptible():
        for step in part.steps:
            limit_s = min(step.limit_s + min(spare_s, step.limit_s), deadline - time.monotonic())
            day = Day(number, step.name, out, work, is_rehearsal, ends=time.time() + limit_s - GRACE_S)
            one = run_step(step, day, env=env, ended=ended)
            ended.append(one)
            spare_s = max(0.0, spare_s + step.limit_s - one.seconds)
            say(f"part {number}  {one.name:<16}{one.seconds:>7.1f} s of {limit_s:>3.0f}  {one.said}")
            if one.said.startswith(("exit", "over")):
                for line in tail(out / LOG):
                    say(f"    | {line}")
            if one.said == "interrupted":
                break
    finish(number, ended, out=out, work=work, is_rehearsal=is_rehearsal, say=say)
    return ended


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Treat SIGTERM as Ctrl-C, so that the table is printed all the same."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def environment(work: Path) -> dict[str, str]:
    """Environment of every step: caches and temporary files away from the results, and NVVM."""
    folders = {
        "TMPDIR": "tmp",
        "HYPOTHESIS_STORAGE_DIRECTORY": "hypothesis",
        "NUMBA_CACHE_DIR": "numba",
        "TORCHINDUCTOR_CACHE_DIR": "inductor",
        "TRITON_CACHE_DIR": "triton",
        "XDG_CACHE_HOME": "cache",
    }
    for name in folders.values():
        (work / name).mkdir(parents=True, exist_ok=True)
    compiler = nvvm.find()
    return {
        **os.environ,
        **{variable: str(work / name) for variable, name in folders.items()},
        **(compiler.variables(work) if compiler else {}),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",
        "HF_HUB_OFFLINE": "1",
        "NO_COLOR": "1",
    }


def run_step(step: Step, day: Day, *, env: Mapping[str, str], ended: Sequence[Ended]) -> Ended:
    """Run one step; over its limit it is ended with all that it started."""
    failed = [one.name for one in ended if one.name in step.needs and one.said != "ok"]
    if failed:
        return Ended(step.name, 0.0, f"not run: it needs {', '.join(failed)}")
    if day.left_s <= 0:
        return Ended(step.name, 0.0, "no time left")
    command = step.command or (sys.executable, "-m", "vitscore.bench.gpu", "step", step.name)
    started = time.monotonic()
    with (day.out / LOG).open("ab") as log:
        log.write(f"\n{HEAD}{day.part}: {step.name} =====\n".encode())
        log.flush()
        begins = log.tell()
        process = subprocess.Popen(
            command,
            cwd=day.work,
            env={**env, **day.to_environment(), **step.env},
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    said = wait(process, day.left_s)
    shorten(day.out / LOG, begins)
    return Ended(step.name, time.monotonic() - started, said)


def wait(process: subprocess.Popen[bytes], limit_s: float) -> str:
    """How a process ended, at the latest when it had to."""
    try:
        code = process.wait(timeout=limit_s)
        return "ok" if code == 0 else f"exit {code}"
    except (subprocess.TimeoutExpired, KeyboardInterrupt) as why:
        os.killpg(process.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=GRACE_S - 1)
        return "over its time" if isinstance(why, subprocess.TimeoutExpired) else "interrupted"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # a driver may hold on to a process
            process.wait(timeout=1)


def shorten(log: Path, begins: int) -> None:
    """Keep the beginning and the end of what one step wrote, where it wrote very much."""
    if log.stat().st_size - begins <= LOG_BYTES:
        return
    with log.open("r+b") as file:
        file.seek(begins)
        head = file.read(LOG_BYTES // 4)
        file.seek(-LOG_BYTES // 2, os.SEEK_END)
        end = file.read()
        file.seek(begins)
        file.write(head + b"\n[... cut ...]\n" + end)
        file.truncate()


def tail(log: Path) -> list[str]:
    """The last lines that the last step wrote."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - (1 << 14)))
        lines = file.read().decode(errors="replace").rpartition(HEAD)[2].splitlines()[1:]
    return [line[:TOLD_WIDTH] for line in lines if line.strip()][-TOLD_LINES:]


def finish(number: int, ended: Sequence[Ended], *, out: Path, work: Path, is_rehearsal: bool, say: Say) -> None:
    """Clear the folder of what may not stay, then print and keep the table."""
    removed = clear(out, work)
    lines = figures.table(number, figures.read(out), {one.name: one.said for one in ended}, is_rehearsal=is_rehearsal)
    if is_rehearsal:
        lines.append("A rehearsal at tiny sizes: nothing here is a measurement.")
    if removed:
        lines.append(f"moved to {work}: {', '.join(removed)}")
    with (out / TABLE).open("a", encoding="utf-8") as file:
        file.write("".join(f"{line}\n" for line in lines) + "\n")
    say("")
    for line in lines:
        say(line)


def clear(out: Path, work: Path) -> list[str]:
    """Move everything out of the folder that has another name, or is too large to be carried; returns its names."""
    removed = []
    for path in sorted(out.iterdir()):
        if path.name in KEPT and path.is_file() and path.stat().st_size <= MOST_BYTES:
            continue
        target = work / "moved" / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(OSError):
            os.replace(path, target)
            removed.append(path.name)
    return removed
