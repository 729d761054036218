"""One bench's JSON: what was measured, when, on what, with which versions; written whole, and read back checked.

    {"schema": 1, "bench": NAME, "started": UTC, "seconds": n, "quick": bool, "hardware": {...}, "versions": {...},
     "commit": hash or null, "result": {...}}

Written by `run` (running.py), read by `compare`, `plan` and `picture`, which need neither torch nor any peer.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from vitscore.errors import UsageError
from vitscore.system.durable import make_folder_durably, write_json_durably, writing

PEERS = (
    "scikit-learn",
    "torchmetrics",
    "timm",
    "open_clip_torch",
    "scipy",
    "pillow",
    "psutil",
    "numba-cuda",
    "fsspec",
)
"""Packages beside a run's own (see machine.versions) that a bench measures or measures with."""
KEYS = {"bench": str, "started": str, "hardware": dict, "versions": dict, "result": dict}
FOLDER = Path("build/bench")


@dataclass(frozen=True)
class Record:
    """A bench's JSON, and where it lies."""

    path: Path
    bench: str
    started: str
    hardware: Mapping[str, Any]
    versions: Mapping[str, Any]
    result: Mapping[str, Any]
    is_quick: bool = False

    @property
    def machine(self) -> str:
        """`2 x AMD EPYC`, with the GPUs where there are some."""
        return machine_text(self.hardware)

    @property
    def date(self) -> str:
        return self.started[:10]


def machine_text(hardware: Mapping[str, Any]) -> str:
    """The machine in a few words: GPUs, cores, CPU."""
    gpus = list(hardware.get("gpus") or ())
    counted = [f"{gpus.count(gpu)} x {gpu}" for gpu in dict.fromkeys(gpus)]
    return ", ".join([*counted, f"{hardware.get('cpus', '?')} cores of {hardware.get('cpu', 'an unknown CPU')}"])


def default_folder() -> Path:
    """Where benches write without `-o`: what $OUT names, else build/bench below the current folder."""
    return Path(os.environ.get("OUT") or FOLDER)


def write(folder: Path, name: str, result: Mapping[str, Any], *, started: float, seconds: float, quick: bool) -> Path:
    """Write NAME.json; `started` is in seconds since the epoch.

    Raises:
        SetupError: it cannot be written.
    """
    from vitscore.system.machine import hardware

    document = {
        "schema": 1,
        "bench": name,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
        "seconds": round(seconds, 1),
        "quick": quick,
        "hardware": hardware(),
        "versions": all_versions(),
        "commit": commit(),
        "result": without_nan(result),
    }
    with writing(folder):
        make_folder_durably(folder)
        write_json_durably(folder / f"{name}.json", document)
    return folder / f"{name}.json"


def all_versions() -> dict[str, str | None]:
    """Versions of a run's packages, and of the peers that are installed."""
    from vitscore.system.machine import versions

    found = versions()
    for name in PEERS:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def commit() -> str | None:
    """The checkout's commit, `-dirty` where files differ from it; None where this is no checkout."""
    here = Path(__file__).parent
    try:
        # An environment may lie in somebody else's repository: only a file that git knows is a checkout's.
        describe = ["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        for words in (["ls-files", "--error-unmatch", "record.py"], describe):
            done = subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def without_nan(value: Any) -> Any:
    """`value` with None for numbers that JSON cannot hold."""
    if isinstance(value, Mapping):
        return {str(key): without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read(path: Path) -> Record:
    """Read one bench's JSON.

    Raises:
        UsageError: there is no such file, or it is no bench's.
    """
    try:
        document = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UsageError("no such file", where=str(path), next_step="`vitscore bench` writes one a bench.") from None
    except (OSError, ValueError) as error:
        raise not_a_bench(path, f"{type(error).__name__}: {error}") from error
    if not isinstance(document, dict):
        raise not_a_bench(path, f"a {type(document).__name__}")
    for key, kind in KEYS.items():
        if not isinstance(document.get(key), kind):
            raise not_a_bench(path, f"no {key!r}")
    return Record(path, **{key: document[key] for key in KEYS}, is_quick=bool(document.get("quick")))


def not_a_bench(path: Path, got: str) -> UsageError:
    return UsageError("not a bench", where=str(path), expected="a JSON that `vitscore bench` wrote", got=got)


def read_all(path: Path) -> dict[str, Record]:
    """The benches of a file or of a folder's `*.json`, by name, sorted by it; other JSON in a folder is passed over.

    Raises:
        UsageError: there is none, one is damaged, or a folder holds two of one name.
    """
    if not path.is_dir():
        found = read(path)
        return {found.bench: found}
    records: dict[str, Record] = {}
    for found in _benches_in(path.glob("*.json")):
        if found.bench in records:
            both = f"{records[found.bench].path.name} and {found.path.name}"
            raise UsageError("two benches of one name", where=str(path), got=f"{found.bench} in {both}")
        records[found.bench] = found
    if not records:
        raise UsageError("no bench here", where=str(path), next_step="`vitscore bench` writes one JSON a bench.")
    return records


def _benches_in(paths: Iterable[Path]) -> Iterator[Record]:
    for path in sorted(paths):
        try:
            document = json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise not_a_bench(path, f"{type(error).__name__}: {error}") from error
        if isinstance(document, dict) and "bench" in document:
            yield read(path)
