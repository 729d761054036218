"""Killed without a word, and started again: the same parts, the same metrics."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq


def kill_when(command: list[str], *, parts: Path, num_parts: int, timeout_s: float = 120) -> None:
    """Start `command` and kill it as soon as `num_parts` parts are done."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + timeout_s
    while len(list(parts.glob("*.parquet"))) < num_parts and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "the run was over before it could be killed"


def content(folder: Path) -> dict[str, Any]:
    return {path.name: pq.read_table(path).to_pylist() for path in sorted((folder / "parts").glob("*.parquet"))}


def test_a_run_killed_twice_ends_as_an_undisturbed_one(
    make_shards: Callable[..., Path], vitscore: Callable[..., Any], digits: Any
) -> None:
    shards = make_shards(*(digits[number % 20 * 25 :][: 5 + number] for number in range(60)))
    options = ("run", shards, "-m", "demo-vit", "-m", "demo-clip", "-b", "8")
    disturbed, calm = shards / "disturbed", shards / "calm"
    command = [sys.executable, "-m", "vitscore", *map(str, options), "-o", str(disturbed)]
    for num_parts in (3, 20):
        kill_when(command, parts=disturbed / "parts", num_parts=num_parts)
        assert not (disturbed / "metrics.json").exists()
    assert vitscore(*options, "-o", disturbed).code == 0
    assert vitscore(*options, "-o", calm).code == 0
    assert content(disturbed) == content(calm)
    assert (disturbed / "metrics.json").read_bytes() == (calm / "metrics.json").read_bytes()
    assert [name for name in os.listdir(disturbed / "parts") if name.startswith(".")] == []
