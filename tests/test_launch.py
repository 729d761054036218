"""Every way to start the program is the same program."""

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
    """The demo by every way, from the checkout's root."""
    folders = {}
    for number, (name, words) in enumerate(WAYS.items()):
        folders[name] = tmp_path_factory.mktemp("launch") / str(number)
        first = sys.executable if words[0] == "python" else words[0]
        done = start(first, *words[1:], "run", "demo", *MODELS, "-o", folders[name])
        assert done.code == 0, f"{name}: {done.err}"
        assert "Traceback" not in done.err
    return folders


def test_the_metrics_are_the_same_bytes(runs: dict[str, Path]) -> None:
    found = {name: (folder / "metrics.json").read_bytes() for name, folder in runs.items()}
    assert len(found) == len(WAYS)
    assert len(set(found.values())) == 1


def test_the_predictions_are_bit_for_bit_the_same_for_one_and_two_ranks(runs: dict[str, Path]) -> None:
    def rows(name: str) -> list[Any]:
        return [pq.read_table(path).to_pylist() for path in sorted((runs[name] / "parts").iterdir())]

    assert rows("torchrun, two ranks") == rows("vitscore")


RANK_1_CANNOT_WRITE = """
import os, resource, sys
if os.environ["RANK"] == "1":
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
from vitscore.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_an_error_on_another_rank_is_told_once_and_the_run_goes_on_later(
    start: Callable[..., Any], tmp_path: Path, digits: Any, make_shards: Callable[..., Path]
) -> None:
    shards = make_shards(*(digits[number % 20 * 25 :][:25] for number in range(60)))
    (tmp_path / "main.py").write_text(RANK_1_CANNOT_WRITE)
    command = ("run", shards, "-m", "demo-vit", "-o", tmp_path / "out")
    done = start("torchrun", "--nproc-per-node", "2", tmp_path / "main.py", *command)
    assert done.code != 0
    assert sum("cannot write" in line for line in done.err.splitlines()) == 1, done.err
    assert not list((tmp_path / "out" / "parts").glob(".*"))
    assert start("vitscore", *command).code == 0


def test_two_ranks_tell_an_error_once(start: Callable[..., Any], tmp_path: Path) -> None:
    done = start(*WAYS["torchrun, two ranks"], "run", "demo", "-m", "no/such", "-o", tmp_path / "out")
    assert done.code != 0
    own = [line for line in done.err.splitlines() if "no/such" in line and " - " in line]
    assert len(own) == 1, done.err
