"""Every way to start the program gives the same results."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

MODELS = ("-m", "demo-vit", "-m", "demo-clip")
WAYS = {
    "vitscore": ("vitscore",),
    "python -m": ("python", "-m", "vitscore"),
    "accelerate, folder": ("accelerate", "launch", "--quiet", "vitscore"),
    "accelerate, module": ("accelerate", "launch", "--quiet", "-m", "vitscore"),
    "torchrun, two ranks": ("torchrun", "--nproc-per-node", "2", "-m", "vitscore"),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, start: Callable[..., Any]) -> dict[str, Path]:
    """Run the demo in every way, from the checkout's root."""
    folders = {}
    for number, (name, words) in enumerate(WAYS.items()):
        folders[name] = tmp_path_factory.mktemp("launch") / str(number)
        first = sys.executable if words[0] == "python" else words[0]
        done = start(first, *words[1:], "run", "demo", *MODELS, "-o", folders[name])
        assert done.code == 0, f"{name}: {done.err}"
        assert "Traceback" not in done.err
    return folders


def test_the_metrics_are_the_same_bytes(runs: dict[str, Path]) -> None:
    documents = {name: (folder / "metrics.json").read_bytes() for name, folder in runs.items()}
    assert len(documents) == len(WAYS)
    assert len(set(documents.values())) == 1


# Rank 0 is slow, so that rank 1 gets shards even if it starts late.
TWO_RANKS = """
import os, resource, sys, time
import vitscore.engine.loop as e
if os.environ["RANK"] == "0":
    real = e.Engine._compute
    e.Engine._compute = lambda *a: (time.sleep(0.1), real(*a))[1]
elif {is_limited}:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
from vitscore.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def part_rows(folder: Path) -> dict[str, list[Any]]:
    return {path.name: pq.read_table(path).to_pylist() for path in sorted((folder / "parts").glob("*.parquet"))}


def test_two_ranks_of_which_one_failed_before_end_as_one_process_does(
    start: Callable[..., Any], tmp_path: Path, digits: Any, make_shards: Callable[..., Path]
) -> None:
    """An error on another rank is printed once, the same command resumes, and the bits equal a single process's."""
    shards = make_shards(*(digits[number % 20 * 25 :][:25] for number in range(120)))
    script = tmp_path / "main.py"
    script.write_text(TWO_RANKS.format(is_limited=True))
    command, out, alone = ("run", shards, "-m", "demo-vit", "-o"), tmp_path / "out", tmp_path / "alone"
    done = start("torchrun", "--nproc-per-node", "2", script, *command, out)
    assert done.code != 0
    assert sum("cannot write" in line for line in done.err.splitlines()) == 1, done.err
    assert not list((out / "parts").glob(".*"))
    script.write_text(TWO_RANKS.format(is_limited=False))
    done = start("torchrun", "--nproc-per-node", "2", script, *command, out)
    assert done.code == 0, done.err
    session = json.loads((out / "run.json").read_bytes())["sessions"][-1]
    assert min(session["images_by_rank"]) > 0
    assert start("vitscore", *command, alone).code == 0
    assert part_rows(out) == part_rows(alone)
    assert (out / "metrics.json").read_bytes() == (alone / "metrics.json").read_bytes()


def test_two_ranks_print_an_error_once(start: Callable[..., Any], tmp_path: Path) -> None:
    done = start(*WAYS["torchrun, two ranks"], "run", "demo", "-m", "no/such", "-o", tmp_path / "out")
    assert done.code != 0
    own = [line for line in done.err.splitlines() if "no/such" in line and " - " in line]
    assert len(own) == 1, done.err
