"""Measure: figures that keep their rounds, separate processes, functions timed in turn.

A figure is a plain dict, `{"unit", "median", "low", "high", "rounds"}`, the same as in the JSON; what
compares two benches, or plans from one, looks for dicts with a `median`.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

Figure = dict[str, Any]
Found = TypeVar("Found")


def figure(rounds: Sequence[float], unit: str) -> Figure:
    """Return a figure of one measurement: median, lowest, highest, and all rounds.

    Args:
        rounds: one value a round, at least one.
        unit: `images/s`, `s`, `bytes`, `ratio`, ...
    """
    return {
        "unit": unit,
        "median": statistics.median(rounds),
        "low": min(rounds),
        "high": max(rounds),
        "rounds": list(rounds),
    }


def ratio(above: Figure, below: Figure) -> Figure:
    """The ratio of two figures that were measured in the same rounds, round by round."""
    pairs = zip(above["rounds"], below["rounds"], strict=True)
    return figure([one / other for one, other in pairs], "ratio")


def show(found: Figure, digits: int = 1) -> str:
    """A figure in a table: its median, and in brackets the lowest and highest where there were several rounds."""
    text = f"{found['median']:,.{digits}f}"
    if len(found["rounds"]) > 1:
        text += f" ({found['low']:,.{digits}f}-{found['high']:,.{digits}f})"
    return text


@dataclass(frozen=True)
class Finished:
    """Resources of a finished process."""

    wall_s: float
    cpu_s: float
    """User and system, its children included."""
    peak_rss_bytes: int
    """Of the largest single process."""
    stdout: str


# A process's peak starts from the memory of the one that started it: so a small one stands between us and what is
# measured, and tells what the system counted.
_START = """
import json, os, sys, time
told = int(sys.argv[1])
os.set_inheritable(told, False)
started = time.perf_counter()
_, status, usage = os.wait4(os.posix_spawnp(sys.argv[2], sys.argv[2:], os.environ), 0)
wall_s = time.perf_counter() - started
found = os.waitstatus_to_exitcode(status), wall_s, usage.ru_utime + usage.ru_stime, usage.ru_maxrss
os.write(told, json.dumps(found).encode())
"""


def run_process(command: Sequence[str], *, env: Mapping[str, str] | None = None) -> Finished:
    """Run a command and wait for it; its standard error is passed through.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    reading, told = os.pipe()
    with open(reading, encoding="ascii") as answer:
        words = [sys.executable, "-I", "-S", "-c", _START, str(told), *command]
        try:
            process = subprocess.Popen(
                words, stdout=subprocess.PIPE, text=True, env={**os.environ, **(env or {})}, pass_fds=[told]
            )
        finally:
            os.close(told)
        stdout, _ = process.communicate()
        found = answer.read()
    code, wall_s, cpu_s, peak_rss = json.loads(found) if found else (process.returncode, 0.0, 0.0, 0)
    if code:
        raise subprocess.CalledProcessError(code, list(command), stdout)
    unit = 1 if sys.platform == "darwin" else 1024
    return Finished(wall_s, cpu_s, peak_rss * unit, stdout)


def rounds_in_turn(ways: Mapping[str, Callable[[], Found]], rounds: int) -> dict[str, list[Found]]:
    """Measure every way once a round, so that other load on the machine affects all of them alike.

    Args:
        ways: by name, what measures once and returns its value, or several in a record.
        rounds: how many times each.
    """
    found: dict[str, list[Found]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, measure in ways.items():
            found[name].append(measure())
    return found


def wait_for_device() -> None:
    """Wait until the GPU has done all that it was given; returns at once where torch uses none.

    Called at both ends of every measured window: calls return when work is queued, and without this a rate would be
    that of queueing.
    """
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def clock() -> float:
    """Seconds, read when the device has caught up."""
    wait_for_device()
    return time.perf_counter()


def rate(count: int, work: Callable[[], Any], *, at_least_s: float = 1.0) -> float:
    """How many of `count` a second `work` does, over as many calls as `at_least_s` needs; once before, unmeasured."""
    work()
    started = clock()
    calls = 0
    while time.perf_counter() - started < at_least_s or not calls:
        work()
        calls += 1
    return calls * count / (clock() - started)


def stage_rate(
    submit: Callable[[Sequence[Any]], Callable[[], object]],
    batches: Sequence[Sequence[Any]],
    *,
    depth: int,
    at_least_s: float,
) -> float:
    """Images/s of a stage that always has batches under way, over and over; one time around unmeasured.

    The device is waited for at both ends: what was under way at the start is done before the clock starts, and what is
    under way at the end was given out within the time measured, so both ends leave as many batches uncollected.

    Args:
        submit: begins a batch; returns what waits for its end.
        batches: by turns.
        depth: how many are under way.
        at_least_s: measured.
    """
    waiting: deque[tuple[int, Callable[[], object]]] = deque()
    num_images, started, turn = 0, time.perf_counter(), 0
    while time.perf_counter() - started < at_least_s or turn <= len(batches) + depth:
        if turn == len(batches):
            num_images, started = 0, clock()
        batch = batches[turn % len(batches)]
        waiting.append((len(batch), submit(batch)))
        if len(waiting) == depth:
            count, collect = waiting.popleft()
            collect()
            num_images += count
        turn += 1
    rate = num_images / (clock() - started)
    while waiting:
        waiting.popleft()[1]()
    return rate
