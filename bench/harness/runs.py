"""Whole runs of vitscore for the benches, each in a separate process, with its record."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitscore.bench.harness.timing import run_process


@dataclass(frozen=True)
class OwnRun:
    """A run that ended well."""

    wall_s: float
    session: dict[str, Any]
    """Its record in run.json."""
    settings: str
    """Its choices, in words."""

    @property
    def images(self) -> int:
        return int(self.session["images"])

    @property
    def loop_s(self) -> float:
        return float(self.session["seconds"])


def run_own(
    shards: Path,
    models: Sequence[Path | str],
    output: Path,
    *options: str,
    launcher: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
) -> OwnRun:
    """Score a folder of shards.

    Args:
        shards: the folder.
        models: `[NAME=]CHECKPOINT` each.
        output: the run's folder; what it holds is scored anew.
        options: more of the command's.
        launcher: a command that starts `-m vitscore`; by default this Python.
        env: variables beside this process'.
    """
    named = [word for model in models for word in ("-m", str(model))]
    command = [*(launcher or (sys.executable,)), "-m", "vitscore", "run", str(shards), *named, "-o", str(output)]
    done = run_process([*command, "--overwrite", *options], env=env)
    record = json.loads((output / "run.json").read_bytes())
    chosen = {name: choice["value"] for name, choice in record["choices"].items()}
    settings = f"batch {chosen['batch_size']}, {chosen['precision']}, {chosen['decoder']}"
    return OwnRun(done.wall_s, record["sessions"][-1], settings)


def predictions_of(output: Path, model: str) -> dict[str, int]:
    """By key, what a run predicted."""
    import pyarrow.parquet as pq

    found: dict[str, int] = {}
    for path in sorted((output / "parts").glob("*.parquet")):
        rows = pq.read_table(path, columns=["key", f"{model}.pred"]).to_pydict()
        found.update(zip(rows["key"], rows[f"{model}.pred"], strict=True))
    return found
