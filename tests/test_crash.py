"""Kills at any moment, full disks and power losses: after a restart, the same parts and the same metrics."""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).parent.parent
Call = Callable[..., Any]
NUM_SHARDS = 60
VICTIMS = ("a rank", "all", "the launcher")
TESTS = Path(__file__).parent
SHIM = TESTS / "support" / "faultinject.c"


def content(folder: Path) -> dict[str, Any]:
    return {path.name: pq.read_table(path).to_pylist() for path in sorted((folder / "parts").glob("*.parquet"))}


class Disturbed:
    """A command that is started and killed repeatedly in one folder until it finishes.

    Args:
        words: the command line without `-o`.
        out: the run's folder.
        chance: source of the random moments.
    """

    def __init__(self, words: list[str], out: Path, chance: random.Random) -> None:
        self.words, self.out, self.chance = [*words, "-o", str(out)], out, chance
        self.history: list[str] = []

    def start(self, num_ranks: int) -> subprocess.Popen[bytes]:
        launcher = [sys.executable, "-m"]
        if num_ranks > 1:
            torchrun = str(Path(sys.executable).parent / "torchrun")
            launcher = [torchrun, "--nproc-per-node", str(num_ranks), "-m"]
        with (self.out.parent / "errors").open("wb") as errors:
            return subprocess.Popen([*launcher, "vitscore", *self.words], stdout=errors, stderr=errors, cwd=ROOT)

    def kill_once(self, num_ranks: int) -> bool:
        """Start, wait for a random moment, kill; return whether the command was still running."""
        victim = self.chance.choice(VICTIMS) if num_ranks > 1 else "all"
        num_parts = len(list((self.out / "parts").glob("*.parquet"))) + self.chance.randrange(12)
        at_a_part, wait_s = self.chance.random() < 0.7, self.chance.uniform(0.1, 8)
        process = self.start(num_ranks)
        until = time.monotonic() + (60 if at_a_part else wait_s)
        while process.poll() is None and time.monotonic() < until:
            if at_a_part and len(list((self.out / "parts").glob("*.parquet"))) > num_parts:
                time.sleep(self.chance.uniform(0, 0.1))
                break
            time.sleep(0.002)
        try:
            others = psutil.Process(process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            others = []
        ranks = [other for other in others if any("vitscore" in word for word in words_of(other))]
        is_killed = process.poll() is None
        if victim != "a rank":
            process.kill()
        for rank in {"all": ranks, "a rank": ranks[-1:], "the launcher": []}[victim]:
            rank.kill()
        self.history.append(
            f"{num_ranks} ranks, {victim} killed {'at a part' if at_a_part else f'after {wait_s:.1f} s'}"
        )
        process.wait(timeout=120)
        alive = psutil.wait_procs(others, timeout=30)[1]
        assert not [other for other in alive if other.status() != psutil.STATUS_ZOMBIE], self.history
        return is_killed

    def finish(self, num_ranks: int) -> None:
        process = self.start(num_ranks)
        assert process.wait(timeout=240) == 0, (self.history, (self.out.parent / "errors").read_text())


def words_of(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def kill_and_compare(make_shards: Call, vitscore: Call, digits: Any, *, num_kills: int, seed: int) -> None:
    """Kill `num_kills` starts, alternating between one and two ranks, three to six in a folder before it may finish."""
    shards = make_shards(*(digits[number % 20 * 25 :][: 5 + number % 40] for number in range(NUM_SHARDS)))
    words = ["run", str(shards), "-m", "demo-vit", "-m", "demo-clip", "-b", "8"]
    calm = shards.parent / "calm"
    assert vitscore(*words, "-o", calm).code == 0
    expected = content(calm)
    chance, kills = random.Random(seed), 0
    while kills < num_kills:
        out = shards.parent / f"out-{kills}"
        disturbed = Disturbed(words, out, chance)
        for _ in range(min(chance.randint(3, 6), num_kills - kills)):
            kills += disturbed.kill_once(1 + kills % 2)
        disturbed.finish(1 + kills % 2)
        assert content(out) == expected, disturbed.history
        assert (out / "metrics.json").read_bytes() == (calm / "metrics.json").read_bytes(), disturbed.history
        assert [name for name in os.listdir(out / "parts") if name.startswith(".")] == [], disturbed.history
        assert vitscore("metrics", out, "--check").code == 0
        shutil.rmtree(out)


def test_runs_killed_at_random_moments_end_as_an_undisturbed_one(
    make_shards: Call, vitscore: Call, digits: Any
) -> None:
    kill_and_compare(make_shards, vitscore, digits, num_kills=3, seed=0)


@pytest.mark.crash
@pytest.mark.parametrize("seed", range(1, 6))
def test_runs_killed_at_sixty_random_moments(make_shards: Call, vitscore: Call, digits: Any, seed: int) -> None:
    kill_and_compare(make_shards, vitscore, digits, num_kills=12, seed=seed)


@pytest.fixture(scope="session")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the library that makes system calls fail."""
    library = tmp_path_factory.mktemp("shim") / "faultinject.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, SHIM, "-ldl", "-lpthread"], check=True)
    return library


def run_below(shim: Path, root: Path, *words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, words)],
        env={
            **os.environ,
            "LD_PRELOAD": str(shim),
            "FI_ROOT": str(root / "new"),
            "PYTHONPATH": os.pathsep.join(filter(None, (str(TESTS), os.environ.get("PYTHONPATH")))),
            **environment,
        },
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )


def break_calls(shim: Path, root: Path, what: str, every: int) -> dict[str, Any]:
    """Run support/faultcases.py; return its counts."""
    done = run_below(shim, root, "-m", "support.faultcases", what, every, root, FI_LOG=str(root / "calls.log"))
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    assert report["wrong"] == []
    assert min(report["calls"].values()) > 100
    return report


EVERY = pytest.mark.parametrize("every", [23, pytest.param(1, marks=pytest.mark.crash)])


@EVERY
def test_every_system_call_failing_once_costs_nothing_that_the_same_command_does_not_mend(
    shim: Path, tmp_path: Path, every: int
) -> None:
    seen = break_calls(shim, tmp_path, "errors", every)["seen"]
    assert seen["fail ENOSPC: exit 4"] and seen["fail EIO: exit 4"] and seen["full: exit 4"]
    assert not any(name.startswith("fail EINTR") and name != "fail EINTR: went on" for name in seen)


@EVERY
def test_a_kill_before_or_within_every_system_call_leaves_files_whole_or_not_there(
    shim: Path, tmp_path: Path, every: int
) -> None:
    seen = break_calls(shim, tmp_path, "kills", every)["seen"]
    assert seen["left a temporary file"], "no kill hit a file being written"


@EVERY
def test_a_power_loss_between_any_two_system_calls_leaves_files_whole_or_not_there(
    shim: Path, tmp_path: Path, every: int
) -> None:
    seen = break_calls(shim, tmp_path, "losses", every)["seen"]
    assert len(seen) == 4 and min(seen.values()) > 10


def test_a_full_disk_ends_the_run_with_one_line_and_the_same_command_goes_on(
    shim: Path, make_shards: Call, vitscore: Call, digits: Any, tmp_path: Path
) -> None:
    shards = make_shards(*(digits[number * 10 :][:10] for number in range(12)))
    words = ("run", shards, "-m", "demo-vit", "-m", "demo-clip", "-b", "8", "-o")
    assert vitscore(*words, tmp_path / "calm").code == 0
    out = tmp_path / "new" / "out"
    for at in (60, 200):
        done = run_below(shim, tmp_path, "-m", "vitscore", *words, out, FI_MODE="full", FI_AT=str(at))
        assert done.returncode == 4, (at, done.stderr)
        lines = [line for line in done.stderr.splitlines() if "No space left on device" in line]
        assert len(lines) == 1 and "the same command goes on" in lines[0], done.stderr
        assert "Traceback" not in done.stderr
        assert not list((tmp_path / "new").rglob(".*.tmp")), at
    assert vitscore(*words, out).code == 0
    assert content(out) == content(tmp_path / "calm")
    assert (out / "metrics.json").read_bytes() == (tmp_path / "calm" / "metrics.json").read_bytes()


def test_the_disk_model_finds_a_missing_flush(shim: Path, tmp_path: Path) -> None:
    """Check the harness itself: without flushing, the same simulation must find torn files."""
    program = (
        "import os, pathlib; os.fsync = lambda fd: None; from support import faultcases; "
        f"faultcases.main('losses', 29, pathlib.Path({str(tmp_path)!r}))"
    )
    done = run_below(shim, tmp_path, "-c", program, FI_LOG=str(tmp_path / "calls.log"))
    assert done.returncode == 0, done.stderr
    assert any("is not whole" in problem for problem in json.loads(done.stdout)["wrong"])
