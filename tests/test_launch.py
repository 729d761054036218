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


def test_two_ranks_tell_an_error_once(start: Callable[..., Any], tmp_path: Path) -> None:
    done = start(*WAYS["torchrun, two ranks"], "run", "demo", "-m", "no/such", "-o", tmp_path / "out")
    assert done.code != 0
    own = [line for line in done.err.splitlines() if "no/such" in line and " - " in line]
    assert len(own) == 1, done.err
